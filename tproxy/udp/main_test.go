package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/vishvananda/netlink"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(captured{m})) }

// The test's network: one host, whose own programs are the clients. What they send to
// addresses behind its uplink is captured.
const (
	bypassMark = 0x04000000
	listenPort = 15001
)

var (
	client4 = netip.MustParseAddr("192.0.2.1")
	client6 = netip.MustParseAddr("2001:db8:1::1")
	server4 = netip.MustParseAddrPort("203.0.113.7:443")
	server6 = netip.MustParseAddrPort("[2001:db8:3::7]:443")
)

// beyond is the host behind the uplink; it has all addresses there.
var beyond *netns.NS

// captured runs the tests where UDP is captured on the real kernel.
type captured struct{ *testing.M }

func (c captured) Run() int {
	undo, err := capture()
	if err != nil {
		fmt.Fprintln(os.Stderr, "capture UDP:", err)
		return 1
	}
	defer undo()
	return c.M.Run()
}

func capture() (undo func(), err error) {
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}
	if err := netlink.LinkAdd(link); err != nil {
		return nil, err
	}
	if beyond, err = netns.New(); err != nil {
		return nil, err
	}
	var namespace *os.File
	err = beyond.Do(func() (err error) {
		namespace, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	defer namespace.Close()
	peer, err := netlink.LinkByName("up1")
	if err == nil {
		err = netlink.LinkSetNsFd(peer, int(namespace.Fd()))
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return nil, err
	}
	err = errors.Join(beyond.Up("up1"), beyond.Addr("up1", "192.0.2.254/24", "2001:db8:1::fe/64",
		netip.PrefixFrom(server4.Addr(), 32).String(), netip.PrefixFrom(server6.Addr(), 128).String()))
	if err != nil {
		return nil, err
	}
	for _, text := range []string{"192.0.2.1/24", "2001:db8:1::1/64"} {
		address, err := netlink.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		address.Flags = 0x02 // IFA_F_NODAD: an IPv6 address is there at once
		if err := netlink.AddrAdd(link, address); err != nil {
			return nil, err
		}
	}
	for text, via := range map[string]string{
		"203.0.113.0/24": "192.0.2.254", "198.18.0.0/15": "192.0.2.254", "2001:db8:3::/64": "2001:db8:1::fe",
	} {
		_, to, err := net.ParseCIDR(text)
		if err == nil {
			err = netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: to, Gw: net.ParseIP(via)})
		}
		if err != nil {
			return nil, err
		}
	}
	rules, err := netfilter.Open("transproxy")
	if err != nil {
		return nil, err
	}
	routes, err := routing.Open()
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		routes.Apply(routing.Config{
			Table: 4219, Priority: 4218, Protocol: 219, Mask: 0x07000000, LAN: 0x01000000, Local: 0x02000000, IPv4: true, IPv6: true,
		}),
		rules.Apply(netfilter.Config{
			Table: "transproxy", Mask: 0x07000000, LAN: 0x01000000, Exempt: bypassMark,
			Listen:      listeners(),
			CapturedUDP: []netfilter.PortRange{{First: 100, Last: 999}},
			Output:      netfilter.Output{Mark: 0x02000000},
		}))
	return func() { errors.Join(rules.Close(), routes.Close(), beyond.Close()) }, err
}

func listeners() []netip.AddrPort {
	return []netip.AddrPort{
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), listenPort),
		netip.AddrPortFrom(netip.IPv6Loopback(), listenPort),
	}
}

// proxy is the proxy's part: it grants associations, whose datagrams all come to one
// socket.
type proxy struct {
	t       *testing.T
	control *net.TCPListener
	relay   *net.UDPConn
	name    *upstream.Proxy
	answer  func(p *proxy, from netip.AddrPort, datagram []byte) // by default an echo

	mutex   sync.Mutex
	refusal error
	delay   time.Duration
	asked   int
	granted []*net.TCPConn
}

func newProxy(t *testing.T, answer func(*proxy, netip.AddrPort, []byte)) *proxy {
	t.Helper()
	control, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	relay, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	relay.SetReadBuffer(4 << 20)
	if answer == nil {
		answer = (*proxy).say
	}
	name, err := upstream.Parse("socks5://user:secret@proxy")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, control: control, relay: relay, name: name, answer: answer}
	var running sync.WaitGroup
	running.Go(p.serve)
	t.Cleanup(func() {
		relay.Close()
		running.Wait()
		control.Close()
		for _, conn := range p.granted {
			conn.Close()
		}
	})
	return p
}

func (p *proxy) serve() {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := p.relay.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		p.mutex.Lock()
		answer := p.answer
		p.mutex.Unlock()
		answer(p, from, buffer[:n])
	}
}

// say sends a datagram with its header.
func (p *proxy) say(to netip.AddrPort, datagram []byte) {
	p.relay.WriteToUDPAddrPort(datagram, to)
}

// relayed makes a datagram that comes from an address.
func relayed(from netip.AddrPort, payload string) []byte {
	return append(upstream.AppendDatagramHeader(nil, from), payload...)
}

func (p *proxy) associate(context.Context, netip.Addr) (*upstream.Association, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.asked++
	time.Sleep(p.delay)
	if p.refusal != nil {
		return nil, p.refusal
	}
	conn, err := net.DialTCP("tcp", nil, p.control.Addr().(*net.TCPAddr))
	if err != nil {
		return nil, err
	}
	peer, err := p.control.AcceptTCP()
	if err != nil {
		return nil, err
	}
	p.granted = append(p.granted, peer)
	return &upstream.Association{Conn: conn, Relay: p.relay.LocalAddr().(*net.UDPAddr).AddrPort(), Proxy: p.name}, nil
}

// times is how many times it was asked.
func (p *proxy) times() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.asked
}

// change calls change while nobody is asked.
func (p *proxy) change(change func()) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	change()
}

// gateway is a server that runs.
type gateway struct {
	*Server
	t       *testing.T
	stop    func()
	records chan Record
	carried chan error // nil when it is carried
}

// serve starts one; change may change what is asked of it.
func serve(t *testing.T, p *proxy, change func(*Config)) *gateway {
	t.Helper()
	g := &gateway{t: t, records: make(chan Record, 1<<16), carried: make(chan error, 100)}
	config := Config{
		Listen: listeners(), Mark: bypassMark,
		Associate: p.associate,
		Carry: func(carried bool, reason error) {
			if carried != (reason == nil) {
				t.Errorf("carried %v because of %v", carried, reason)
			}
			g.carried <- reason
		},
		Route:       func(netip.Addr, netip.AddrPort) Route { return Route{Way: Upstream} },
		Impostor:    func(a netip.Addr) bool { return a.IsLoopback() || a.IsMulticast() || a == client4 || a == client6 },
		Timeout:     time.Minute,
		MaxSessions: 1 << 16, MaxPerClient: 1 << 16, MaxReplies: 1 << 10,
		Access: func(r Record) { g.records <- r },
		Log:    zerolog.New(zerolog.NewTestWriter(t)),
	}
	if change != nil {
		change(&config)
	}
	var err error
	if g.Server, err = Listen(config); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- g.Serve(ctx) }()
	g.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(g.stop)
	return g
}

// wantCarried waits until it is told whether datagrams are carried.
func (g *gateway) wantCarried(want bool) {
	g.t.Helper()
	select {
	case reason := <-g.carried:
		if want != (reason == nil) {
			g.t.Fatalf("carried: %v, want %v", reason, want)
		}
	case <-time.After(5 * time.Second):
		g.t.Fatal("it is not told whether UDP is carried")
	}
}

// wantRecord waits for the end of a session.
func (g *gateway) wantRecord() Record {
	g.t.Helper()
	select {
	case r := <-g.records:
		return r
	case <-time.After(5 * time.Second):
		g.t.Fatal("no session ends")
		return Record{}
	}
}

// wantDropped waits until so many datagrams were dropped for a reason.
func (g *gateway) wantDropped(why reason, n int64) {
	g.t.Helper()
	if !within(2*time.Second, func() bool { return g.Stats().Dropped[why.String()] == n }) {
		g.t.Errorf("%v datagrams are dropped, want %d because of %s", g.Stats().Dropped, n, why)
	}
}

// openFiles is how many descriptors the process has.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// within asks again and again until condition holds or the time is over.
func within(limit time.Duration, condition func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	return condition()
}

// client is one endpoint of a client.
type client struct {
	t *testing.T
	*net.UDPConn
}

func newClient(t *testing.T, server netip.AddrPort) *client {
	t.Helper()
	network, at := "udp4", client4
	if server.Addr().Is6() {
		network, at = "udp6", client6
	}
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.AddrPortFrom(at, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn}
}

func (c *client) at() netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func (c *client) say(to netip.AddrPort, payload string) {
	c.t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(payload), to); err != nil {
		c.t.Fatal(err)
	}
}

// want reads a datagram.
func (c *client) want(from netip.AddrPort, payload string) {
	c.t.Helper()
	buffer := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	n, source, err := c.ReadFromUDPAddrPort(buffer)
	if err != nil || source != from || string(buffer[:n]) != payload {
		c.t.Errorf("%.60q from %s, %v; want %.60q from %s", buffer[:n], source, err, payload, from)
	}
}

// wantNothing wants no datagram for a while.
func (c *client) wantNothing() {
	c.t.Helper()
	buffer := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, source, err := c.ReadFromUDPAddrPort(buffer); err == nil {
		c.t.Errorf("%q from %s came through", buffer[:n], source)
	}
}
