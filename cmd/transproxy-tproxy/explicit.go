package main

import (
	"net/netip"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/forward"
)

// explicit are the listeners for clients that use the gateway as their proxy.
func (g *gateway) explicit() []tproxy.Explicit {
	s := g.settings
	var listeners []tproxy.Explicit
	for _, address := range g.families.usable(s.http.passing) {
		listeners = append(listeners, tproxy.Explicit{
			Listen: address, Kind: forward.Passing, Flag: "--explicit-proxy-listen",
			Allow: func(client netip.Addr) bool {
				return g.mayUse(client, s.http.allow) || s.http.allow == nil && within(client, *g.neighbours.Load())
			},
		})
	}
	for _, address := range g.families.usable(s.http.authenticating) {
		listeners = append(listeners, tproxy.Explicit{
			Listen: address, Kind: forward.Authenticating, Flag: "--explicit-proxy-with-auth-listen",
			Allow: func(client netip.Addr) bool { return g.mayUse(client, s.http.allowAuthenticated) },
		})
	}
	return listeners
}

// mayUse reports whether a client is this host, or within one of the prefixes.
func (g *gateway) mayUse(client netip.Addr, allowed []netip.Prefix) bool {
	return client.IsLoopback() || g.owns(client) || within(client, allowed)
}

func within(client netip.Addr, prefixes []netip.Prefix) bool {
	for _, prefix := range prefixes {
		if prefix.Contains(client.WithZone("")) {
			return true
		}
	}
	return false
}
