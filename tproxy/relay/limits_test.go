package relay_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// short is the limit under test; it has to be above the tick of the wheel.
const short = 200 * time.Millisecond

// late is how much later than its limit a flow may end: a tick and what the
// scheduler of a busy machine takes.
const late = 2 * time.Second

// often is the pause between bytes that keep a flow going whose limit is longer, and times
// is how many of them take longer than that.
const (
	often  = short / 4
	longer = 20 * often
	times  = 25
)

// ends checks how the only flow ended, and that it was after the limit short.
func ends(t *testing.T, g *gateway, end relay.End, started time.Time) relay.Outcome {
	t.Helper()
	return endsAfter(t, short, g, end, started)
}

func endsAfter(t *testing.T, limit time.Duration, g *gateway, end relay.End, started time.Time) relay.Outcome {
	t.Helper()
	outcome := g.outcome(t)
	if took := time.Since(started); outcome.End != end || took < limit || took > limit+late {
		t.Errorf("after %s: %+v", took, outcome)
	}
	return outcome
}

func TestPeekTimeout(t *testing.T) {
	for _, text := range []string{"", "half"} {
		p := listenPeer(t)
		last := make(chan string, 1)
		g := start(t, 1, relay.Config{PeekTimeout: short}, func() *stub {
			s := p.to()
			s.peek = func(flight []byte, now bool) bool {
				if now {
					last <- string(flight)
				}
				return true
			}
			return s
		})
		started := time.Now()
		send(t, g.dial(t), text)
		if got := <-last; got != text || time.Since(started) < short || time.Since(started) > short+late {
			t.Errorf("after %s: last peek at %q", time.Since(started), got)
		}
		expect(t, p.next(t), text)
	}
}

func TestConnectTimeout(t *testing.T) {
	leaks(t)
	full := fullQueue(t)
	p := listenPeer(t)
	g := start(t, 1, relay.Config{ConnectTimeout: short}, func() *stub {
		return &stub{hop: relay.Hop{Addrs: []netip.AddrPort{full, p.address}}}
	})
	// The second address gets its turn.
	started := time.Now()
	g.dial(t)
	p.next(t)
	if took := time.Since(started); took < short || took > short+late {
		t.Errorf("the second address was tried after %s", took)
	}

	alone := start(t, 1, relay.Config{ConnectTimeout: short}, func() *stub {
		return &stub{hop: relay.Hop{Addrs: []netip.AddrPort{full}}}
	})
	started = time.Now()
	alone.expectRefused(t)
	if outcome := ends(t, alone, relay.ConnectFailed, started); !errors.Is(outcome.Err, unix.ETIMEDOUT) || outcome.Address != full {
		t.Errorf("%+v", outcome)
	}

	// A client that goes away during the connect is noticed at once.
	slow := start(t, 1, relay.Config{}, func() *stub { return &stub{hop: relay.Hop{Addrs: []netip.AddrPort{full}}} })
	reset(t, slow.dial(t))
	if outcome := slow.outcome(t); outcome.End != relay.ClientFailed {
		t.Errorf("%+v", outcome)
	}
}

// fullQueue is an address that does not answer: its queue of connections is full.
func fullQueue(t *testing.T) netip.AddrPort {
	t.Helper()
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	t.Cleanup(func() { unix.Close(socket) })
	check(t, unix.Bind(socket, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(t, unix.Listen(socket, 0))
	name, err := unix.Getsockname(socket)
	check(t, err)
	address := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port))
	for {
		conn, err := net.DialTimeout("tcp", address.String(), 100*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { conn.Close() })
	}
}

func TestHandshakeTimeout(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 1, relay.Config{HandshakeTimeout: short}, p.through)
	started := time.Now()
	conn := g.dial(t)
	up := p.next(t)
	grant(t, up, "200 ")
	expectReset(t, conn)
	expectReset(t, up)
	if outcome := ends(t, g, relay.HandshakeFailed, started); !errors.Is(outcome.Err, os.ErrDeadlineExceeded) {
		t.Errorf("%+v", outcome)
	}
}

func TestIdleTimeout(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 1, relay.Config{IdleTimeout: longer, HalfCloseTimeout: time.Hour}, p.through)
	conn := g.dial(t)
	up := p.next(t)
	grant(t, up, granted)
	// Bytes of either side keep it open.
	var started time.Time
	for i := range times {
		time.Sleep(often)
		from, to := conn, up
		if i%2 == 1 {
			from, to = up, conn
		}
		started = time.Now()
		send(t, from, "tick")
		expect(t, to, "tick")
	}
	expectReset(t, conn)
	expectReset(t, up)
	endsAfter(t, longer, g, relay.Idle, started)

	// A closed direction has its own limit, which may be the longer one.
	conn = g.dial(t)
	up = p.next(t)
	grant(t, up, granted)
	check(t, conn.CloseWrite())
	expectEnd(t, up, "")
	time.Sleep(longer + short)
	send(t, up, "late")
	up.CloseWrite()
	expectEnd(t, conn, "late")
}

func TestHalfCloseTimeout(t *testing.T) {
	for _, who := range []string{"client", "upstream"} {
		t.Run(who, func(t *testing.T) {
			p := listenPeer(t)
			g := start(t, 1, relay.Config{IdleTimeout: time.Hour, HalfCloseTimeout: longer}, p.to)
			down := g.dial(t)
			up := p.next(t)
			a, b := down, up
			if who == "upstream" {
				a, b = up, down
			}
			send(t, a, "x")
			expect(t, b, "x")
			check(t, a.CloseWrite())
			expectEnd(t, b, "")
			var started time.Time
			for range times {
				time.Sleep(often)
				started = time.Now()
				send(t, b, "progress")
				expect(t, a, "progress")
			}
			expectReset(t, a)
			endsAfter(t, longer, g, relay.HalfClosed, started)
		})
	}
}

// TestDrain: after the cancellation flows that are under way may end, those that
// wait in the queue are taken, new ones are refused and the rest is reset.
func TestDrain(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 2, relay.Config{DrainTimeout: 2 * short}, p.to)
	ending, staying := g.dial(t), g.dial(t)
	ups := map[string]*net.TCPConn{}
	for range 2 {
		up := p.next(t)
		ups[up.LocalAddr().String()] = up
	}
	g.stop()
	eventually(t, "the sockets are closed", func() bool {
		conn, err := net.Dial("tcp", g.address)
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
	started := time.Now()
	send(t, ending, "done")
	check(t, ending.CloseWrite())
	check(t, staying.SetReadDeadline(time.Now().Add(patience)))
	expectReset(t, staying)
	if took := time.Since(started); took > 2*short+late {
		t.Errorf("drained for %s", took)
	}
	check(t, <-g.served)
	g.served <- nil
}

func TestDrainOfNothing(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 2, relay.Config{DrainTimeout: time.Hour}, p.to)
	g.stop()
	select {
	case err := <-g.served:
		g.served <- err
	case <-time.After(patience):
		t.Fatal("it drains although there is no flow")
	}
}

// TestQueue: connections that wait when the engine stops are served.
func TestQueue(t *testing.T) {
	p := listenPeer(t)
	block := make(chan struct{})
	g := start(t, 1, relay.Config{DrainTimeout: patience}, func() *stub {
		<-block
		return p.to()
	})
	var conns []*net.TCPConn
	for range 5 {
		conns = append(conns, g.dial(t))
	}
	g.stop()
	time.Sleep(short / 4) // until the flag is raised
	close(block)
	for range conns {
		up := p.next(t)
		send(t, up, "served")
		check(t, up.CloseWrite())
	}
	for _, conn := range conns {
		expectEnd(t, conn, "served")
		conn.Close()
	}
}

// TestDescriptors: a full table stops no listener, spins no loop, and is told.
func TestDescriptors(t *testing.T) {
	p := listenPeer(t)
	told := make(chan error, 100)
	g := start(t, 1, relay.Config{AcceptFailed: func(err error, _ time.Duration) { told <- err }}, p.to)
	first := g.dial(t)
	p.next(t)

	var limit unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	lowered := limit
	lowered.Cur = 100
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &lowered))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	var fillers []int
	for {
		filler, err := unix.Dup(0)
		if err != nil {
			break
		}
		fillers = append(fillers, filler)
	}
	last := len(fillers) - 1
	unix.Close(fillers[last])
	second := g.dial(t) // takes the descriptor
	if err := <-told; !errors.Is(err, unix.EMFILE) {
		t.Errorf("told of %v", err)
	}
	time.Sleep(short)
	if pauses := g.Stats().AcceptErrors; pauses > 10 {
		t.Errorf("%d tries in %s", pauses, short)
	}
	for _, filler := range fillers[:last] {
		unix.Close(filler)
	}
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	send(t, p.next(t), "served")
	expect(t, second, "served")
	first.Close()
}

// TestPipeLimit: flows without a pipe are served all the same.
func TestPipeLimit(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 1, relay.Config{MaxPipes: 1}, p.to)
	text := strings.Repeat("x", 4<<20)
	var downs []*net.TCPConn
	for range 3 {
		down := g.dial(t)
		up := p.next(t)
		go io.WriteString(up, text)
		downs = append(downs, down)
	}
	for _, down := range downs {
		expect(t, down, text)
	}
	if stats := g.Stats(); stats.Pipes != 1 {
		t.Errorf("%+v", stats)
	}
}

// TestOpenErrors: what Open refuses remains the caller's.
func TestOpenErrors(t *testing.T) {
	leaks(t)
	if _, err := relay.Open(relay.Config{}); err == nil {
		t.Error("an engine without sockets")
	}
	socket, _ := listen(t, "127.0.0.1:0")
	if _, err := relay.Open(relay.Config{Sockets: [][]int{{socket}, {-1}}}); err == nil {
		t.Error("an engine with a bad socket")
	}
	check(t, unix.Close(socket))

	socket, _ = listen(t, "127.0.0.1:0")
	engine, err := relay.Open(relay.Config{Sockets: [][]int{{socket}}})
	check(t, err)
	engine.Close()
}
