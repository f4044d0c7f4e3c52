package tproxy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// backlog is how many connections may wait to be accepted; the kernel lowers it to
// net.core.somaxconn (listen(2)).
const backlog = 65535

// listenTransparent opens a socket to which the kernel's tproxy statement delivers
// captured connections (Documentation/networking/tproxy.rst). The caller closes it.
func listenTransparent(address netip.AddrPort, mark uint32, shared bool) (socket int, err error) {
	family, sockaddr := unix.AF_INET, unix.Sockaddr(nil)
	if address.Addr().Is6() {
		family = unix.AF_INET6
		sockaddr = &unix.SockaddrInet6{Addr: address.Addr().As16(), Port: int(address.Port())}
	} else {
		sockaddr = &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())}
	}
	socket, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return 0, fmt.Errorf("listen on %s: %w", address, os.NewSyscallError("socket", err))
	}
	err = setTransparent(socket, family, shared)
	if err == nil {
		err = setMark(socket, mark)
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(socket, sockaddr))
	}
	if err == nil {
		err = os.NewSyscallError("listen", unix.Listen(socket, backlog))
	}
	if err == nil {
		return socket, nil
	}
	unix.Close(socket)
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return 0, fmt.Errorf("listen on %s: the port is taken: choose another with --tcp-proxy-listen", address)
	case errors.Is(err, unix.EPERM):
		return 0, fmt.Errorf("listen on %s: transparent sockets need CAP_NET_ADMIN: run it as root", address)
	}
	return 0, fmt.Errorf("listen on %s: %w", address, err)
}

// setTransparent lets a socket take connections to every address. shared lets
// several sockets of this process have the same port, one for each loop.
func setTransparent(socket, family int, shared bool) error {
	options := []option{{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}}
	if family == unix.AF_INET6 {
		options = append(options,
			option{"IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 1},
			option{"IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1})
	} else {
		options = append(options, option{"IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1})
	}
	if shared {
		options = append(options, option{"SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT, 1})
	}
	return setOptions(socket, options)
}

// setMark puts the bypass mark on a socket, so that no rule captures what the
// gateway sends itself. Accepted sockets inherit it.
func setMark(socket int, mark uint32) error {
	return setOptions(socket, []option{{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(mark)}})
}

// option is a socket option with a number as its value.
type option struct {
	name         string
	level, which int
	value        int
}

func setOptions(socket int, options []option) error {
	for _, o := range options {
		if err := unix.SetsockoptInt(socket, o.level, o.which, o.value); err != nil {
			return fmt.Errorf("set %s: %w", o.name, err)
		}
	}
	return nil
}
