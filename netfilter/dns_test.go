package netfilter

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestDNS(t *testing.T) {
	l := newDNSLab(t)
	l.captureDNS()
	h := l.open()
	l.wantUDP(l.client, "192.0.2.2:53", "origin")
	mustApply(t, h, dnsConfig())

	for _, test := range []struct{ address, want string }{
		{"192.0.2.2:53", "dns"},
		{"[2001:db8::2]:53", "dns"},
		{"203.0.113.1:53", "dns"}, // no route but through the proxy
		{"[2001:db8:113::1]:53", "dns"},
		{"198.51.100.7:53", "dns"}, // bypassed
		{"[2001:db8:51::7]:53", "dns"},
		{"10.2.0.1:53", "gateway"}, // its own addresses
		{"[fd02::1]:53", "gateway"},
		{"192.0.2.1:53", "gateway"},
		{"[2001:db8::1]:53", "gateway"},
	} {
		l.wantUDP(l.client, test.address, test.want)
		l.want(l.client, test.address, test.want)
	}
	for _, host := range []string{"192.0.2.2", "[2001:db8::2]"} {
		l.wantUDP(l.client, host+":5000", "origin")
		l.want(l.client, host+":5000", "origin")
		l.want(l.client, host+":80", "captured")
		l.wantUDP(l.router, host+":53", "origin") // no client
		l.want(l.router, host+":53", "origin")
		l.wantUDP(l.gateway, host+":53", "origin")
	}
	l.want(l.client, "198.51.100.7:80", "origin")
}

func TestTransportsOfDNS(t *testing.T) {
	l := newDNSLab(t)
	l.captureDNS()
	h := l.open()
	for _, test := range []struct {
		udp, tcp, port   bool // port: TCP port 53 is captured like others
		wantUDP, wantTCP string
	}{
		{false, false, false, "origin", "origin"},
		{false, false, true, "origin", "captured"},
		{true, false, false, "dns", "origin"},
		{true, false, true, "dns", "captured"},
		{false, true, false, "origin", "dns"},
		{true, true, true, "dns", "dns"},
	} {
		c := dnsConfig()
		c.DNS.UDP, c.DNS.TCP = test.udp, test.tcp
		if test.port {
			c.Ports = append(c.Ports, PortRange{53, 53})
		}
		mustApply(t, h, c)
		for _, address := range []string{"192.0.2.2:53", "[2001:db8::2]:53"} {
			l.wantUDP(l.client, address, test.wantUDP)
			l.want(l.client, address, test.wantTCP)
		}
	}
}

// TestDNSToGroups asks all hosts of a network at once, which is nobody's but their own business.
func TestDNSToGroups(t *testing.T) {
	l := newDNSLab(t)
	l.captureDNS()
	h := l.open()
	c := dnsConfig()
	c.Clients = prefixes("0.0.0.0/0", "::/0")
	mustApply(t, h, c)
	for _, group := range []string{"10.2.0.255:53", "[ff02::1%up0]:53"} {
		err := l.router.Do(func() error {
			conn, err := net.ListenPacket("udp", ":0")
			if err != nil {
				return err
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
			if _, err := conn.(*net.UDPConn).WriteToUDPAddrPort([]byte("0"), netip.MustParseAddrPort(group)); err != nil {
				return err
			}
			answer := make([]byte, maxDatagram)
			n, _, err := conn.ReadFrom(answer)
			want := "gateway " + netip.AddrPortFrom(netip.MustParseAddrPort(group).Addr().WithZone(""), 53).String() + "\n"
			if got := string(answer[:n]); err == nil && got != want {
				t.Errorf("answered: %q; want %q", got, want)
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", group, err)
		}
	}
}

func TestNeighboursAreLeftAlone(t *testing.T) {
	l := newDNSLab(t)
	l.captureDNS()
	h := l.open()
	c := dnsConfig()
	c.Neighbours = prefixes("192.0.2.0/24", "2001:db8::/64")
	c.Always = prefixes("192.0.2.0/24", "2001:db8::/64")
	c.FailClosed = true
	mustApply(t, h, c)
	passes := func() {
		t.Helper()
		for _, address := range []string{"192.0.2.2", "[2001:db8::2]"} {
			for _, port := range []string{":53", ":5000"} {
				l.wantUDP(l.client, address+port, "origin")
				l.want(l.client, address+port, "origin")
			}
			l.want(l.client, address+":80", "origin")
		}
	}
	passes()
	l.wantUDP(l.client, "198.51.100.7:53", "dns")
	die(t, h)
	passes()
	l.wantUDP(l.client, "198.51.100.7:53", "prohibited")
}

// TestAnswersOfClients has DNS servers among the clients, whose answers go to port 53 like queries.
func TestAnswersOfClients(t *testing.T) {
	for _, failClosed := range []bool{false, true} {
		l := newLab(t)
		l.captureDNS()
		serveUDP(t, l.client, "0.0.0.0:53", "client")
		serveUDP(t, l.client, "[::]:53", "client")
		h := l.open()
		c := dnsConfig()
		c.FailClosed = failClosed
		mustApply(t, h, c)
		ask := func() {
			t.Helper()
			for _, address := range []string{"10.1.0.2:53", "[fd01::2]:53"} {
				err := l.origin.Do(func() error {
					dialer := net.Dialer{LocalAddr: &net.UDPAddr{Port: 53}}
					conn, err := dialer.DialContext(context.Background(), "udp", address)
					if err != nil {
						return err
					}
					defer conn.Close()
					if got := asked(conn, address, 64); got != "client" {
						t.Errorf("%s was answered: %s", address, got)
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		ask()
		die(t, h) // the guard that is left does not cut them
		ask()
	}
}

func TestDNSWithoutListener(t *testing.T) {
	l := newDNSLab(t)
	stop := l.captureDNS()
	h := l.open()
	c := dnsConfig()
	c.Ports = append(c.Ports, PortRange{53, 53})
	for _, failClosed := range []bool{false, true} {
		c.FailClosed = failClosed
		mustApply(t, h, c)
		for _, address := range []string{"192.0.2.2:53", "[2001:db8::2]:53"} {
			l.wantUDP(l.client, address, "dns")
			l.want(l.client, address, "dns")
		}
	}
	stop()
	for _, test := range []struct {
		failClosed       bool
		wantUDP, wantTCP string
	}{
		{false, "origin", "origin"},
		{true, "prohibited", "refused"},
	} {
		c.FailClosed = test.failClosed
		mustApply(t, h, c)
		for _, address := range []string{"192.0.2.2:53", "[2001:db8::2]:53", "198.51.100.7:53"} {
			l.wantUDP(l.client, address, test.wantUDP)
			l.want(l.client, address, test.wantTCP)
		}
		l.wantUDP(l.client, "10.2.0.1:53", "gateway")
		l.wantUDP(l.client, "192.0.2.2:5000", "origin")
		l.wantUDP(l.router, "192.0.2.2:53", "origin")
		l.want(l.client, "192.0.2.2:80", "captured")
	}
}

func TestGuardOfDNS(t *testing.T) {
	for _, test := range []struct {
		udp, tcp         bool
		wantUDP, wantTCP string // after the program was killed
	}{
		{true, true, "prohibited", "refused"},
		{true, false, "prohibited", "origin"},
		{false, true, "origin", "refused"},
	} {
		l := newDNSLab(t)
		l.captureDNS()
		h := l.open()
		c := dnsConfig()
		c.DNS.UDP, c.DNS.TCP, c.FailClosed = test.udp, test.tcp, true
		mustApply(t, h, c)
		passes := func() {
			t.Helper()
			for _, address := range []string{"192.0.2.2:5000", "[2001:db8::2]:5000"} {
				l.wantUDP(l.client, address, "origin")
				l.want(l.client, address, "origin")
			}
			l.wantUDP(l.client, "10.2.0.1:53", "gateway")
			l.wantUDP(l.client, "192.0.2.1:53", "gateway")
			l.wantUDP(l.router, "192.0.2.2:53", "origin")
			l.wantUDP(l.origin, "10.1.0.2:53", "client")
			l.want(l.client, "198.51.100.7:80", "origin")
		}
		passes()
		die(t, h)
		passes()
		for _, address := range []string{"192.0.2.2:53", "[2001:db8::2]:53", "198.51.100.7:53", "[2001:db8:51::7]:53"} {
			l.wantUDP(l.client, address, test.wantUDP)
			l.want(l.client, address, test.wantTCP)
		}

		h = l.open()
		mustApply(t, h, c)
		if test.udp {
			l.wantUDP(l.client, "192.0.2.2:53", "dns")
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		l.wantUDP(l.client, "192.0.2.2:53", "origin")
		l.want(l.client, "192.0.2.2:53", "origin")
	}
}

// TestDrainAnswersQueries asks before the program stops, and answers after.
func TestDrainAnswersQueries(t *testing.T) {
	for _, failClosed := range []bool{false, true} {
		l := newDNSLab(t)
		h := l.open()
		c := dnsConfig()
		c.FailClosed = failClosed
		mustApply(t, h, c)
		asking := []string{"192.0.2.2:53", "[2001:db8::2]:53"}
		answers := make([]chan string, len(asking))
		var release []func() error
		for i, address := range asking {
			socket := listenUDP(t, l.gateway, c.DNS.Listen[i].String(), "dns")
			answers[i] = make(chan string, 1)
			go func() { answers[i] <- l.ask(l.client, address, 64) }()
			_ = socket.SetDeadline(time.Now().Add(2 * time.Second))
			_, from, to, err := socket.receive()
			if err != nil {
				t.Fatal(err)
			}
			release = append(release, func() error {
				return socket.answer(slices.Concat([]byte("dns "+address+"\n"), make([]byte, 64-len("dns \n")-len(address))), from, to)
			})
		}
		if err := h.Drain(); err != nil {
			t.Fatal(err)
		}
		for i, address := range asking {
			if err := release[i](); err != nil {
				t.Fatal(err)
			}
			if got := <-answers[i]; got != "dns" {
				t.Errorf("%s was answered: %s", address, got)
			}
			l.wantUDP(l.client, address, map[bool]string{false: "origin", true: "prohibited"}[failClosed])
			l.want(l.client, address, map[bool]string{false: "origin", true: "refused"}[failClosed])
		}
		l.wantUDP(l.client, "192.0.2.2:5000", "origin")
	}
}

// TestAnswersOfOthersKeepTheirPort sends from the listeners' port without the program's mark.
func TestAnswersOfOthersKeepTheirPort(t *testing.T) {
	l := newLab(t)
	h := l.open()
	mustApply(t, h, dnsConfig())
	for _, address := range []string{"10.2.0.1:15053", "[fd02::1]:15053"} {
		serveUDP(t, l.gateway, address, "gateway")
		l.wantUDP(l.client, address, "gateway")
	}
}

func TestAlways(t *testing.T) {
	for _, dns := range []bool{true, false} {
		l := newDNSLab(t)
		l.captureDNS()
		h := l.open()
		c := dnsConfig()
		if !dns {
			c.DNS = DNS{}
		}
		c.Always = prefixes("198.18.0.0/15", "192.0.2.0/24", "fd0f:a4e1:b0d5:c0de::/64", "2001:db8::/64")
		c.Bypass = append(c.Bypass, prefixes("192.0.2.2/32", "2001:db8::2/128", "198.18.0.0/24")...)
		query := map[bool][2]string{true: {"dns", "dns"}, false: {"unreachable", "captured"}}[dns]
		destinations := []string{"192.0.2.2", "[2001:db8::2]", "198.18.0.7", "198.19.255.1", "[fd0f:a4e1:b0d5:c0de::7]"}
		for _, failClosed := range []bool{false, true} {
			c.FailClosed = failClosed
			mustApply(t, h, c)
			for _, address := range destinations {
				l.want(l.client, address+":5000", "captured")
				l.want(l.client, address+":80", "captured")
				l.wantUDP(l.client, address+":5000", "unreachable")
				l.wantUDP(l.client, address+":53", query[0])
				l.want(l.client, address+":53", query[1])
			}
			for address, want := range map[string]string{
				"192.0.2.1:5000": "gateway", "[2001:db8::1]:5000": "gateway", // its own addresses
				"198.51.100.7:5000": "origin", "[2001:db8:51::7]:5000": "origin",
			} {
				l.want(l.client, address, want)
				l.wantUDP(l.client, address, want)
			}
			l.want(l.client, "198.51.100.7:80", "origin")
			l.want(l.router, "192.0.2.2:5000", "origin") // no client
			l.wantUDP(l.router, "192.0.2.2:5000", "origin")
		}
		die(t, h)
		for _, address := range destinations[:2] {
			l.want(l.client, address+":5000", "refused")
			l.wantUDP(l.client, address+":5000", "unreachable")
			l.wantUDP(l.client, address+":53", map[bool]string{true: "prohibited", false: "unreachable"}[dns])
			l.want(l.client, address+":53", "refused")
		}
		l.want(l.client, "198.51.100.7:5000", "origin")
		l.want(l.client, "198.51.100.7:80", "origin")
		l.wantUDP(l.client, "198.51.100.7:5000", "origin")
		l.wantUDP(l.client, "192.0.2.1:5000", "gateway")
		l.want(l.router, "192.0.2.2:5000", "origin")
	}
}

func TestAlwaysWithoutListener(t *testing.T) {
	l := newDNSLab(t)
	h := l.open()
	c := testConfig()
	c.Always = prefixes("192.0.2.0/24", "2001:db8::/64")
	for _, c.FailClosed = range []bool{false, true} {
		mustApply(t, h, c)
		for _, address := range []string{"192.0.2.2:5000", "[2001:db8::2]:5000"} {
			l.want(l.client, address, map[bool]string{false: "origin", true: "refused"}[c.FailClosed])
			l.wantUDP(l.client, address, "unreachable")
		}
	}
}
