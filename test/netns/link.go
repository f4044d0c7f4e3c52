package netns

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Connect lays a cable: a veth pair whose one end is a's interface aName and
// whose other end is b's interface bName, both up.
func Connect(a *NS, aName string, b *NS, bName string) error {
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: aName},
		PeerName:      bName,
		PeerNamespace: netlink.NsFd(b.file.Fd()),
	}
	if err := a.link.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth pair %s, %s: %w", aName, bName, err)
	}
	if err := a.Up(aName); err != nil {
		return err
	}
	return b.Up(bName)
}

// Bridge adds a bridge, up, and makes the named interfaces its ports: the
// namespace becomes a switch. The bridge has no address unless Addr adds one.
func (ns *NS) Bridge(name string, ports ...string) error {
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
	if err := ns.link.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	for _, port := range ports {
		link, err := ns.link.LinkByName(port)
		if err == nil {
			err = ns.link.LinkSetMaster(link, bridge)
		}
		if err != nil {
			return fmt.Errorf("make %s a port of %s: %w", port, name, err)
		}
	}
	return ns.Up(name)
}

// Up sets an interface up. Those of Connect and Bridge are up already.
func (ns *NS) Up(ifname string) error {
	link, err := ns.link.LinkByName(ifname)
	if err == nil {
		err = ns.link.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", ifname, err)
	}
	return nil
}

// Addr adds addresses with the length of their subnet, such as 192.0.2.1/24 or
// 2001:db8::1/64, to an interface. They can be used at once.
func (ns *NS) Addr(ifname string, prefixes ...string) error {
	link, err := ns.link.LinkByName(ifname)
	if err != nil {
		return fmt.Errorf("find %s: %w", ifname, err)
	}
	for _, prefix := range prefixes {
		address, err := netip.ParsePrefix(prefix)
		if err != nil {
			return fmt.Errorf("add address to %s: %w", ifname, err)
		}
		entry := &netlink.Addr{IPNet: ipNet(address)}
		if address.Addr().Is6() {
			entry.Flags = unix.IFA_F_NODAD
		}
		if err := ns.link.AddrAdd(link, entry); err != nil {
			return fmt.Errorf("add address %s to %s: %w", prefix, ifname, err)
		}
	}
	return nil
}

// Route sends what is for the prefix dst, such as 198.51.100.0/24 or ::/0, to
// the router via.
func (ns *NS) Route(dst, via string) error {
	prefix, err := netip.ParsePrefix(dst)
	if err != nil {
		return fmt.Errorf("add route: %w", err)
	}
	router, err := netip.ParseAddr(via)
	if err != nil {
		return fmt.Errorf("add route to %s: %w", dst, err)
	}
	if err := ns.link.RouteAdd(&netlink.Route{Dst: ipNet(prefix), Gw: router.AsSlice()}); err != nil {
		return fmt.Errorf("add route to %s via %s: %w", dst, via, err)
	}
	return nil
}

// Local makes every address of the prefix dst the namespace's own, so that
// listeners without an address of their own get what arrives for any of them.
func (ns *NS) Local(dst string) error {
	prefix, err := netip.ParsePrefix(dst)
	if err != nil {
		return fmt.Errorf("add local route: %w", err)
	}
	lo, err := ns.link.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	route := &netlink.Route{
		Dst: ipNet(prefix), LinkIndex: lo.Attrs().Index,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Table: unix.RT_TABLE_LOCAL,
	}
	if err := ns.link.RouteAdd(route); err != nil {
		return fmt.Errorf("add local route to %s: %w", dst, err)
	}
	return nil
}

// ipNet is the prefix, host bits included, in the form that netlink takes.
func ipNet(prefix netip.Prefix) *net.IPNet {
	address := prefix.Addr()
	return &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(prefix.Bits(), address.BitLen())}
}

// MTU sets the largest packet of an interface, in bytes.
func (ns *NS) MTU(ifname string, bytes int) error {
	link, err := ns.link.LinkByName(ifname)
	if err == nil {
		err = ns.link.LinkSetMTU(link, bytes)
	}
	if err != nil {
		return fmt.Errorf("set the MTU of %s: %w", ifname, err)
	}
	return nil
}
