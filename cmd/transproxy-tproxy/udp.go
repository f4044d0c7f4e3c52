package main

import (
	"context"
	"net/netip"
	"slices"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/udp"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// datagramUpstreams are the proxies that carry UDP: the group of which one can. Nil if none
// can.
func (s *settings) datagramUpstreams() *upstream.Group {
	for _, group := range s.groups() {
		if slices.ContainsFunc(group.Proxies(), (*upstream.Proxy).Associates) {
			return group
		}
	}
	return nil
}

// openDatagrams binds the listeners for UDP; nil if none is captured.
func (g *gateway) openDatagrams(d dialers) (*udp.Server, error) {
	s := g.settings
	if _, _, captured := s.udpPorts(); len(captured) == 0 || s.http.only {
		return nil, nil
	}
	proxies := s.datagramUpstreams()
	policy := g.policy()
	return udp.Listen(udp.Config{
		Listen: g.families.loopback(s.listenPort),
		Mark:   s.bypassMark(),
		Associate: func(ctx context.Context, client netip.Addr) (*upstream.Association, error) {
			return d.tunnel.AssociateVia(ctx, proxies.Candidates(client))
		},
		Carry: g.carry,
		Route: policy.Datagram,
		Impostor: func(address netip.Addr) bool {
			return policy.Impostor(address) || slices.ContainsFunc(*g.neighbours.Load(), func(network netip.Prefix) bool { return network.Contains(address) })
		},
		Filter:       s.udp.filter,
		Timeout:      s.udp.timeout,
		MaxSessions:  g.capacity.sessions,
		MaxPerClient: max(1, g.capacity.sessions/4),
		MaxReplies:   g.capacity.replies,
		Access:       g.access.datagrams,
		Log:          g.log,
	})
}

// closeDatagrams closes the listeners of a server that is not served.
func (g *gateway) closeDatagrams() {
	if g.datagrams != nil {
		g.datagrams.Close()
	}
}

// carry has the rules capture UDP while the upstream carries it, and refuse it otherwise:
// browsers whose QUIC is refused turn to TCP at once.
func (g *gateway) carry(carried bool, reason error) {
	g.planning.Lock()
	defer g.planning.Unlock()
	g.carried = carried
	if g.netfilter != nil && g.planned != nil {
		p := *g.planned
		if _, err := g.fitRules(&p); err != nil {
			g.log.Error().Err(err).Msg("the rules for UDP stay as they were")
		}
	}
	switch {
	case carried:
		g.log.Info().Stringer("upstream", g.settings.datagramUpstreams()).Msg("the upstream carries UDP")
	case upstream.Denied(reason):
		g.log.Error().Err(reason).Msg("the upstream refuses the credential")
	case g.netfilter == nil:
		g.log.Warn().Err(reason).Msg("the upstream does not carry UDP: what is captured is dropped; it is asked again now and then")
	default:
		g.log.Warn().Err(reason).Msg("the upstream does not carry UDP: what --udp sends there is refused with an ICMP error; it is asked again now and then")
	}
}

// keepRules leaves the rules as they are, whatever the upstream says about UDP.
func (g *gateway) keepRules() {
	g.planning.Lock()
	defer g.planning.Unlock()
	g.planned = nil
}

// withoutUDP refuses what else would be captured.
func withoutUDP(c netfilter.Config) netfilter.Config {
	c.RefusedUDP, c.CapturedUDP = slices.Concat(c.RefusedUDP, c.CapturedUDP), nil
	return c
}
