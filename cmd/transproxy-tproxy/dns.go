package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver"
	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/fakeip"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// fakeNames is how many names have an address of --fake-ip at once: several times
// what the clients of a gateway use between two starts.
const fakeNames = 1 << 16

// names is how this gateway resolves names.
type names struct {
	server *resolver.Server
	fake   *fakeip.Pool // nil without --fake-ip
	groups []*exchange.Group
}

// dialers open the connections of this program's own, marked so that they are never
// captured.
type dialers struct {
	direct net.Dialer
	tunnel *upstream.Dialer
}

func newDialers(s *settings) (dialers, error) {
	control := markSockets(s.bypassMark())
	config, err := s.tls.config()
	return dialers{
		direct: net.Dialer{Control: control, Timeout: s.connectTimeout},
		tunnel: &upstream.Dialer{
			Control: control, TLS: config, Sources: s.sources,
			ConnectTimeout: s.connectTimeout, HandshakeTimeout: s.replyTimeout,
		},
	}, err
}

// markSockets is a Control of net.Dialer; nil for no mark.
func markSockets(mark uint32) func(network, address string, raw syscall.RawConn) error {
	if mark == 0 {
		return nil
	}
	return func(_, _ string, raw syscall.RawConn) error {
		var failure error
		err := raw.Control(func(fd uintptr) {
			failure = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
		})
		if err != nil {
			return err
		}
		if failure != nil {
			return fmt.Errorf("set SO_MARK: %w", failure)
		}
		return nil
	}
}

// to opens connections to one server.
func (d dialers) to(network string, server netip.AddrPort) exchange.Dial {
	return func(ctx context.Context) (net.Conn, error) {
		return d.direct.DialContext(ctx, network, server.String())
	}
}

// through opens tunnels to one server.
func (d dialers) through(s *settings, target upstream.Target) exchange.Dial {
	return func(ctx context.Context) (net.Conn, error) {
		proxies, err := s.proxiesFor(ctx, target)
		if err != nil {
			return nil, err
		}
		conn, rest, _, err := d.tunnel.TunnelVia(ctx, proxies, target, netip.AddrPort{})
		if err != nil {
			return nil, err
		}
		if len(rest) > 0 {
			// A DNS or TLS server does not speak first.
			conn.Close()
			return nil, fmt.Errorf("%s spoke before it was asked", target.Host)
		}
		return conn, nil
	}
}

// proxiesFor are those that lead to a server of this program's own.
func (s *settings) proxiesFor(ctx context.Context, target upstream.Target) ([]*upstream.Proxy, error) {
	if s.script != nil {
		return s.script.Find(ctx, target.Host, target.Port)
	}
	return s.upstream.Candidates(netip.Addr{}), nil
}

// openNames binds the DNS listeners; nil if none of the DNS flags was given.
func (g *gateway) openNames(d dialers) (_ *names, err error) {
	s := g.settings
	if !s.dns.enabled() {
		return nil, nil
	}
	n := new(names)
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if s.dns.fake {
		config := fakeip.Config{Max: fakeNames, Store: s.dns.fakeStore, StoreFailed: g.storeFailed}
		for _, prefix := range s.dns.fakeRange {
			switch {
			case prefix.Addr().Is4():
				config.IPv4 = prefix
			case g.families.ipv6: // else nobody would be there
				config.IPv6 = prefix
			}
		}
		if n.fake, err = fakeip.Open(config); err != nil {
			return nil, err
		}
		for _, note := range n.fake.Notes() {
			g.log.Warn().Str("file", s.dns.fakeStore).Msg(note)
		}
	}
	n.server, err = resolver.Listen(resolver.Config{
		Transparent:     s.listenDNS(g.families),
		UDP:             s.dns.udp,
		TCP:             s.dns.tcp,
		Listen:          g.families.usable(s.dns.listen),
		Allow:           g.mayAsk,
		Mark:            s.bypassMark(),
		Zones:           n.zones(s, d),
		Fake:            n.fake,
		CacheBytes:      s.dns.cacheBytes,
		KeepECS:         s.dns.ecs,
		AllowPrivateDNS: s.dns.allowPrivate,
		MaxInFlight:     g.capacity.queries,
		MaxPerClient:    max(1, g.capacity.queries/4),
		MaxConnections:  g.capacity.connections,
		Log:             g.log,
	})
	return n, err
}

// ways are who is asked, for people; none without DNS.
func (n *names) ways() []string {
	ways := []string{}
	if n == nil {
		return ways
	}
	for _, group := range n.groups {
		ways = append(ways, group.String())
	}
	if n.fake != nil {
		ways = append(ways, "fake-ip")
	}
	return ways
}

// stop closes the listeners of names that are not served.
func (n *names) stop() {
	if n != nil {
		n.server.Close()
	}
}

// storeFailed tells that a restart would forget the latest addresses of --fake-ip.
func (g *gateway) storeFailed(err error) {
	g.log.Error().Err(err).Msg("--fake-ip-store: what clients are told now would be forgotten at a restart")
}

// close releases the rest; serving has ended or never begun.
func (n *names) close() error {
	if n == nil {
		return nil
	}
	for _, group := range n.groups {
		group.Close()
	}
	if n.fake != nil {
		return n.fake.Close()
	}
	return nil
}

// addresses are those of servers.
func addresses(servers []netip.AddrPort) []netip.Addr {
	var all []netip.Addr
	for _, server := range servers {
		all = append(all, server.Addr())
	}
	return all
}

// zones are who is asked for which names.
func (n *names) zones(s *settings, d dialers) []resolver.Zone {
	var zones []resolver.Zone
	if len(s.dns.private) > 0 {
		private := n.group("private", plain(s.dns.private, d))
		for _, suffix := range s.noProxy.Suffixes() {
			zones = append(zones, resolver.Zone{Suffix: suffix.Name, Below: suffix.Below, Way: private, Servers: addresses(s.dns.private)})
		}
		for _, prefix := range s.noProxy.Prefixes() {
			for _, zone := range resolver.ReverseZones(prefix) {
				zones = append(zones, resolver.Zone{Suffix: zone, Way: private, Servers: addresses(s.dns.private)})
			}
		}
		if !s.dns.hasPublic() {
			zones = append(zones, resolver.Zone{Way: private, Servers: addresses(s.dns.private)})
		}
	}
	for _, route := range s.dns.routes {
		zones = append(zones, resolver.Zone{
			Suffix: route.suffix, Way: n.group(route.suffix, plain(route.servers, d)), Servers: addresses(route.servers),
		})
	}
	switch {
	case s.dns.fake:
		zones = append(zones, resolver.Zone{}) // answered with addresses of our own
	case s.dns.hasPublic():
		zones = append(zones, resolver.Zone{Way: n.group("public", s.publicServers(d))})
	}
	return zones
}

func (n *names) group(name string, servers []exchange.Server) *exchange.Group {
	group := exchange.NewGroup(name, servers...)
	n.groups = append(n.groups, group)
	return group
}

// plain are servers that are asked directly, over UDP.
func plain(addresses []netip.AddrPort, d dialers) []exchange.Server {
	var servers []exchange.Server
	for _, address := range addresses {
		servers = append(servers, exchange.NewUDP(address.String(), d.to("udp", address), d.to("tcp", address), exchange.Config{}))
	}
	return servers
}

// publicServers are those for public names.
func (s *settings) publicServers(d dialers) []exchange.Server {
	switch dns := &s.dns; {
	case dns.https:
		host, port := dns.endpoint.Hostname(), uint16(portDNSOverHTTPS)
		if number, err := strconv.ParseUint(dns.endpoint.Port(), 10, 16); err == nil {
			port = uint16(number)
		}
		dial := d.through(s, upstream.Target{Host: host, Port: port})
		return []exchange.Server{exchange.NewHTTPS(dns.endpoint, dial, &tls.Config{RootCAs: dns.roots}, exchange.Config{})}
	case dns.tls.name != "":
		dial := d.through(s, upstream.Target{Host: dns.tls.host, Port: dns.tls.port})
		return []exchange.Server{exchange.NewTLS(dns.tls.name, dial, &tls.Config{RootCAs: dns.roots, ServerName: dns.tls.name}, exchange.Config{})}
	case dns.direct:
		return plain(dns.public, d)
	}
	var servers []exchange.Server
	for _, address := range s.dns.public {
		dial := d.through(s, upstream.Target{Host: address.Addr().String(), Port: address.Port()})
		servers = append(servers, exchange.NewTCP(address.String(), dial, exchange.Config{}))
	}
	return servers
}

// validateDNS finds what contradicts the rest of the settings.
func (s *settings) validateDNS() error {
	if err := s.dns.validate(); err != nil {
		return err
	}
	if s.dns.fake && len(s.dns.private) == 0 && len(s.noProxy.Suffixes()) > 0 {
		return errors.New("--fake-ip: the names of --no-proxy are reached directly, and nobody resolves them: give --private-dns, or leave them out")
	}
	for _, listen := range s.dns.listen {
		if listen.Port() == s.dns.port {
			return fmt.Errorf("--dns-proxy-listen %s: the port is that of --dns-tproxy-listen, whose answers leave from port 53: choose another", listen)
		}
		asked := slices.Concat(s.dns.private, s.dns.public)
		for _, route := range s.dns.routes {
			asked = append(asked, route.servers...)
		}
		if slices.Contains(asked, listen) {
			return fmt.Errorf("--dns-proxy-listen %s: the same address is asked for names, which would ask itself: leave one of them out", listen)
		}
	}
	return nil
}

// listenDNS are the addresses of the transparent DNS listeners; none if no transport
// is captured.
func (s *settings) listenDNS(f families) []netip.AddrPort {
	if s.http.only || !s.dns.enabled() || !s.dns.udp && !s.dns.tcp {
		return nil
	}
	return f.loopback(s.dns.port)
}

// mayAsk reports whether a client may use the ordinary DNS listeners.
func (g *gateway) mayAsk(client netip.Addr) bool {
	allowed := g.settings.dns.allow
	if allowed == nil {
		allowed = *g.neighbours.Load()
	}
	return g.mayUse(client, allowed)
}

// nameOf is what a client means by an address.
func (g *gateway) nameOf(client, destination netip.Addr) (name, source string) {
	if g.isFake(destination) {
		if name, ok := g.names.fake.Name(destination); ok {
			return name, "fake-ip"
		}
		return "", ""
	}
	if name, ok := g.names.server.Name(client, destination); ok {
		return name, "dns"
	}
	return "", ""
}

// isFake reports whether an address is one of --fake-ip.
func (g *gateway) isFake(address netip.Addr) bool {
	return g.names.fake != nil && g.names.fake.Contains(address)
}
