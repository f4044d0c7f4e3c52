package udp

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// none is no descriptor.
const none = -1

// Lengths of the queues of arrived datagrams, in bytes as the kernel counts them. Memory
// is taken only for what waits. A listener serves all clients; at 1 Gb/s the queue of a
// session holds what comes in 4 ms, which is more than the loop is away.
const (
	listenerQueue = 4 << 20
	sessionQueue  = 1 << 20
)

// option is a socket option with a number as its value.
type option struct {
	name         string
	level, which int
	value        int
}

// familyOf is the address family of an address.
func familyOf(address netip.Addr) int {
	if address.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// byFamily picks an option's form for IPv4 or IPv6.
func byFamily(family int, four, six option) option {
	if family == unix.AF_INET {
		return four
	}
	return six
}

// transparent lets a socket have addresses that are not this host's.
func transparent(family int) option {
	return byFamily(family,
		option{"IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1},
		option{"IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1})
}

// open returns a non-blocking socket with the options, bound to an address unless that is
// invalid. The error says which step failed.
func open(family int, mark uint32, at netip.AddrPort, options ...option) (socket int, err error) {
	socket, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
	if err != nil {
		return none, os.NewSyscallError("socket", err)
	}
	if mark != 0 {
		options = append(options, option{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(mark)})
	}
	if family == unix.AF_INET6 {
		options = append(options, option{"IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 1})
	}
	for _, o := range options {
		if err = unix.SetsockoptInt(socket, o.level, o.which, o.value); err != nil {
			err = fmt.Errorf("set %s: %w", o.name, err)
			break
		}
	}
	if err == nil && at.IsValid() {
		err = os.NewSyscallError("bind", unix.Bind(socket, unixSockaddr(at)))
	}
	if err != nil {
		unix.Close(socket)
		return none, err
	}
	return socket, nil
}

func unixSockaddr(address netip.AddrPort) unix.Sockaddr {
	if address.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}
	}
	return &unix.SockaddrInet6{Addr: address.Addr().As16(), Port: int(address.Port())}
}

// lengthen sets how much may wait in a socket, in bytes: whatever net.core.rmem_max says where
// that is allowed, which it is not in user namespaces. A shorter queue loses bursts, no more.
func lengthen(socket, bytes int) {
	if unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bytes) != nil {
		unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUF, bytes)
	}
}

// listen opens a socket to which the kernel delivers captured datagrams
// (Documentation/networking/tproxy.rst), with the address that they were sent to. No other
// socket may have its port, so that a second instance is noticed.
func listen(address netip.AddrPort, mark uint32) (socket int, err error) {
	family := familyOf(address.Addr())
	socket, err = open(family, mark, address, transparent(family), byFamily(family,
		option{"IP_RECVORIGDSTADDR", unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1},
		option{"IPV6_RECVORIGDSTADDR", unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1}))
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return none, fmt.Errorf("listen on %s for UDP: the port is taken: choose another with --tcp-proxy-listen", address)
	case errors.Is(err, unix.EPERM):
		return none, fmt.Errorf("listen on %s for UDP: transparent sockets need CAP_NET_ADMIN: run it as root", address)
	case err != nil:
		return none, fmt.Errorf("listen on %s for UDP: %w", address, err)
	}
	lengthen(socket, listenerQueue)
	return socket, nil
}

// openReply opens a socket from which replies leave as if they came from an address.
func openReply(from netip.AddrPort, mark uint32) (socket int, err error) {
	family := familyOf(from.Addr())
	return open(family, mark, from, transparent(family),
		option{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		// Nothing is read from it: see the package's comment.
		option{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, 0},
		byFamily(family,
			option{"IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_OMIT},
			option{"IPV6_MTU_DISCOVER", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_OMIT}))
}

// openSession opens a socket of a session's own, with the errors that the way reports.
func openSession(family int, mark uint32, at netip.AddrPort) (socket int, err error) {
	socket, err = open(family, mark, at,
		byFamily(family,
			option{"IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_WANT},
			option{"IPV6_MTU_DISCOVER", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_WANT}),
		byFamily(family,
			option{"IP_RECVERR", unix.SOL_IP, unix.IP_RECVERR, 1},
			option{"IPV6_RECVERR", unix.SOL_IPV6, unix.IPV6_RECVERR, 1}))
	if err == nil {
		lengthen(socket, sessionQueue)
	}
	return socket, err
}

// openRelay opens a socket that is connected to a proxy's relay, so that the kernel lets
// in what comes from there alone. It has the address from which the proxy was reached,
// where that is of the relay's family.
func openRelay(local netip.Addr, relay netip.AddrPort, mark uint32) (socket int, err error) {
	family := familyOf(relay.Addr())
	var at netip.AddrPort
	if familyOf(local) == family && local.Zone() == "" {
		at = netip.AddrPortFrom(local, 0)
	}
	if socket, err = openSession(family, mark, at); err != nil {
		return none, err
	}
	to := unixSockaddr(relay)
	if six, ok := to.(*unix.SockaddrInet6); ok {
		if six.ZoneId, err = scope(relay.Addr()); err != nil {
			unix.Close(socket)
			return none, err
		}
	}
	if err := unix.Connect(socket, to); err != nil {
		unix.Close(socket)
		return none, fmt.Errorf("connect to the relay %s: %w", relay, err)
	}
	return socket, nil
}

// scope is the number of the interface that is an address' zone.
func scope(of netip.Addr) (uint32, error) {
	zone := of.Zone()
	if zone == "" {
		return 0, nil
	}
	if number, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(number), nil
	}
	link, err := net.InterfaceByName(zone)
	if err != nil {
		return 0, fmt.Errorf("zone %q is no interface of this host", zone)
	}
	return uint32(link.Index), nil
}
