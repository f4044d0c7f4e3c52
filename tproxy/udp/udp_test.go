package udp

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// TestEcho: datagrams of every length go and come, from the address that was asked.
func TestEcho(t *testing.T) {
	p := newProxy(t, nil)
	g := serve(t, p, nil)
	g.wantCarried(true)
	for _, server := range []netip.AddrPort{server4, server6} {
		c := newClient(t, server)
		for _, size := range []int{1, 0, 1200, 1472, 9000, 60000} {
			payload := strings.Repeat("x", size)
			c.say(server, payload)
			c.want(server, payload)
		}
	}
	g.stop()
	for range 2 {
		r := g.wantRecord()
		const sum = 1 + 1200 + 1472 + 9000 + 60000
		if r.Sent != sum || r.Received != sum || r.SentDatagrams != 6 || r.ReceivedDatagrams != 6 || r.Destinations != 1 || r.Way != Upstream || r.Upstream != "socks5://proxy:1080" || r.Err == nil {
			t.Errorf("record %+v", r)
		}
	}
	if stats := g.Stats(); stats.Sessions != 0 || stats.Opened != 2 || stats.Sent != 12 || stats.Received != 12 || len(stats.Dropped) > 0 {
		t.Errorf("%+v", stats)
	}
}

// TestOneMapping: all that one endpoint of a client sends comes to the relay from one
// address (RFC 4787 REQ-1), and the order is kept.
func TestOneMapping(t *testing.T) {
	var mutex sync.Mutex
	from := make(map[netip.AddrPort][]string)
	p := newProxy(t, func(p *proxy, source netip.AddrPort, datagram []byte) {
		mutex.Lock()
		d, _ := upstream.ParseDatagram(datagram)
		from[source] = append(from[source], string(d.Payload))
		mutex.Unlock()
		p.say(source, datagram)
	})
	g := serve(t, p, nil)
	c := newClient(t, server4)
	for i := range 20 {
		server := netip.AddrPortFrom(server4.Addr(), uint16(443+i%4))
		c.say(server, fmt.Sprint(i))
		c.want(server, fmt.Sprint(i))
	}
	mutex.Lock()
	defer mutex.Unlock()
	if len(from) != 1 {
		t.Errorf("the relay hears from %v", from)
	}
	for _, heard := range from {
		if got := strings.Join(heard, " "); got != "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19" {
			t.Errorf("in the order %s", got)
		}
	}
	if n := g.Stats().Opened; n != 1 {
		t.Errorf("%d sessions", n)
	}
}

// TestHostileProxy: nothing of what a proxy must not say reaches a client or ends anything.
func TestHostileProxy(t *testing.T) {
	stranger := netip.MustParseAddrPort("203.0.113.66:443")
	otherPort := netip.AddrPortFrom(server4.Addr(), 9)
	for _, filter := range []Filter{AddressDependent, EndpointIndependent} {
		sources := make(chan netip.AddrPort, 1)
		p := newProxy(t, func(p *proxy, source netip.AddrPort, _ []byte) {
			sources <- source
			fragment := relayed(server4, "fragment")
			fragment[2] = 1
			for _, datagram := range [][]byte{
				{},
				{0},
				{0, 0, 0},
				{0, 0, 0, 1},
				{0, 0, 0, 1, 203, 0, 113, 7, 1},
				{0, 0, 0, 3},
				{0, 0, 0, 3, 9, 'x'},
				{0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8},
				relayed(netip.AddrPortFrom(server4.Addr(), 0), "no port"),
				fragment,
				relayed(netip.MustParseAddrPort("127.0.0.1:443"), "loopback"),
				relayed(netip.AddrPortFrom(client4, 443), "the gateway's"),
				relayed(netip.MustParseAddrPort("224.0.0.251:5353"), "group"),
				relayed(server6, "another family"),
				append([]byte{0, 0, 0, 3, 4, 'e', 'v', 'i', 'l', 1, 187}, "name"...),
				relayed(stranger, "stranger"),
				relayed(otherPort, "other port"),
				relayed(server4, "answer"),
			} {
				p.say(source, datagram)
			}
		})
		g := serve(t, p, func(c *Config) { c.Filter = filter })
		c := newClient(t, server4)
		c.say(server4, "question")
		if filter == EndpointIndependent {
			c.want(stranger, "stranger")
		}
		c.want(otherPort, "other port")
		c.want(server4, "answer")
		c.wantNothing()
		g.wantDropped(dropHeader, 9)
		g.wantDropped(dropFragment, 1)
		g.wantDropped(dropImpostor, 3)
		g.wantDropped(dropStranger, map[Filter]int64{AddressDependent: 3, EndpointIndependent: 2}[filter])

		// What does not come from the relay.
		other, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if _, err := other.WriteToUDPAddrPort(relayed(server4, "forged"), <-sources); err != nil {
			t.Error(err)
		}
		c.wantNothing()
		g.stop()
	}
}

// TestNames: the proxy is given names where they are known, and its answers from the
// addresses behind them come from those that were asked.
func TestNames(t *testing.T) {
	fake1, fake2 := netip.MustParseAddrPort("198.18.0.1:443"), netip.MustParseAddrPort("198.18.0.2:443")
	real1, real2 := netip.MustParseAddrPort("203.0.113.1:443"), netip.MustParseAddrPort("203.0.113.2:443")
	var mutex sync.Mutex
	var headers []string
	p := newProxy(t, func(p *proxy, source netip.AddrPort, datagram []byte) {
		d, err := upstream.ParseDatagram(datagram)
		if err != nil {
			t.Error(err)
		}
		mutex.Lock()
		headers = append(headers, fmt.Sprintf("%s%s", d.Name, d.From))
		mutex.Unlock()
		from := map[string]netip.AddrPort{"one.test": real1, "two.test": real2}[string(d.Name)]
		if !from.IsValid() {
			from = d.From
		}
		if string(d.Payload) != "silent" {
			p.say(source, relayed(from, string(d.Payload)))
		}
	})
	g := serve(t, p, func(c *Config) {
		c.Route = func(_ netip.Addr, destination netip.AddrPort) Route {
			r := Route{Way: Upstream, NameFrom: "test"}
			switch destination.Addr() {
			case fake1.Addr():
				r.Name, r.Placeholder = "one.test", true
			case fake2.Addr():
				r.Name, r.Placeholder = "two.test", true
			case server4.Addr():
				r.Name = "three.test"
			case netip.MustParseAddr("198.18.0.9"):
				r.Placeholder = true
			}
			return r
		}
	})
	c := newClient(t, server4)
	c.say(fake1, "a")
	c.want(fake1, "a")
	c.say(fake2, "b")
	c.want(fake2, "b")
	c.say(fake1, "c")
	c.want(fake1, "c")
	c.say(netip.MustParseAddrPort("198.18.0.9:443"), "forgotten")
	g.wantDropped(dropForgotten, 1)
	mutex.Lock()
	if got := strings.Join(headers, " "); got != "one.testinvalid AddrPort two.testinvalid AddrPort one.testinvalid AddrPort" {
		t.Errorf("the relay was asked for %s", got)
	}
	headers = nil
	mutex.Unlock()

	// While the answer of one name is due another one's could not be told from it.
	d := newClient(t, server4)
	d.say(fake1, "silent")
	d.say(fake2, "early")
	g.wantDropped(dropNames, 1)
	d.say(server4, "by address")
	d.want(server4, "by address")
	d.say(fake1, "late")
	d.want(fake1, "late")
	d.say(fake2, "again")
	d.want(fake2, "again")
	g.stop()
	for range 2 {
		if r := g.wantRecord(); r.Name != "one.test" || r.NameFrom != "test" || r.Destination != fake1 {
			t.Errorf("record %+v", r)
		}
	}
}

// TestDirect: exempt destinations are sent to directly, and the proxy is not asked.
func TestDirect(t *testing.T) {
	p := newProxy(t, nil)
	for _, server := range []netip.AddrPort{server4, server6} {
		var origin net.PacketConn
		err := beyond.Do(func() (err error) {
			origin, err = net.ListenPacket("udp", server.String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer origin.Close()
		g := serve(t, p, func(c *Config) {
			c.Route = func(netip.Addr, netip.AddrPort) Route { return Route{Way: Direct} }
			c.Timeout = 300 * time.Millisecond
		})
		g.wantCarried(true)
		asked := p.times()
		c := newClient(t, server)
		for i := range 2 {
			c.say(server, fmt.Sprint("question ", i))
			buffer := make([]byte, 100)
			origin.SetReadDeadline(time.Now().Add(3 * time.Second))
			n, from, err := origin.ReadFrom(buffer)
			if err != nil || string(buffer[:n]) != fmt.Sprint("question ", i) || from.String() == c.at().String() {
				t.Fatalf("the origin got %q from %v, %v", buffer[:n], from, err)
			}
			origin.WriteTo([]byte("answer"), from)
			c.want(server, "answer")
		}
		if r := g.wantRecord(); r.Way != Direct || r.SentDatagrams != 2 || r.Received != 12 || r.Err != nil {
			t.Errorf("record %+v", r)
		}
		if p.times() != asked {
			t.Error("the proxy was asked")
		}
		// Nobody has the port any more: that is known, and ends nothing.
		origin.Close()
		c.say(server, "question")
		if !within(2*time.Second, func() bool { return g.Stats().ICMPErrors == 1 }) {
			t.Errorf("%+v", g.Stats())
		}
		g.stop()
	}
}

// TestRefusedDestination is dropped, and takes no session.
func TestRefusedDestination(t *testing.T) {
	g := serve(t, newProxy(t, nil), func(c *Config) {
		c.Route = func(netip.Addr, netip.AddrPort) Route { return Route{} }
	})
	newClient(t, server4).say(server4, "question")
	g.wantDropped(dropRefused, 1)
	if n := g.Stats().Opened; n != 0 {
		t.Errorf("%d sessions", n)
	}
}

// TestServerSpeaks: when connection tracking has forgotten the client's datagrams and the
// server speaks first, the client's next is captured all the same: it is no reply.
func TestServerSpeaks(t *testing.T) {
	for _, name := range []string{"nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"} {
		if err := os.WriteFile("/proc/sys/net/netfilter/"+name, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	p := newProxy(t, nil)
	serve(t, p, nil)
	for _, server := range []netip.AddrPort{server4, server6} {
		c := newClient(t, server)
		sources := make(chan netip.AddrPort, 10)
		p.change(func() {
			p.answer = func(p *proxy, source netip.AddrPort, datagram []byte) {
				p.say(source, datagram)
				sources <- source
			}
		})
		c.say(server, "client")
		c.want(server, "client")
		time.Sleep(2100 * time.Millisecond)
		p.say(<-sources, relayed(server, "server"))
		c.want(server, "server")
		c.say(server, "client again")
		c.want(server, "client again")
	}
}

// TestTooLong: what has no room for the proxy's header is dropped, and ends nothing.
func TestTooLong(t *testing.T) {
	g := serve(t, newProxy(t, nil), nil)
	c := newClient(t, server4)
	c.say(server4, "before")
	c.want(server4, "before")
	c.say(server4, strings.Repeat("x", 65507)) // the longest over IPv4
	g.wantDropped(dropTooLong, 1)
	c.say(server4, "after")
	c.want(server4, "after")
}
