package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// roles says which interfaces capture. It is decided once, at start: if an uplink
// lost its default route, or the client network its address, a stranger on the
// uplink must not become a client to whom the proxy's credentials are lent.
type roles struct {
	named   []string // --interface: these and no other
	armed   string   // the only card, which is uplink and client network in one
	uplinks []string // not captured; all others are, those that appear later included
}

// newRoles decides. The uplinks are the interfaces of the default routes; a host
// without one has the interface that leads to a proxy.
func newRoles(named []string, host routing.Host, proxies []netip.Addr) (roles, error) {
	if len(named) > 0 {
		return roles{named: named}, nil
	}
	var cards []string
	for _, link := range host.Interfaces {
		if !link.Loopback {
			cards = append(cards, link.Name)
		}
	}
	if len(cards) == 1 {
		return roles{armed: cards[0]}, nil
	}
	uplinks := slices.Clone(host.Uplinks)
	if len(uplinks) == 0 {
		for _, proxy := range proxies {
			if name, err := routing.InterfaceTo(proxy); err == nil && slices.Contains(cards, name) {
				uplinks = append(uplinks, name)
			}
		}
	}
	switch {
	case len(uplinks) == 0:
		return roles{}, errors.New("there is no default route that tells which interface is the uplink: name the ones to capture with --interface")
	case !slices.ContainsFunc(cards, func(name string) bool { return !slices.Contains(uplinks, name) }):
		return roles{}, fmt.Errorf("all interfaces (%s) have default routes: name the ones to capture with --interface", strings.Join(cards, ", "))
	}
	return roles{uplinks: uplinks}, nil
}

// capture is what the roles mean for the interfaces that there are now.
type capture struct {
	interfaces []string       // the capturing ones
	networks   []netip.Prefix // connected to them
	uplinks    []string       // excluded; none with --interface
}

func (r roles) capture(host routing.Host) capture {
	var found capture
	if len(r.named) == 0 {
		// One that has become an uplink since the start is excluded as well.
		found.uplinks = slices.Concat(r.uplinks, host.Uplinks)
		found.uplinks = slices.DeleteFunc(found.uplinks, func(name string) bool { return name == r.armed })
		slices.Sort(found.uplinks)
		found.uplinks = slices.Compact(found.uplinks)
	}
	for _, link := range host.Interfaces {
		captures := !link.Loopback && !slices.Contains(found.uplinks, link.Name)
		if len(r.named) > 0 {
			captures = slices.Contains(r.named, link.Name)
		}
		if captures {
			found.interfaces = append(found.interfaces, link.Name)
			found.networks = append(found.networks, link.Prefixes...)
		}
	}
	return found
}

// hasIPv6 reports whether IPv6 clients are connected.
func (c capture) hasIPv6() bool {
	return slices.ContainsFunc(c.networks, func(network netip.Prefix) bool { return network.Addr().Is6() })
}
