package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

func group(t *testing.T, order upstream.Order, list string) *upstream.Group {
	t.Helper()
	proxies, err := upstream.ParseList(list)
	if err != nil {
		t.Fatal(err)
	}
	return upstream.NewGroup(order, proxies...)
}

// hosts are those of candidates.
func hosts(proxies []*upstream.Proxy) string {
	var all []string
	for _, proxy := range proxies {
		all = append(all, proxy.Host())
	}
	return strings.Join(all, " ")
}

func TestParseList(t *testing.T) {
	for list, want := range map[string]string{
		"http://a:1":                             "http://a:1",
		"a,b":                                    "http://a:3128,http://b:3128",
		"http://u:p@a:1, socks5://b,direct://":   "http://a:1,socks5://b:1080,direct://",
		"http://u:with,comma@a:1":                "http://a:1",
		"http://u:p@a:1,http://u:p@a:2":          "http://a:1,http://a:2",
		"http://u:p@[2001:db8::1]:1,http://b:80": "http://[2001:db8::1]:1,http://b:80",
	} {
		if got := group(t, upstream.First, list).String(); got != want {
			t.Errorf("%s is %s, want %s", list, got, want)
		}
	}
	for _, list := range []string{"http://u:secret@a:1,ftp://b", "a,,b", "a,a", "http://u:secret@a:1,http://u:secret@a:1", "direct://host"} {
		if _, err := upstream.ParseList(list); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", list, err)
		}
	}
}

// TestFirst keeps to the list.
func TestFirst(t *testing.T) {
	g := group(t, upstream.First, "a,b,c")
	for range 3 {
		if got := hosts(g.Candidates(netip.Addr{})); got != "a b c" {
			t.Errorf("candidates are %s", got)
		}
	}
	if allocations := testing.AllocsPerRun(100, func() { g.Candidates(netip.Addr{}) }); allocations > 0 {
		t.Errorf("%v allocations", allocations)
	}
}

// TestLeastLatency measures each once, and then changes only for much less.
func TestLeastLatency(t *testing.T) {
	g := group(t, upstream.LeastLatency, "a,b,c")
	latencies := map[string]time.Duration{"a": 10 * time.Millisecond, "b": 30 * time.Millisecond, "c": 9 * time.Millisecond}
	for range 3 {
		proxy := g.Candidates(netip.Addr{})[0]
		proxy.Connected(latencies[proxy.Host()])
	}
	if got := hosts(g.Candidates(netip.Addr{})); got != "c a b" {
		t.Errorf("candidates are %s", got)
	}
	connect := func(host string, took time.Duration) {
		for _, proxy := range g.Proxies() {
			if proxy.Host() == host {
				for range 100 { // it is smoothed
					proxy.Connected(took)
				}
			}
		}
	}
	connect("a", 8*time.Millisecond)
	if got := hosts(g.Candidates(netip.Addr{})); got != "c a b" {
		t.Errorf("a is hardly faster, and the candidates are %s", got)
	}
	connect("b", time.Millisecond)
	if got := hosts(g.Candidates(netip.Addr{})); got != "b a c" {
		t.Errorf("b is much faster, and the candidates are %s", got)
	}
}

// TestHashClient gives each client one proxy, and about as many clients to each. Without a
// proxy only its own clients move.
func TestHashClient(t *testing.T) {
	all, less := group(t, upstream.HashClient, "a,b,c"), group(t, upstream.HashClient, "a,c")
	count := make(map[string]int)
	for i := range 3000 {
		client := netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)})
		if i%2 == 0 {
			client = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0, byte(i >> 8), byte(i), 15: 1})
		}
		first := all.Candidates(client)[0].Host()
		count[first]++
		if again := all.Candidates(client)[0].Host(); again != first {
			t.Fatalf("%s has %s, and then %s", client, first, again)
		}
		if moved := less.Candidates(client)[0].Host(); first != "b" && moved != first {
			t.Fatalf("%s moves from %s to %s", client, first, moved)
		}
	}
	for host, clients := range count {
		if clients < 900 || clients > 1100 {
			t.Errorf("%s has %d of 3,000 clients", host, clients)
		}
	}
	one, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::ffff:1")
	if hosts(all.Candidates(one)) != hosts(all.Candidates(other)) {
		t.Error("two addresses of a network have different proxies")
	}
}

// standIn is a proxy that can be switched off.
type standIn struct {
	address  string
	listener net.Listener
	probes   atomic.Int32
}

func (s *standIn) up(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	s.address, s.listener = listener.Addr().String(), listener
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.probes.Add(1)
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
			conn.Close()
		}
	}()
}

// TestWatch takes a proxy for down after two connects that failed, not one, and for up
// again when it answers a probe.
func TestWatch(t *testing.T) {
	var first, second standIn
	first.address, second.address = "127.0.0.1:0", "127.0.0.1:0"
	first.up(t)
	second.up(t)
	g := group(t, upstream.First, first.address+","+second.address)
	changes := make(chan upstream.Change, 10)
	dialer := &upstream.Dialer{ConnectTimeout: 5 * time.Second, HandshakeTimeout: 5 * time.Second}
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan struct{})
	go func() {
		g.Watch(ctx, dialer, func(change upstream.Change) { changes <- change })
		close(watched)
	}()
	t.Cleanup(func() { cancel(); <-watched })
	ports := func() string {
		var all []string
		for _, proxy := range g.Candidates(netip.Addr{}) {
			all = append(all, fmt.Sprintf("127.0.0.1:%d", proxy.Port()))
		}
		return strings.Join(all, ",")
	}
	next := func() upstream.Change {
		select {
		case change := <-changes:
			return change
		case <-time.After(20 * time.Second):
			t.Fatal("no change is told")
			return upstream.Change{}
		}
	}
	connect := func() error {
		conn, err := dialer.Connect(ctx, g.Proxies()[0])
		if err == nil {
			conn.Close()
		}
		return err
	}
	both := first.address + "," + second.address

	if err := connect(); err != nil { // Watch may not have begun
		t.Fatal(err)
	}
	g.NetworkChanged()
	for first.probes.Load() < 2 || second.probes.Load() < 1 {
		time.Sleep(time.Millisecond)
	}
	if ports() != both {
		t.Fatalf("candidates are %s after the first probe", ports())
	}

	first.listener.Close()
	if err := connect(); err == nil || ports() != both {
		t.Fatalf("after one failed connect, %v: candidates are %s", err, ports())
	}
	if err := connect(); err == nil || ports() != second.address {
		t.Fatalf("after two failed connects, %v: candidates are %s", err, ports())
	}
	if change := next(); change.Up || change.None || change.Proxy != g.Proxies()[0] || change.Err == nil {
		t.Errorf("%+v", change)
	}
	first.up(t)
	if change := next(); !change.Up || change.Proxy != g.Proxies()[0] || ports() != both {
		t.Errorf("%+v; candidates are %s", change, ports())
	}

	t.Run("another network", func(t *testing.T) {
		first.listener.Close()
		second.listener.Close()
		g.NetworkChanged()
		downs := []upstream.Change{next(), next()}
		if !slices.ContainsFunc(downs, func(c upstream.Change) bool { return c.None }) || ports() != "" {
			t.Errorf("%+v; candidates are %s", downs, ports())
		}
		if _, _, _, err := dialer.TunnelVia(ctx, g.Candidates(netip.Addr{}), upstream.Target{Host: "a", Port: 1}, netip.AddrPort{}); err != upstream.ErrAllDown {
			t.Errorf("TunnelVia: %v", err)
		}
		second.up(t)
		if change := next(); !change.Up || ports() != second.address {
			t.Errorf("%+v; candidates are %s", change, ports())
		}
	})
}

// TestFailed tells what says something about a proxy from what does not.
func TestFailed(t *testing.T) {
	g := group(t, upstream.First, "192.0.2.1,192.0.2.2,192.0.2.3,192.0.2.4,direct://")
	ctx, cancel := context.WithCancel(t.Context())
	watched := make(chan struct{})
	nowhere := func(string, string, syscall.RawConn) error { return errors.New("no test leaves this host") }
	go func() {
		g.Watch(ctx, &upstream.Dialer{ConnectTimeout: time.Hour, Control: nowhere}, func(upstream.Change) {})
		close(watched)
	}()
	t.Cleanup(func() { cancel(); <-watched })
	for g.Proxies()[0].Up() { // until Watch has begun
		g.Proxies()[0].Failed(syscall.ECONNREFUSED)
	}
	for i, err := range []error{syscall.EADDRNOTAVAIL, syscall.EMFILE, &net.DNSError{IsTimeout: true}, syscall.ECONNREFUSED} {
		proxy := g.Proxies()[1+i]
		for range 5 {
			proxy.Failed(err)
		}
		if !proxy.Up() {
			t.Errorf("%v: %s is down", err, proxy)
		}
	}
}
