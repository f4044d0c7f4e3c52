package udp

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// TestExpiry: a session ends when the client has been silent, whoever else speaks; its
// sockets and those of its answers are closed.
func TestExpiry(t *testing.T) {
	const timeout = 300 * time.Millisecond
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	p := newProxy(t, func(p *proxy, source netip.AddrPort, datagram []byte) {
		datagram = bytes.Clone(datagram)
		go func() {
			for {
				select {
				case <-over:
					return
				case <-time.After(20 * time.Millisecond):
					p.say(source, datagram)
				}
			}
		}()
	})
	g := serve(t, p, func(c *Config) { c.Timeout = timeout })
	g.wantCarried(true)
	before := openFiles(t)
	c := newClient(t, server4)
	began := time.Now()
	for range 5 { // it lives while the client speaks
		c.say(server4, "x")
		time.Sleep(timeout / 3)
	}
	last := time.Now()
	r := g.wantRecord()
	if took := time.Since(last); r.Err != nil || took < timeout/3 || time.Since(began) < 5*timeout/3 || took > 3*timeout {
		t.Errorf("after %v: %+v", took, r)
	}
	// The relay's datagrams find nobody: no session comes of them.
	if !within(2*time.Second, func() bool { s := g.Stats(); return s.Sessions == 0 && s.ReplySockets == 0 }) {
		t.Errorf("%+v", g.Stats())
	}
	c.Close()
	if !within(2*time.Second, func() bool { return openFiles(t) <= before+1 }) { // the proxy's end of the connection
		t.Errorf("%d files are open, %d were", openFiles(t), before)
	}
}

// TestAssociationEnds: when the proxy closes the connection the session ends, and the next
// datagram begins another; the same when the relay's port is closed.
func TestAssociationEnds(t *testing.T) {
	p := newProxy(t, nil)
	g := serve(t, p, nil)
	g.wantCarried(true)
	c := newClient(t, server4)
	c.say(server4, "one")
	c.want(server4, "one")
	p.change(func() { p.granted[len(p.granted)-1].Close() })
	if r := g.wantRecord(); r.Err != errRelay || r.Sent != 3 || r.Received != 3 {
		t.Errorf("record %+v", r)
	}
	c.say(server4, "two")
	c.want(server4, "two")
	p.relay.Close()
	c.say(server4, "three")
	if r := g.wantRecord(); r.Err != errRefused {
		t.Errorf("record %+v", r)
	}
	if n := g.Stats().ICMPErrors; n != 1 {
		t.Errorf("%d ICMP errors", n)
	}

	// A proxy that talks where it has nothing to say.
	q := newProxy(t, nil)
	g.stop()
	h := serve(t, q, nil)
	h.wantCarried(true)
	c.say(server4, "four")
	c.want(server4, "four")
	q.change(func() { q.granted[len(q.granted)-1].Write(make([]byte, 1<<20)) })
	if r := h.wantRecord(); r.Err != errChatter {
		t.Errorf("record %+v", r)
	}
}

// TestCarry: whether UDP is carried is told when it is known and when it changes.
func TestCarry(t *testing.T) {
	unknown := &upstream.RefusedError{Code: upstream.CommandNotSupported}
	p := newProxy(t, nil)
	p.refusal = unknown
	g := serve(t, p, nil)
	g.wantCarried(false)
	p.change(func() { p.refusal = nil })
	g.Retry()
	g.wantCarried(true)
	c := newClient(t, server4)
	c.say(server4, "carried")
	c.want(server4, "carried")

	// Any other failure is not the proxy's word on all while others have what it refuses.
	p.change(func() { p.refusal = &upstream.RefusedError{Code: 1} })
	d := newClient(t, server4)
	d.say(server4, "not carried")
	if r := g.wantRecord(); r.Err != p.refusal {
		t.Errorf("record %+v", r)
	}
	g.wantDropped(dropFailed, 1)
	c.say(server4, "still carried")
	c.want(server4, "still carried")
	if len(g.carried) > 0 {
		t.Errorf("one failure is told of as %v", <-g.carried)
	}

	p.change(func() { p.refusal = unknown })
	d.say(server4, "refused")
	g.wantCarried(false)
	p.change(func() { p.refusal = nil })
	g.Retry()
	g.wantCarried(true)

	// None has an association.
	p.change(func() { p.granted[1].Close() })
	g.wantRecord()
	g.wantRecord()
	p.change(func() { p.refusal = errors.New("no connection") })
	d.say(server4, "refused")
	g.wantCarried(false)
}

// TestOpeningQueue: what comes while the association is opened is kept in its order, but
// no more than a little.
func TestOpeningQueue(t *testing.T) {
	p := newProxy(t, nil)
	g := serve(t, p, nil)
	g.wantCarried(true)
	p.change(func() { p.delay = 200 * time.Millisecond })
	c := newClient(t, server4)
	for i := range maxQueue + 3 {
		c.say(server4, fmt.Sprint(i))
	}
	for i := range maxQueue {
		c.want(server4, fmt.Sprint(i))
	}
	g.wantDropped(dropOpening, 3)
	d := newClient(t, server4)
	big := strings.Repeat("x", maxQueueBytes/2)
	for range 3 {
		d.say(server4, big)
	}
	d.want(server4, big)
	d.want(server4, big)
	g.wantDropped(dropOpening, 4)
	g.stop()
	if held := g.loop.held; held != 0 {
		t.Errorf("%d bytes are held", held)
	}
}

// TestBounds: sessions, those of a client, and reply sockets.
func TestBounds(t *testing.T) {
	p := newProxy(t, nil)
	g := serve(t, p, func(c *Config) { c.MaxSessions, c.MaxPerClient, c.MaxReplies = 3, 2, 2 })
	var clients []*client
	for _, server := range []netip.AddrPort{server4, server4, server6} {
		c := newClient(t, server)
		c.say(server, "x")
		c.want(server, "x")
		clients = append(clients, c)
	}
	newClient(t, server6).say(server6, "x")
	g.wantDropped(dropSessions, 1)
	for i := range 10 {
		server := netip.AddrPortFrom(server4.Addr(), uint16(500+i))
		clients[0].say(server, "x")
		clients[0].want(server, "x")
	}
	if n := g.Stats().ReplySockets; n != 2 {
		t.Errorf("%d reply sockets", n)
	}
	g.stop()

	g = serve(t, p, func(c *Config) { c.MaxPerClient = 2 })
	for i := range 3 {
		newClient(t, server4).say(server4, fmt.Sprint(i))
	}
	g.wantDropped(dropClient, 1)
}

// TestManyPeers: a session does not remember more destinations than it may.
func TestManyPeers(t *testing.T) {
	p := newProxy(t, nil)
	g := serve(t, p, nil)
	c := newClient(t, server4)
	for i := range 2 * maxPeers {
		server := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), uint16(500+i/256))
		c.say(server, "x")
		c.want(server, "x")
	}
	g.stop()
	if r := g.wantRecord(); r.Destinations != 2*maxPeers {
		t.Errorf("record %+v", r)
	}
}

// TestMany has 1,000 clients talk to 10 destinations each. Order is kept, and everything is
// given back.
func TestMany(t *testing.T) {
	const clients, servers, rounds = 1000, 10, 4
	p := newProxy(t, nil)
	g := serve(t, p, func(c *Config) { c.Timeout = 2 * time.Second })
	g.wantCarried(true)
	files, goroutines, memory := openFiles(t), runtime.NumGoroutine(), heap()
	all := make([]*client, clients)
	for i := range all {
		all[i] = newClient(t, []netip.AddrPort{server4, server6}[i%2])
	}
	address := func(client, server int) netip.AddrPort {
		return netip.AddrPortFrom([]netip.Addr{server4.Addr(), server6.Addr()}[client%2], uint16(600+server))
	}
	began := time.Now()
	for round := range rounds {
		for from := 0; from < clients; from += 50 {
			for i := from; i < from+50; i++ {
				for server := range servers {
					all[i].say(address(i, server), fmt.Sprintf("%d %d %d", i, server, round))
					if round == 0 && server == 0 {
						all[i].want(address(i, 0), fmt.Sprintf("%d 0 0", i))
					}
				}
			}
			for i := from; i < from+50; i++ {
				for server := range servers {
					if round > 0 || server > 0 {
						all[i].want(address(i, server), fmt.Sprintf("%d %d %d", i, server, round))
					}
				}
			}
		}
	}
	s := g.Stats()
	t.Logf("%d KiB of memory, the clients' own included", (heap()-memory)>>10)
	t.Logf("%d sessions, %d reply sockets, %d goroutines more, %d files more, in %v", s.Sessions, s.ReplySockets,
		runtime.NumGoroutine()-goroutines, openFiles(t)-files-clients, time.Since(began).Round(time.Millisecond))
	if s.ReplySockets != 2*servers {
		t.Errorf("%d reply sockets", s.ReplySockets)
	}
	if more := runtime.NumGoroutine() - goroutines; more > 10 {
		t.Errorf("%d goroutines for sessions at rest", more)
	}
	for range clients {
		r := g.wantRecord()
		if r.Err != nil || r.Destinations != servers || r.SentDatagrams != servers*rounds || r.ReceivedDatagrams != servers*rounds {
			t.Fatalf("record %+v", r)
		}
	}
	for _, c := range all {
		c.Close()
	}
	p.change(func() {
		for _, conn := range p.granted {
			conn.Close()
		}
	})
	if !within(5*time.Second, func() bool { return g.Stats().ReplySockets == 0 && openFiles(t) <= files }) {
		t.Errorf("%d files are open, %d were; %+v", openFiles(t), files, g.Stats())
	}
	all = nil
	p.change(func() { p.granted = nil })
	if more := heap() - memory; more > 1<<20 { // most of it the clients of the test, which its cleanup knows
		t.Errorf("%d KiB more memory", more>>10)
	}
}

// heap is what is in use of Go's heap, in bytes.
func heap() int {
	runtime.GC()
	runtime.GC() // what the first has finalized
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}
