package netfilter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lab is a client, its gateway and a host beyond:
//
//	client lan0 ---- router ---- lan0 gateway wan0 ---- wan0 origin
//
// The router is there for TestPathMTU, and as a host that is no client.
type lab struct {
	t                               *testing.T
	client, router, gateway, origin *netns.NS
}

func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{t, newNS(t), newNS(t), newNS(t), newNS(t)}
	for _, step := range []func() error{
		func() error { return netns.Connect(l.client, "lan0", l.router, "down0") },
		func() error { return netns.Connect(l.router, "up0", l.gateway, "lan0") },
		func() error { return netns.Connect(l.gateway, "wan0", l.origin, "wan0") },
		func() error { return l.client.Addr("lan0", "10.1.0.2/24", "10.1.0.3/24", "fd01::2/64") },
		func() error { return l.router.Addr("down0", "10.1.0.1/24", "fd01::1/64") },
		func() error { return l.router.Addr("up0", "10.2.0.2/24", "fd02::2/64") },
		func() error { return l.gateway.Addr("lan0", "10.2.0.1/24", "fd02::1/64") },
		func() error { return l.gateway.Addr("wan0", "192.0.2.1/24", "2001:db8::1/64") },
		func() error { return l.origin.Addr("wan0", "192.0.2.2/24", "2001:db8::2/64") },
		func() error { return l.client.Route("0.0.0.0/0", "10.1.0.1") },
		func() error { return l.client.Route("::/0", "fd01::1") },
		func() error { return l.router.Route("0.0.0.0/0", "10.2.0.1") },
		func() error { return l.router.Route("::/0", "fd02::1") },
		func() error { return l.gateway.Route("10.1.0.0/24", "10.2.0.2") },
		func() error { return l.gateway.Route("fd01::/64", "fd02::2") },
		// Bypassed destinations, besides those of the wan0 network.
		func() error { return l.gateway.Route("198.51.100.0/24", "192.0.2.2") },
		func() error { return l.gateway.Route("2001:db8:51::/48", "2001:db8::2") },
		func() error { return l.origin.Local("198.51.100.0/24") },
		func() error { return l.origin.Local("2001:db8:51::/48") },
		func() error { return l.origin.Route("0.0.0.0/0", "192.0.2.1") },
		func() error { return l.origin.Route("::/0", "2001:db8::1") },
		func() error { return l.gateway.Do(deliverMarked) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range []*netns.NS{l.router, l.gateway} {
		for _, key := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
			if err := ns.Sysctl(key, "1"); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Early demultiplexing would hide rules that are missing.
	if err := l.gateway.Sysctl("net.ipv4.tcp_early_demux", "0"); err != nil {
		t.Fatal(err)
	}
	for _, port := range []string{"80", "443", "5000"} {
		serve(t, l.origin, "[::]:"+port, "origin")
		serve(t, l.gateway, "[::]:"+port, "gateway")
		serve(t, l.client, "[::]:"+port, "client")
	}
	return l
}

// deliverMarked is what policy routing does for this package.
func deliverMarked() error {
	c := testConfig()
	const routingTable = 4219
	for _, destination := range []string{"0.0.0.0/0", "::/0"} {
		_, everywhere, err := net.ParseCIDR(destination)
		if err != nil {
			return err
		}
		family := netlink.FAMILY_V4
		if len(everywhere.Mask) == net.IPv6len {
			family = netlink.FAMILY_V6
		}
		route := &netlink.Route{Family: family, Dst: everywhere, LinkIndex: 1, Table: routingTable, Type: unix.RTN_LOCAL}
		if family == netlink.FAMILY_V4 {
			route.Scope = netlink.SCOPE_HOST
		}
		rule := netlink.NewRule()
		rule.Family, rule.Mark, rule.Mask, rule.Table = family, c.LAN, &c.Mask, routingTable
		if err := errors.Join(netlink.RouteReplace(route), netlink.RuleAdd(rule)); err != nil {
			return err
		}
	}
	return nil
}

// serve answers each connection with its name and the connection's local address, and then echoes.
func serve(t *testing.T, ns *netns.NS, address, name string) net.Listener {
	t.Helper()
	var listener net.Listener
	err := ns.Do(func() (err error) {
		config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			if name != "captured" && name != "dns" {
				return nil
			}
			return setTransparent(raw, address)
		}}
		config.SetMultipathTCP(false)
		listener, err = config.Listen(context.Background(), "tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				// The client's end cannot be heard once the rules have gone that brought it here.
				defer context.AfterFunc(t.Context(), func() { conn.Close() })()
				fmt.Fprintf(conn, "%s %s\n", name, conn.LocalAddr())
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return listener
}

func setTransparent(raw syscall.RawConn, address string) (err error) {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if strings.HasPrefix(address, "[") {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	return errors.Join(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }), err)
}

// capture starts the transparent listeners.
func (l *lab) capture() []net.Listener {
	l.t.Helper()
	var listeners []net.Listener
	for _, address := range testConfig().Listen {
		listeners = append(listeners, serve(l.t, l.gateway, address.String(), "captured"))
	}
	return listeners
}

// open is Open on the gateway.
func (l *lab) open() *Handle {
	l.t.Helper()
	var h *Handle
	if err := l.gateway.Do(func() error { h = mustOpen(l.t); return nil }); err != nil {
		l.t.Fatal(err)
	}
	return h
}

// dial connects and returns who answers: captured, origin, gateway or client if that has the address asked for, else what
// went wrong.
func (l *lab) dial(from *netns.NS, address string) (net.Conn, string) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	conn, err := from.Dial(ctx, "tcp", address)
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, "refused"
	case err != nil:
		return nil, err.Error()
	}
	l.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := readLine(conn)
	if err != nil {
		return nil, err.Error()
	}
	name, asked, _ := strings.Cut(line, " ")
	if asked != address {
		return nil, line
	}
	return conn, name
}

// readLine reads no byte behind the line.
func readLine(conn net.Conn) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := conn.Read(b); err != nil || b[0] == '\n' {
			return string(line), err
		}
		line = append(line, b[0])
	}
}

func (l *lab) want(from *netns.NS, address, want string) net.Conn {
	l.t.Helper()
	conn, got := l.dial(from, address)
	if got != want {
		l.t.Errorf("%s was answered: %s; want %s", address, got, want)
	}
	return conn
}

// echo fails unless the connection, if there is one, carries bytes both ways.
func (l *lab) echo(conn net.Conn, size int) {
	l.t.Helper()
	if conn == nil {
		return // want has said so
	}
	sent := bytes.Repeat([]byte("0123456789abcdef"), size/16)
	go func() { _, _ = conn.Write(sent) }()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
		l.t.Errorf("echo from %v: %v", conn.RemoteAddr(), err)
	}
}

// addRoute completes the route and replaces the one there is.
func addRoute(route netlink.Route, destination, via string) (err error) {
	if _, route.Dst, err = net.ParseCIDR(destination); err != nil {
		return err
	}
	route.Gw = net.ParseIP(via)
	return netlink.RouteReplace(&route)
}
