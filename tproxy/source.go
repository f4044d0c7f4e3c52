package tproxy

import (
	"net/netip"
	"slices"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// source is the source address of a connection. Only those to an upstream are bound
// to one: a direct flow may leave by any interface.
func (s *Server) source(to netip.Addr) netip.Addr {
	if len(s.config.Dialer.Sources) > 0 && (s.isAt(s.policy.Upstream, to) || s.isAt(s.policy.HTTP, to)) {
		return s.config.Dialer.Source(to)
	}
	return netip.Addr{}
}

// isAt reports whether an address is one of a proxy's, which may be nil.
func (s *Server) isAt(proxy *upstream.Proxy, to netip.Addr) bool {
	if proxy == nil {
		return false
	}
	known, _ := s.config.Dialer.Known(proxy)
	return slices.ContainsFunc(known, func(at netip.AddrPort) bool { return at.Addr() == to })
}
