package tproxy

import (
	"net/netip"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/udp"
)

// Datagram decides about a client's datagrams to a destination, as is decided about a
// flow: what is refused, what goes directly, and by which name the rest is asked for.
func (p *Policy) Datagram(client netip.Addr, destination netip.AddrPort) udp.Route {
	address := destination.Addr()
	if p.refuses(address) {
		return udp.Route{}
	}
	route := udp.Route{Way: udp.Upstream, Placeholder: p.placeholder(address)}
	if p.Name != nil {
		route.Name, route.NameFrom = p.Name(client, address)
	}
	if p.exempt(destination, route.Name) {
		route.Way = udp.Direct
	}
	return route
}

// Impostor reports whether an address cannot be that of a sender beyond the proxy: what
// is never reached through the gateway, or leads nowhere.
func (p *Policy) Impostor(address netip.Addr) bool {
	return p.refuses(address) || p.placeholder(address)
}
