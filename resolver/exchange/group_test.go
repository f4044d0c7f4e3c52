package exchange_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// fake is a Server that says what it is told to.
type fake struct {
	name  string
	asked atomic.Int64

	mutex sync.Mutex
	delay time.Duration
	rcode byte
	err   error
}

func (f *fake) set(delay time.Duration, rcode byte, err error) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.delay, f.rcode, f.err = delay, rcode, err
}

func (f *fake) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	f.asked.Add(1)
	f.mutex.Lock()
	delay, rcode, err := f.delay, f.rcode, f.err
	f.mutex.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	message := withRcode(query, rcode)
	return message, err
}

func (f *fake) String() string { return f.name }
func (f *fake) Close()         {}

// took asks g and returns the time and the response code.
func took(t *testing.T, g *exchange.Group) (time.Duration, byte) {
	t.Helper()
	start := time.Now()
	got, err := g.Exchange(t.Context(), query("a.test"))
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(start), got[3] & 15
}

// inBubble runs f with two servers on synthetic time.
func inBubble(t *testing.T, f func(t *testing.T, g *exchange.Group, a, b *fake)) {
	synctest.Test(t, func(t *testing.T) {
		a, b := &fake{name: "a.test", delay: 20 * time.Millisecond}, &fake{name: "b.test", delay: 30 * time.Millisecond}
		g := exchange.NewGroup("group", a, b)
		defer g.Close()
		f(t, g, a, b)
	})
}

func TestFirstServerIsPreferred(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		for range 50 {
			took(t, g)
		}
		if a.asked.Load() != 50 || b.asked.Load() != 0 {
			t.Errorf("asked %d and %d", a.asked.Load(), b.asked.Load())
		}
		want := exchange.ServerStats{Name: "a.test", Asked: 50, Answered: 50, Healthy: true, Latency: 20 * time.Millisecond}
		if got := g.Stats().Servers[0]; got != want {
			t.Errorf("%+v", got)
		}
	})
}

func TestHedgeAfterTheUsualLatency(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		for range 50 {
			took(t, g)
		}
		a.set(time.Hour, 0, nil)
		if latency, _ := took(t, g); latency != 55*time.Millisecond {
			t.Errorf("answer after %s", latency)
		}
		if stats := g.Stats(); stats.Servers[0].Overtaken != 1 || stats.Servers[1].Answered != 1 || !stats.Servers[0].Healthy {
			t.Errorf("%+v", stats)
		}
	})
}

func TestSilentServerIsPutBehindAndComesBack(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		a.set(time.Hour, 0, nil)
		for range 3 {
			took(t, g)
		}
		if g.Stats().Servers[0].Healthy {
			t.Error("healthy after 3 questions without an answer")
		}
		for range 100 {
			if latency, _ := took(t, g); latency != 30*time.Millisecond {
				t.Fatalf("answer after %s", latency)
			}
		}
		// A hundred questions took 3 s: probes were sent, one a second.
		if asked := a.asked.Load(); asked < 4 || asked > 6 {
			t.Errorf("asked %d times", asked)
		}
		a.set(time.Millisecond, 0, nil)
		start := time.Now()
		for !g.Stats().Servers[0].Healthy {
			took(t, g)
		}
		if since := time.Since(start); since > 1100*time.Millisecond {
			t.Errorf("found out after %s", since)
		}
		before := b.asked.Load()
		if latency, _ := took(t, g); latency != time.Millisecond || b.asked.Load() != before {
			t.Errorf("answer after %s", latency)
		}
	})
}

func TestFailOver(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		broken := errors.New("ask a.test: broken")
		a.set(5*time.Millisecond, 0, broken)
		if latency, _ := took(t, g); latency != 35*time.Millisecond {
			t.Errorf("answer after %s", latency)
		}
		if stats := g.Stats().Servers[0]; stats.Healthy || stats.Failed != 1 {
			t.Errorf("%+v", stats)
		}
		if latency, _ := took(t, g); latency != 30*time.Millisecond {
			t.Errorf("answer after %s", latency)
		}

		other := errors.New("ask b.test: broken, too")
		b.set(0, 0, other)
		_, err := g.Exchange(t.Context(), query("a.test"))
		if !errors.Is(err, broken) || !errors.Is(err, other) || strings.ContainsAny(err.Error(), "\n") {
			t.Error(err)
		}
		// Both are behind: both are asked all the same, at once when one is back.
		a.set(time.Millisecond, 0, nil)
		if latency, _ := took(t, g); latency > 10*time.Millisecond {
			t.Errorf("answer after %s", latency)
		}
	})
}

// TestOneBadNameIsNotABadServer: errors while others are answered do not count.
func TestOneBadNameIsNotABadServer(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		a.set(100*time.Millisecond, 0, errors.New("no answer"))
		done := make(chan struct{})
		go func() { took(t, g); close(done) }()
		time.Sleep(time.Millisecond)
		a.set(20*time.Millisecond, 0, nil)
		took(t, g)
		<-done
		if stats := g.Stats().Servers[0]; !stats.Healthy || stats.Failed != 1 {
			t.Errorf("%+v", stats)
		}
	})
}

func TestRefusingServersAreAskedInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		for _, code := range []byte{2, 5} {
			a.set(0, code, nil)
			if _, got := took(t, g); got != 0 {
				t.Errorf("rcode %d", got)
			}
			b.set(0, 2, nil)
			if _, got := took(t, g); got != 2 {
				t.Errorf("rcode %d", got)
			}
			b.set(0, 0, errors.New("broken"))
			if _, got := took(t, g); got != code {
				t.Errorf("rcode %d", got)
			}
			b.set(0, 0, nil)
		}
		a.set(0, 3, nil) // NXDOMAIN is an answer
		if _, got := took(t, g); got != 3 {
			t.Errorf("rcode %d", got)
		}
		a.set(0, 2, nil)
		for range 8 {
			took(t, g)
		}
		if g.Stats().Servers[0].Healthy {
			t.Error("preferred although it knows nothing")
		}
	})
}

func TestGroupObeysItsCaller(t *testing.T) {
	inBubble(t, func(t *testing.T, g *exchange.Group, a, b *fake) {
		a.set(time.Hour, 0, nil)
		b.set(time.Hour, 0, nil)
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("enough"))
		defer cancel()
		start := time.Now()
		if _, err := g.Exchange(ctx, query("a.test")); err == nil || err.Error() != "ask group: enough" || time.Since(start) != time.Second {
			t.Errorf("%v after %s", err, time.Since(start))
		}
	})
	empty := exchange.NewGroup("empty")
	if _, err := empty.Exchange(t.Context(), query("a.test")); err == nil {
		t.Error("an answer from no server")
	}
}

// TestGroupCloseEndsProbes: with real servers, of which one never answers.
func TestGroupCloseEndsProbes(t *testing.T) {
	wantGoroutines(t)
	silent := silentUDP(t)
	s := (&standIn{handle: plain}).start(t)
	g := exchange.NewGroup("group",
		exchange.NewUDP("silent", silent.dial, nil, exchange.Config{}),
		exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	for g.Stats().Servers[0].Healthy {
		if err := ask(g, t.Context(), "a.test"); err != nil {
			t.Fatal(err)
		}
	}
	for before := silent.asked.Load(); silent.asked.Load() == before; time.Sleep(10 * time.Millisecond) {
		if err := ask(g, t.Context(), "a.test"); err != nil {
			t.Fatal(err)
		}
	}
	within(t, time.Second, "Close", g.Close)
	if _, err := g.Exchange(t.Context(), query("a.test")); !errors.Is(err, exchange.ErrClosed) {
		t.Error(err)
	}
	if g.String() != "group" {
		t.Error(g)
	}
}
