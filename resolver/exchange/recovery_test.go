package exchange_test

import (
	"context"
	"errors"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// TestServiceIsBackSoon: whatever the outage was like, and however long.
func TestServiceIsBackSoon(t *testing.T) {
	wantGoroutines(t)
	var checks sync.WaitGroup
	for _, o := range []*outage{{name: "refuses"}, {name: "closes"}, {name: "hangs"}} {
		o.handle = plain
		o.start(t)
		checks.Go(func() { o.check(t) })
	}
	checks.Wait()
}

// outage is a server that is away at times, and what dialling does then.
type outage struct {
	standIn
	name string
	down atomic.Bool
}

func (o *outage) dial(ctx context.Context) (net.Conn, error) {
	if o.down.Load() {
		switch o.name {
		case "hangs": // as a SYN that is dropped, or a proxy that does not answer
			<-ctx.Done()
			return nil, ctx.Err()
		case "closes": // as a proxy that answers before it has connected
			near, far := net.Pipe()
			far.Close()
			return near, nil
		}
	}
	return o.standIn.dial(ctx)
}

func (o *outage) check(t *testing.T) {
	server := exchange.NewGroup("group", exchange.NewTCP("tcp.test", o.dial, exchange.Config{Timeout: time.Second}))
	defer server.Close()
	for range 2 {
		if err := ask(server, t.Context(), "before.test"); err != nil {
			t.Errorf("%s: %v", o.name, err)
		}
		o.down.Store(true)
		o.stop()
		dialled := o.dials.Load()
		var asking sync.WaitGroup
		for range 20 {
			asking.Go(func() {
				for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
					if ask(server, t.Context(), "during.test") == nil {
						t.Error("an answer from nobody")
					}
				}
			})
		}
		asking.Wait()
		if dials := o.dials.Load() - dialled; dials > 20 {
			t.Errorf("%s: %d dials in 1.5 s", o.name, dials)
		}
		o.listen(t)
		o.down.Store(false)
		within(t, 1500*time.Millisecond, o.name+": the first answer", func() {
			for ask(server, t.Context(), "after.test") != nil {
			}
		})
	}
}

// TestDeadConnectionIsLeft: nothing is heard on a kept connection any more, as when a
// firewall has forgotten it.
func TestDeadConnectionIsLeft(t *testing.T) {
	wantGoroutines(t)
	var dead atomic.Int64 // connections before this one do not answer any more
	s := (&standIn{handle: func(p *peer, query []byte) {
		if int64(p.number) >= dead.Load() {
			plain(p, query)
		}
	}}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	for range 6 { // more than there may be connections
		if err := errors.Join(askAll(server, t.Context(), 100, number)...); err != nil {
			t.Fatal(err)
		}
		dead.Store(s.accepted.Load())
		within(t, 3*time.Second, "the answer", func() {
			if err := ask(server, t.Context(), "a.test"); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestWaitingCostsNothing: neither the wait for a dial, nor that for an answer, nor an
// idle connection takes the processor.
func TestWaitingCostsNothing(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(p *peer, query []byte) {
		if firstLabel(query) != "silent" {
			plain(p, query)
		}
	}}).start(t)
	var hang atomic.Bool
	hang.Store(true)
	server := closed(t, exchange.NewTCP("tcp.test", func(ctx context.Context) (net.Conn, error) {
		if hang.Load() {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return s.dial(ctx)
	}, exchange.Config{Timeout: 700 * time.Millisecond}))
	used := func() time.Duration {
		var usage unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
			t.Fatal(err)
		}
		return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	before := used()
	askAll(server, t.Context(), 100, number)
	hang.Store(false)
	askAll(server, t.Context(), 100, func(i int) string { return "silent.test" })
	time.Sleep(500 * time.Millisecond)
	if cost := used() - before; cost > 500*time.Millisecond {
		t.Errorf("%s of processor time within 1.9 s", cost)
	}
}

// TestOutageIsBounded: 10,000 questions in an outage.
func TestOutageIsBounded(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	if err := ask(server, t.Context(), "a.test"); err != nil {
		t.Fatal(err)
	}
	s.stop()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var asking sync.WaitGroup
	for range 1000 {
		asking.Go(func() {
			for i := range 10 {
				if ask(server, t.Context(), number(i)) == nil {
					t.Error("an answer from nobody")
				}
			}
		})
	}
	asking.Wait()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("%d bytes more", grown)
	}
	s.listen(t)
	within(t, time.Second, "the first answer", func() {
		for ask(server, t.Context(), "a.test") != nil {
		}
	})
}

// perSecond asks with four askers for a while and returns how many questions a second.
func perSecond(t *testing.T, ask func() error) float64 {
	t.Helper()
	const askers, limit = 4, 500 * time.Millisecond
	var asked atomic.Int64
	var asking sync.WaitGroup
	start := time.Now()
	for range askers {
		asking.Go(func() {
			for time.Since(start) < limit {
				if err := ask(); err != nil {
					t.Error(err)
					return
				}
				asked.Add(1)
			}
		})
	}
	asking.Wait()
	return float64(asked.Load()) / time.Since(start).Seconds()
}

// TestKeptConnectionsPay: 20 times the questions of one connection each, where
// connecting takes 100 ms as it does through a proxy that is not near.
func TestKeptConnectionsPay(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain, delay: 100 * time.Millisecond}).start(t)
	single := perSecond(t, func() error {
		server := exchange.NewTCP("single", s.dial, exchange.Config{})
		defer server.Close()
		return ask(server, t.Context(), "a.test")
	})
	server := closed(t, exchange.NewTCP("kept", s.dial, exchange.Config{}))
	kept := perSecond(t, func() error { return ask(server, t.Context(), "a.test") })
	t.Logf("%.0f questions a second on kept connections, %.0f with one each: %.0f times", kept, single, kept/single)
	if kept < 20*single {
		t.Errorf("%.0f and %.0f questions a second", kept, single)
	}
}

func BenchmarkTCP(b *testing.B) {
	s := (&standIn{handle: plain, serial: true}).start(b)
	benchmark(b, closed(b, exchange.NewTCP("kept", s.dial, exchange.Config{})))
}

func BenchmarkUDP(b *testing.B) {
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		d.conn.WriteToUDP(answer(query, 0), from)
	}}).start(b)
	benchmark(b, closed(b, exchange.NewUDP("udp", d.dial, nil, exchange.Config{})))
}

func benchmark(b *testing.B, server exchange.Server) {
	b.ReportAllocs()
	b.SetParallelism(16)
	b.RunParallel(func(loop *testing.PB) {
		for loop.Next() {
			if err := ask(server, b.Context(), "a.test"); err != nil {
				b.Error(err)
			}
		}
	})
}
