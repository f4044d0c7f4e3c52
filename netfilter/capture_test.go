package netfilter

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
	"github.com/vishvananda/netlink"
)

func TestCapture(t *testing.T) {
	l := newLab(t)
	l.capture()
	h := l.open()
	l.want(l.client, "192.0.2.2:80", "origin")
	mustApply(t, h, testConfig())

	for _, test := range []struct{ address, want string }{
		{"192.0.2.2:80", "captured"},
		{"[2001:db8::2]:80", "captured"},
		{"192.0.2.2:443", "captured"},
		{"203.0.113.1:443", "captured"}, // no route but through the proxy
		{"[2001:db8:113::1]:443", "captured"},
		{"192.0.2.2:5000", "origin"},
		{"[2001:db8::2]:5000", "origin"},
		{"198.51.100.7:80", "origin"}, // bypassed
		{"[2001:db8:51::7]:80", "origin"},
		{"10.2.0.1:80", "gateway"}, // its own addresses
		{"[fd02::1]:80", "gateway"},
		{"192.0.2.1:80", "gateway"},
		{"[2001:db8::1]:80", "gateway"},
	} {
		l.want(l.client, test.address, test.want)
	}
	l.want(l.router, "192.0.2.2:80", "origin") // no client
	l.want(l.router, "[2001:db8::2]:80", "origin")
	l.want(l.gateway, "192.0.2.2:80", "origin")
	for _, address := range []string{"10.1.0.2:80", "[fd01::2]:80"} {
		l.want(l.origin, address, "client") // and the client's answers, whatever port they go to
	}
}

func TestInboundConnections(t *testing.T) {
	for _, failClosed := range []bool{false, true} {
		l := newLab(t)
		l.capture()
		h := l.open()
		c := testConfig()
		c.Ports = []PortRange{{0, 65535}}
		c.FailClosed = failClosed
		mustApply(t, h, c)
		kept := l.want(l.origin, "10.1.0.2:80", "client")
		l.echo(kept, 1<<16)
		l.echo(l.want(l.origin, "[fd01::2]:80", "client"), 1<<16)

		// The guard that is left does not cut them.
		die(t, h)
		l.echo(kept, 1<<16)
		l.want(l.origin, "10.1.0.2:443", "client")
	}
}

// TestPathMTU sends to a client whose segments may be larger than what the router forwards.
func TestPathMTU(t *testing.T) {
	const (
		mtu = 1300 // bytes; IPv6 demands 1280 (RFC 8200, section 5)
		mss = 1400
	)
	l := newLab(t)
	l.capture()
	shrink := func(name string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(link, mtu)
	}
	if err := errors.Join(
		l.router.Do(func() error { return shrink("down0") }),
		l.client.Do(func() error {
			return errors.Join(shrink("lan0"), addRoute(netlink.Route{AdvMSS: mss}, "203.0.113.0/24", "10.1.0.1"),
				addRoute(netlink.Route{AdvMSS: mss}, "2001:db8:113::/48", "fd01::1"))
		}),
	); err != nil {
		t.Fatal(err)
	}
	h := l.open()
	mustApply(t, h, testConfig())
	for _, address := range []string{"203.0.113.1:80", "[2001:db8:113::1]:80"} {
		l.echo(l.want(l.client, address, "captured"), 1<<18)
	}
}

func TestApplyAndDrainKeepFlows(t *testing.T) {
	l := newLab(t)
	listeners := l.capture()
	h := l.open()
	mustApply(t, h, testConfig())
	flows := []net.Conn{l.want(l.client, "192.0.2.2:80", "captured"), l.want(l.client, "[2001:db8::2]:80", "captured")}
	echoes := func() {
		t.Helper()
		for _, flow := range flows {
			l.echo(flow, 1<<16)
		}
	}

	c := testConfig()
	c.Ports = []PortRange{{443, 443}}
	c.Clients = prefixes("10.1.0.3/32")
	mustApply(t, h, c)
	echoes()
	l.want(l.client, "192.0.2.2:80", "origin")

	for _, failClosed := range []bool{false, true} {
		c := testConfig()
		c.FailClosed = failClosed
		mustApply(t, h, c)
		if err := h.Drain(); err != nil {
			t.Fatal(err)
		}
		echoes()
		for _, address := range []string{"192.0.2.2:80", "[2001:db8::2]:80"} {
			l.want(l.client, address, map[bool]string{false: "origin", true: "refused"}[failClosed])
		}
		l.want(l.client, "192.0.2.2:5000", "origin")
	}

	mustApply(t, h, testConfig())
	l.want(l.client, "192.0.2.2:80", "captured")
	for _, listener := range listeners {
		listener.Close()
	}
	echoes()
	l.want(l.client, "192.0.2.2:80", "origin")
	l.want(l.client, "[2001:db8::2]:80", "origin")
	c = testConfig()
	c.FailClosed = true
	mustApply(t, h, c)
	echoes()
	l.want(l.client, "192.0.2.2:80", "refused")
	l.want(l.client, "[2001:db8::2]:80", "refused")
	l.want(l.client, "192.0.2.2:5000", "origin")
}

func TestGuard(t *testing.T) {
	l := newLab(t)
	l.capture()
	h := l.open()
	c := testConfig()
	c.FailClosed = true
	mustApply(t, h, c)
	passing := []string{"192.0.2.2:5000", "[2001:db8::2]:5000", "198.51.100.7:80", "[2001:db8:51::7]:80", "10.2.0.1:80"}
	pass := func() {
		t.Helper()
		for _, address := range passing {
			want := "origin"
			if strings.HasPrefix(address, "10.2.") {
				want = "gateway"
			}
			l.want(l.client, address, want)
		}
		l.want(l.origin, "10.1.0.2:80", "client")
		l.want(l.router, "192.0.2.2:80", "origin")
	}
	guarded := func(want string) {
		t.Helper()
		l.want(l.client, "192.0.2.2:80", want)
		l.want(l.client, "[2001:db8::2]:80", want)
		pass()
	}
	guarded("captured")
	die(t, h)
	guarded("refused")

	h = l.open()
	guarded("refused")
	mustApply(t, h, c)
	guarded("captured")
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	guarded("origin")
}

// TestAskedPastUs has a server behind the gateway whose clients' packets do not come through it: it sees half a flow,
// which must pass whatever is captured, and beside the guard unless its port is captured.
func TestAskedPastUs(t *testing.T) {
	for _, failClosed := range []bool{false, true} {
		l := newLab(t)
		if err := errors.Join(
			netns.Connect(l.origin, "past0", l.client, "past0"),
			l.origin.Addr("past0", "10.9.0.1/24", "fd09::1/64"),
			l.client.Addr("past0", "10.9.0.2/24", "fd09::2/64"),
			l.origin.Do(func() error {
				// Asked from the address on past0, the client would answer directly.
				return errors.Join(
					addRoute(netlink.Route{Src: net.ParseIP("192.0.2.2")}, "10.1.0.0/24", "10.9.0.2"),
					addRoute(netlink.Route{Src: net.ParseIP("2001:db8::2")}, "fd01::/64", "fd09::2"))
			}),
		); err != nil {
			t.Fatal(err)
		}
		for _, ns := range []*netns.NS{l.client, l.origin} {
			for _, name := range []string{"all", "past0", "lan0", "wan0"} {
				_ = ns.Sysctl("net.ipv4.conf."+name+".rp_filter", "0") // not each has each interface
			}
		}
		l.capture()
		h := l.open()
		c := testConfig()
		c.FailClosed = failClosed
		if !failClosed {
			c.Ports = []PortRange{{0, 65535}}
		}
		mustApply(t, h, c)
		for _, address := range []string{"10.1.0.2:80", "[fd01::2]:80"} {
			if conn := l.want(l.origin, address, "client"); conn != nil {
				if local := netip.MustParseAddrPort(conn.LocalAddr().String()).Addr(); local.String() != "192.0.2.2" && local.String() != "2001:db8::2" {
					t.Fatalf("asked from %v, whom the client answers directly", local)
				}
				l.echo(conn, 1<<16)
			}
		}
	}
}
