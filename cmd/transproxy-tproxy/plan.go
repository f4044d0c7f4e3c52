package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Tag of our rules and routes in the kernel's lists (rtm_protocol, rtnetlink(7)):
// what carries it is ours to sweep.
const routeProtocol = 219

// marks are the three values under the mask, from its lowest bit to its highest.
// They share a mask so that other programs' bits of the mark are never touched.
type marks struct {
	mask   uint32
	lan    uint32 // captured packets of clients
	local  uint32 // captured packets of the gateway's own programs
	bypass uint32 // every socket of this program
}

func splitMask(mask uint32) marks {
	m := marks{mask: mask}
	m.lan = mask & -mask
	rest := mask &^ m.lan
	m.local = rest & -rest
	m.bypass = rest &^ m.local
	return m
}

// families are the IP versions that this host speaks on loopback, where the
// listeners are.
type families struct{ ipv4, ipv6 bool }

// lookFamilies finds the families by trying: a kernel without IPv6, and one where
// it is switched off, fail alike.
func lookFamilies() (families, error) {
	var found families
	for _, family := range []struct {
		address string
		present *bool
	}{{"127.0.0.1:0", &found.ipv4}, {"[::1]:0", &found.ipv6}} {
		socket, err := net.ListenPacket("udp", family.address)
		if err == nil {
			*family.present = true
			socket.Close()
		} else if !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EAFNOSUPPORT) {
			return found, err
		}
	}
	if !found.ipv4 && !found.ipv6 {
		return found, errors.New("neither 127.0.0.1 nor ::1 can be used: bring loopback up with `ip link set lo up`")
	}
	return found, nil
}

// listen are the addresses of the transparent listeners.
func (s *settings) listen(f families) []netip.AddrPort {
	var addresses []netip.AddrPort
	if f.ipv4 {
		addresses = append(addresses, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), s.listenPort))
	}
	if f.ipv6 {
		addresses = append(addresses, netip.AddrPortFrom(netip.IPv6Loopback(), s.listenPort))
	}
	return addresses
}

// routing is what the settings ask of the package routing.
func (s *settings) routing(f families) routing.Config {
	m := splitMask(s.mark)
	return routing.Config{
		Table: s.table, Priority: s.rulePriority, Protocol: routeProtocol,
		Mask: m.mask, LAN: m.lan, Local: m.local,
		IPv4: f.ipv4, IPv6: f.ipv6,
	}
}

// netfilter is what the settings ask of the package netfilter on this host. It
// is worked out again whenever interfaces, addresses or default routes change.
func (s *settings) netfilter(f families, host routing.Host) netfilter.Config {
	m, capture := splitMask(s.mark), s.capture(host)
	config := netfilter.Config{
		Table:      s.nftTable,
		Mask:       m.mask,
		LAN:        m.lan,
		Exempt:     m.bypass,
		Listen:     s.listen(f),
		Interfaces: s.interfaces,
		Clients:    s.clients,
		Bypass:     slices.Concat(s.noProxy.Prefixes(), s.upstreamPrefixes(), capture.networks),
		Ports:      s.ports,
		FailClosed: s.failClosed,
	}
	if len(s.interfaces) == 0 {
		config.Uplinks = capture.uplinks
	}
	if len(s.clients) == 0 {
		config.Clients = capture.networks
	}
	return config
}

// capture is what the settings mean for the interfaces that there are now.
type capture struct {
	interfaces []string       // the capturing ones
	networks   []netip.Prefix // connected to them
	uplinks    []string       // excluded; none on a one-armed gateway, whose only card is both
}

// capture works out which interfaces capture. Without --interface these are all but
// the uplinks: a stranger on the uplink must not be lent the proxy's credentials.
// The uplinks are the interfaces of the default routes; a host without one has the
// interface that leads to the proxy.
func (s *settings) capture(host routing.Host) capture {
	var found capture
	if found.uplinks = host.Uplinks; len(found.uplinks) == 0 {
		for _, prefix := range s.upstreamPrefixes() {
			if name, err := routing.InterfaceTo(prefix.Addr()); err == nil {
				found.uplinks = append(found.uplinks, name)
			}
		}
	}
	wanted := func(name string) bool {
		if len(s.interfaces) > 0 {
			return slices.Contains(s.interfaces, name)
		}
		return !slices.Contains(found.uplinks, name)
	}
	found.add(host, wanted)
	if len(s.interfaces) == 0 && len(found.networks) == 0 {
		found = capture{}
		found.add(host, func(string) bool { return true })
	}
	return found
}

func (c *capture) add(host routing.Host, wanted func(name string) bool) {
	for _, link := range host.Interfaces {
		if !link.Loopback && wanted(link.Name) {
			c.interfaces = append(c.interfaces, link.Name)
			c.networks = append(c.networks, link.Prefixes...)
		}
	}
}

// upstreams are the proxies in use, each once.
func (s *settings) upstreams() []*upstream.Proxy {
	if s.httpUpstream == nil {
		return []*upstream.Proxy{s.upstream}
	}
	return []*upstream.Proxy{s.upstream, s.httpUpstream}
}

// upstreamPrefixes are the upstreams that were given by address: a client that
// does have proxy settings reaches them as before.
func (s *settings) upstreamPrefixes() []netip.Prefix {
	var prefixes []netip.Prefix
	for _, proxy := range s.upstreams() {
		if address, err := netip.ParseAddr(proxy.Host()); err == nil {
			address = address.Unmap().WithZone("")
			prefixes = append(prefixes, netip.PrefixFrom(address, address.BitLen()))
		}
	}
	return prefixes
}

// Descriptors that are not a flow's: the standard ones, listeners, netlink, log,
// name look-ups.
const descriptorsReserved = 64

// pipeLimit bounds the pipes for bulk data. Each holds up to 1 MiB while in use, so
// that all of them take 256 MiB at worst. More flows than that in full flight share
// the line anyway; the others read and write.
const pipeLimit = 256

// capacity is what fits under a limit of open files.
type capacity struct {
	flows int // two sockets each
	pipes int // two descriptors each
}

func newCapacity(descriptors int) capacity {
	// At a low limit, an eighth for pipes is a flow in four with a pipe each way.
	pipes := min(pipeLimit, descriptors/8/2)
	return capacity{flows: max(1, (descriptors-descriptorsReserved-2*pipes)/2), pipes: pipes}
}

// raiseFileLimit raises the limit of open files to what the administrator allows,
// and returns what fits under it.
func raiseFileLimit() (capacity, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return capacity{}, fmt.Errorf("read the limit of open files: %w", err)
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return capacity{}, fmt.Errorf("raise the limit of open files to %d: %w", limit.Max, err)
	}
	return newCapacity(int(min(limit.Cur, 1<<30))), nil
}
