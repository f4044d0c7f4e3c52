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

// plan is what the settings mean on this host, as it is now.
type plan struct {
	capture   capture
	clients   []netip.Prefix
	netfilter netfilter.Config
	routing   routing.Config
}

// newPlan works out a plan. It is made again whenever interfaces, addresses or
// default routes change.
func (s *settings) newPlan(f families, r roles, host routing.Host) plan {
	p := plan{capture: r.capture(host), clients: s.clients}
	if len(p.clients) == 0 {
		p.clients = p.capture.networks
	}
	m := splitMask(s.mark)
	p.routing = routing.Config{
		Table: s.table, Priority: s.rulePriority, Protocol: routeProtocol,
		Mask: m.mask, LAN: m.lan, Local: m.local,
		IPv4: f.ipv4, IPv6: f.ipv6,
	}
	p.netfilter = netfilter.Config{
		Table:      s.nftTable,
		Mask:       m.mask,
		LAN:        m.lan,
		Exempt:     m.bypass,
		Listen:     s.listen(f),
		Interfaces: s.interfaces,
		Uplinks:    p.capture.uplinks,
		Clients:    p.clients,
		// What neighbours say to one another is not ours to carry, even where a
		// bridge shows it to the rules (bridge-nf-call-iptables).
		Bypass:     slices.Concat(s.noProxy.Prefixes(), hosts(s.upstreamAddresses()), p.capture.networks),
		Ports:      s.ports,
		FailClosed: s.failClosed,
	}
	return p
}

// validate names the first value with which the kernel's part cannot work.
func (p plan) validate() error {
	err := p.routing.Validate()
	if err == nil {
		err = p.netfilter.Validate()
	}
	if err != nil {
		return usageError{err}
	}
	return nil
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

// upstreams are the proxies in use, each once.
func (s *settings) upstreams() []*upstream.Proxy {
	var all []*upstream.Proxy
	for _, proxy := range []*upstream.Proxy{s.upstream, s.httpUpstream} {
		if proxy != nil {
			all = append(all, proxy)
		}
	}
	return all
}

// upstreamAddresses are the upstreams that were given by address. A client that
// does have proxy settings reaches them as before.
func (s *settings) upstreamAddresses() []netip.Addr {
	var addresses []netip.Addr
	for _, proxy := range s.upstreams() {
		if address, err := netip.ParseAddr(proxy.Host()); err == nil {
			addresses = append(addresses, address.Unmap().WithZone(""))
		}
	}
	return addresses
}

// hosts are the prefixes of single addresses.
func hosts(addresses []netip.Addr) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, address := range addresses {
		prefixes = append(prefixes, netip.PrefixFrom(address, address.BitLen()))
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
