package tproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// keepAlive probes a silent peer after this time, so that a client or an
// upstream that vanished without a word ends its flow long before the idle limit.
// The figure is below the 5 minutes after which common firewalls forget a flow.
const (
	keepAliveIdle     = 2 * time.Minute
	keepAliveInterval = 30 * time.Second
)

// listenTransparent opens the socket to which the kernel's tproxy statement
// delivers captured connections (Documentation/networking/tproxy.rst).
//
// All options that an accepted socket inherits are set here, once, instead of
// with a system call a connection: the mark, the linger time and keep-alive.
func listenTransparent(ctx context.Context, address netip.AddrPort, mark uint32) (*net.TCPListener, error) {
	config := net.ListenConfig{
		// Accepted sockets inherit what control sets.
		KeepAlive: -1,
		Control: func(_, _ string, raw syscall.RawConn) error {
			var failure error
			if err := raw.Control(func(fd uintptr) {
				failure = setTransparent(int(fd), address.Addr().Is6(), mark)
			}); err != nil {
				return err
			}
			return failure
		},
	}
	config.SetMultipathTCP(false) // an MPTCP socket cannot be spliced as cheaply, and no upstream asks for it

	network := "tcp4"
	if address.Addr().Is6() {
		network = "tcp6"
	}
	listener, err := config.Listen(ctx, network, address.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: the port is taken: choose another with --tcp-proxy-listen", address)
	}
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("listen on %s: transparent sockets need CAP_NET_ADMIN: run it with sudo", address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return listener.(*net.TCPListener), nil
}

func setTransparent(fd int, ipv6 bool, mark uint32) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if ipv6 {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("set IP_TRANSPARENT: %w", err)
	}
	// While a session runs its end is a reset: if this program is killed, a
	// client must see a failure and not a clean FIN that makes half a download
	// look like a whole one. An orderly end clears it (see relay).
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 0}); err != nil {
		return fmt.Errorf("set SO_LINGER: %w", err)
	}
	if err := setKeepAlive(fd); err != nil {
		return err
	}
	return setMark(fd, mark)
}

// setKeepAlive is inherited by accepted sockets. TCP_USER_TIMEOUT is left alone:
// it would end a download that its reader merely paused, and switch off the probe
// count of keep-alive (tcp(7)).
func setKeepAlive(fd int) error {
	for _, option := range []struct {
		name         string
		level, which int
		value        int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, int(keepAliveIdle / time.Second)},
		{"TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL, int(keepAliveInterval / time.Second)},
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.which, option.value); err != nil {
			return fmt.Errorf("set %s: %w", option.name, err)
		}
	}
	return nil
}

// setMark puts the bypass mark on a socket, so that no rule captures what the
// gateway sends itself.
func setMark(fd int, mark uint32) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return fmt.Errorf("set SO_MARK: %w", err)
	}
	return nil
}
