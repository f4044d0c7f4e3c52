package tproxy

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// sources hands out source addresses in turn.
type sources struct {
	ipv4, ipv6 []netip.Addr
	turn       atomic.Uint32
}

func (s *sources) add(addresses []netip.Addr) {
	for _, address := range addresses {
		if address.Is4() {
			s.ipv4 = append(s.ipv4, address)
		} else {
			s.ipv6 = append(s.ipv6, address)
		}
	}
}

// next returns the next address of the family of to, or the zero Addr if there is none.
func (s *sources) next(to netip.Addr) netip.Addr {
	family := s.ipv6
	if to.Is4() {
		family = s.ipv4
	}
	if len(family) == 0 {
		return netip.Addr{}
	}
	return family[int(s.turn.Add(1)%uint32(len(family)))]
}

// source is the source address of a connection. Only those to an upstream are bound
// to one: a direct flow may leave by any interface.
func (s *Server) source(to netip.Addr) netip.Addr {
	if len(s.config.Sources) > 0 && (s.isAt(s.policy.Upstream, to) || s.isAt(s.policy.HTTP, to)) {
		return s.sources.next(to)
	}
	return netip.Addr{}
}

// isAt reports whether an address is one of a proxy's, which may be nil.
func (s *Server) isAt(proxy *upstream.Proxy, to netip.Addr) bool {
	if proxy == nil {
		return false
	}
	known, _ := s.dialer.Known(proxy)
	return slices.ContainsFunc(known, func(at netip.AddrPort) bool { return at.Addr() == to })
}
