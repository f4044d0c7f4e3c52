package routing

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is what the kernel says about this host's place in the network, at one moment.
type Host struct {
	// Interfaces are all there are, in the order of their indexes.
	Interfaces []Interface
	// Uplinks are the names of the interfaces that the main table's default routes lead through, of either family, sorted.
	// There may be none: a proxy in a network that is directly connected needs no default route. See [InterfaceTo].
	Uplinks []string
	// Local is what the kernel delivers to this host, sorted, each once: its own addresses, and the prefixes and broadcast
	// addresses of the table "local" (ip route show table local). Multicast is not in it.
	Local []netip.Prefix
}

// Interface is one network interface.
type Interface struct {
	Name  string
	Index int
	// Addrs are the host's own addresses on it, sorted, link-local ones included, without zones.
	Addrs []netip.Addr
	// Prefixes are the networks that its addresses say are directly connected, masked, sorted, each once. Link-local ones
	// are left out: nothing behind a router has such an address (RFC 3927 section 7, RFC 4291 section 2.5.6).
	Prefixes []netip.Prefix
	// Loopback says that the interface leads back to this host.
	Loopback bool
	// Frames says that it is a bridge, or an interface that is laid upon one, whose packets pass the hooks of nftables and
	// iptables as frames already, before the host has received them (bridge-nf-call-iptables or bridge-nf-call-ip6tables
	// in the kernel's Documentation/networking/ip-sysctl.rst, or the bridge's own nf_call_iptables and nf_call_ip6tables).
	Frames bool
	// Up says that an administrator has switched it on; there may be no carrier.
	Up bool
}

// Look asks for interfaces, addresses and default routes of the calling thread's network namespace. It needs no privilege.
// A family that the kernel does not have yields no addresses and no routes, and no error.
func Look() (Host, error) {
	links, err := complete(netlink.LinkList)
	if err != nil {
		return Host{}, fmt.Errorf("list interfaces: %w", err)
	}
	addrs, err := complete(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Host{}, fmt.Errorf("list addresses: %w", err)
	}
	var host Host
	for _, link := range links {
		attrs := link.Attrs()
		host.Interfaces = append(host.Interfaces, newInterface(attrs, addrs))
	}
	slices.SortFunc(host.Interfaces, func(a, b Interface) int { return cmp.Compare(a.Index, b.Index) })

	if err := markFrames(host.Interfaces, links); err != nil {
		return Host{}, err
	}
	for _, family := range allFamilies {
		local, err := localPrefixes(family)
		if err != nil {
			return Host{}, err
		}
		host.Local = append(host.Local, local...)
		indexes, err := defaultLinks(family)
		if err != nil {
			return Host{}, err
		}
		for _, i := range host.Interfaces {
			if indexes[i.Index] && !i.Loopback {
				host.Uplinks = append(host.Uplinks, i.Name)
			}
		}
	}
	for _, i := range host.Interfaces {
		for _, address := range i.Addrs { // one that is being tested for a duplicate is in no table yet
			host.Local = append(host.Local, netip.PrefixFrom(address, address.BitLen()))
		}
	}
	slices.SortFunc(host.Local, netip.Prefix.Compare)
	host.Local = slices.Compact(host.Local)
	slices.Sort(host.Uplinks)
	host.Uplinks = slices.Compact(host.Uplinks)
	return host, nil
}

// newInterface gathers the addresses of one interface from those of all.
func newInterface(link *netlink.LinkAttrs, addrs []netlink.Addr) Interface {
	i := Interface{
		Name:     link.Name,
		Index:    link.Index,
		Loopback: link.Flags&net.FlagLoopback != 0,
		Up:       link.Flags&net.FlagUp != 0,
	}
	for _, addr := range addrs {
		if addr.LinkIndex != link.Index {
			continue
		}
		if own, ok := prefix(addr.IPNet); ok {
			i.Addrs = append(i.Addrs, own.Addr())
		}
		connected := addr.IPNet
		if addr.Peer != nil {
			connected = addr.Peer // of a point-to-point link, the far end has the prefix
		}
		if network, ok := prefix(connected); ok && !network.Addr().IsLinkLocalUnicast() {
			i.Prefixes = append(i.Prefixes, network.Masked())
		}
	}
	slices.SortFunc(i.Addrs, netip.Addr.Compare)
	slices.SortFunc(i.Prefixes, netip.Prefix.Compare)
	i.Prefixes = slices.Compact(i.Prefixes)
	return i
}

// prefix converts what netlink uses for an address with the length of its network's prefix.
func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr, bits), true
}

// neighbour returns an address that a client on the interface may have: a connected one that is not this host's.
func (i Interface) neighbour(ipv4 bool) (netip.Addr, bool) {
	for _, network := range i.Prefixes {
		if network.Addr().Is4() != ipv4 {
			continue
		}
		// Own addresses are few, so that this ends soon even in a /64.
		for addr := network.Addr(); network.Contains(addr); addr = addr.Next() {
			// The first address of a network is no host's (RFC 1122 section 3.2.1.3, RFC 4291 section 2.6.1).
			first := addr == network.Addr() && network.Bits() < addr.BitLen()-1
			if !first && !slices.Contains(i.Addrs, addr) {
				return addr, true
			}
		}
	}
	return netip.Addr{}, false
}

// defaultLinks returns the indexes of the interfaces of a family's default routes in the main table.
func defaultLinks(family int) (map[int]bool, error) {
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN} // and no destination
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil && !unsupported(err) {
		return nil, fmt.Errorf("list %s default routes: %w", ip(family), err)
	}
	indexes := map[int]bool{}
	for _, route := range routes {
		indexes[route.LinkIndex] = true
		for _, hop := range route.MultiPath {
			indexes[hop.LinkIndex] = true
		}
	}
	return indexes, nil
}

// localPrefixes returns what the table "local" of a family delivers to this host.
func localPrefixes(family int) ([]netip.Prefix, error) {
	filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL}
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
	})
	if err != nil && !unsupported(err) {
		return nil, fmt.Errorf("list %s local routes: %w", ip(family), err)
	}
	var local []netip.Prefix
	for _, route := range routes {
		switch route.Type {
		case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST:
			if destination, ok := prefix(route.Dst); ok {
				local = append(local, destination.Masked())
			}
		}
	}
	return local, nil
}

// InterfaceTo returns the name of the interface through which this host reaches addr: the uplink, where addr is the upstream
// proxy's and no default route says so. It is "lo" for an address of this host. Without a way to addr it returns an error.
func InterfaceTo(addr netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil {
		return "", fmt.Errorf("look up route to %v: %w", addr, err)
	}
	for _, route := range routes {
		if route.LinkIndex != 0 {
			link, err := netlink.LinkByIndex(route.LinkIndex)
			if err != nil {
				return "", fmt.Errorf("look up interface to %v: %w", addr, err)
			}
			return link.Attrs().Name, nil
		}
	}
	return "", fmt.Errorf("look up route to %v: it leads through no interface", addr)
}
