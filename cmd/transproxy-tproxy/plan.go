package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
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

// bypassMark is that of this program's own sockets, 0 for none: where nothing is
// captured nothing needs one, nor the privilege to set it.
func (s *settings) bypassMark() uint32 {
	if s.http.only {
		return 0
	}
	return splitMask(s.mark).bypass
}

// listenTCP are the addresses of the transparent listeners for TCP.
func (s *settings) listenTCP(f families) []netip.AddrPort {
	if s.http.only {
		return nil
	}
	return f.loopback(s.listenPort)
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
	router    []routing.Setting // none without --gateway
	engine    engine
}

// newPlan works out a plan. It is made again whenever interfaces, addresses or
// default routes change.
func (s *settings) newPlan(f families, r roles, host routing.Host) (plan, error) {
	p := plan{capture: r.capture(host), clients: s.clients}
	if len(p.clients) == 0 {
		p.clients = p.capture.networks
	}
	p.engine = s.newEngine(p.capture, host)
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
		Listen:     f.loopback(s.listenPort),
		Steered:    p.engine.lookup,
		Interfaces: s.interfaces,
		Uplinks:    p.capture.uplinks,
		Clients:    p.clients,
		Neighbours: p.capture.networks,
		Bypass:     slices.Concat(s.noProxy.Prefixes(), hosts(s.upstreamAddresses())),
		Ports:      slices.Concat(s.ports, s.http.ports),
		Router:     s.router,
		FailClosed: s.failClosed,

		GuardClients: s.clients,
	}
	p.netfilter.RefusedUDP, p.netfilter.DroppedUDP, p.netfilter.CapturedUDP = s.udpPorts()
	if s.output.on {
		p.netfilter.Output = netfilter.Output{
			Mark: m.local, Users: s.output.users, Groups: s.output.groups, Cgroups: s.output.cgroups,
		}
	}
	if listen := s.listenDNS(f); len(listen) > 0 {
		p.netfilter.DNS = netfilter.DNS{Listen: listen, UDP: s.dns.udp, TCP: s.dns.tcp}
	}
	if s.dns.fake {
		p.netfilter.Always = s.dns.fakeRange
	}
	if s.router {
		settings, err := routing.RouterSettings(host, p.capture.interfaces, f.ipv6)
		if err != nil {
			return plan{}, err
		}
		p.router = settings
	}
	return p, nil
}

// parametersFile is where the former values of the kernel's parameters are kept.
func (s *settings) parametersFile() string { return filepath.Join(s.state, s.nftTable+".sysctl.json") }

// openingsFile is where it is kept what firewalld lets pass for us.
func (s *settings) openingsFile() string {
	return filepath.Join(s.state, s.nftTable+".firewalld.json")
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

// loopback are the addresses of the transparent listeners on a port.
func (f families) loopback(port uint16) []netip.AddrPort {
	var addresses []netip.AddrPort
	if f.ipv4 {
		addresses = append(addresses, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
	}
	if f.ipv6 {
		addresses = append(addresses, netip.AddrPortFrom(netip.IPv6Loopback(), port))
	}
	return addresses
}

// usable are the addresses that do not stand for all of a family that there is not.
func (f families) usable(addresses []netip.AddrPort) []netip.AddrPort {
	return slices.DeleteFunc(slices.Clone(addresses), func(address netip.AddrPort) bool {
		return address.Addr().IsUnspecified() && (address.Addr().Is4() && !f.ipv4 || address.Addr().Is6() && !f.ipv6)
	})
}

// groups are the groups of upstreams in use.
func (s *settings) groups() []*upstream.Group {
	return slices.DeleteFunc([]*upstream.Group{s.upstream, s.httpUpstream}, func(g *upstream.Group) bool { return g == nil })
}

// upstreams are the proxies in use, each once.
func (s *settings) upstreams() []*upstream.Proxy {
	return append(s.configured(), s.script.named()...)
}

// upstreamText is what carries traffic, without credentials.
func (s *settings) upstreamText() string {
	switch {
	case s.script == nil:
		return s.upstream.String()
	case s.upstream == nil:
		return "by the PAC script"
	}
	return "by the PAC script, else " + s.upstream.String()
}

// configured are those that the settings name.
func (s *settings) configured() []*upstream.Proxy {
	var all []*upstream.Proxy
	for _, group := range s.groups() {
		all = append(all, group.Proxies()...)
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

// Descriptors that are not a flow's: the standard ones, listeners, netlink, log, name
// look-ups, the 128 connections to a proxy that wait for HTTP requests, and the 32 opened ahead.
const descriptorsReserved = 64 + 128 + 32

// pipeLimit bounds the pipes for bulk data. Each holds up to 1 MiB while in use, so
// that all of them take 256 MiB at worst. More flows than that in full flight share
// the line anyway; the others read and write.
const pipeLimit = 256

// capacity is what fits under a limit of open files.
type capacity struct {
	flows   int // two sockets each
	pipes   int // two descriptors each
	queries int // DNS questions being asked, of a socket each; 0 without DNS

	connections int // of DNS over TCP, of each listener

	// Of UDP that the upstream carries: clients' ports, of two descriptors each, and sockets from which replies leave. 0
	// without any.
	sessions, replies int
}

// queryLimit bounds the DNS questions that are being asked at once: at 100 ms each,
// 10,000 a second. While nobody answers, each of them takes some 10 KiB.
const queryLimit = 1000

// connectionLimit bounds the connections of DNS over TCP of a listener, and dnsListeners
// is how many are usual: a transparent and an ordinary one a family.
const (
	connectionLimit = 500
	dnsListeners    = 4
)

// sessionLimit bounds the clients' ports whose UDP is carried: as many as one address of
// this host has ports towards a relay.
const sessionLimit = 1 << 16

func newCapacity(descriptors int, dns, udp bool) capacity {
	// At a low limit, an eighth for pipes is a flow in four with a pipe each way.
	c := capacity{pipes: min(pipeLimit, descriptors/8/2)}
	if dns {
		c.queries = max(1, min(queryLimit, descriptors/8))
		c.connections = max(1, min(connectionLimit, descriptors/64))
	}
	if udp {
		c.sessions = max(1, min(sessionLimit, descriptors/16))
		c.replies = c.sessions
	}
	c.flows = max(1, (descriptors-descriptorsReserved-2*c.pipes-c.queries-dnsListeners*c.connections-2*c.sessions-c.replies)/2)
	return c
}

// raiseFileLimit raises the limit of open files to what the administrator allows,
// and returns what fits under it.
func raiseFileLimit(dns, udp bool) (capacity, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return capacity{}, fmt.Errorf("read the limit of open files: %w", err)
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return capacity{}, fmt.Errorf("raise the limit of open files to %d: %w", limit.Max, err)
	}
	return newCapacity(int(min(limit.Cur, 1<<30)), dns, udp), nil
}
