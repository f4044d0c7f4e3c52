package exchange_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// plain answers every question at once.
func plain(p *peer, query []byte) { p.send(answer(query, 0)) }

func number(i int) string { return fmt.Sprintf("n%d.Example.org", i) }

func TestOneConnectionServesAll(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	for range 3 {
		if err := errors.Join(askAll(server, t.Context(), 50, number)...); err != nil {
			t.Fatal(err)
		}
	}
	if s.accepted.Load() != 1 {
		t.Errorf("%d connections", s.accepted.Load())
	}
}

func TestAnswersOutOfOrder(t *testing.T) {
	wantGoroutines(t)
	const n = 40
	var mutex sync.Mutex
	var held [][]byte
	s := (&standIn{serial: true, handle: func(p *peer, query []byte) {
		mutex.Lock()
		defer mutex.Unlock()
		if held = append(held, answer(query, 0)); len(held) == n {
			slices.Reverse(held)
			p.send(held...)
		}
	}}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	if err := errors.Join(askAll(server, t.Context(), n, number)...); err != nil {
		t.Fatal(err)
	}
}

func TestCrowdedConnectionGetsCompany(t *testing.T) {
	wantGoroutines(t)
	release := make(chan struct{})
	s := (&standIn{handle: func(p *peer, query []byte) { <-release; plain(p, query) }}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{MaxConnections: 3}))
	errs := make(chan error)
	go func() { errs <- errors.Join(askAll(server, t.Context(), 600, number)...) }()
	for s.accepted.Load() < 3 || s.asked.Load() < 600 {
		time.Sleep(time.Millisecond)
	}
	close(release)
	if err := <-errs; err != nil {
		t.Error(err)
	}
	if s.accepted.Load() != 3 {
		t.Errorf("%d connections", s.accepted.Load())
	}
}

func TestQuestionsInFlightAreBounded(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(*peer, []byte) {}}).start(t)
	for _, server := range []exchange.Server{
		exchange.NewTCP("tcp.test", s.dial, exchange.Config{MaxInFlight: 5}),
		exchange.NewUDP("udp.test", silentUDP(t).dial, nil, exchange.Config{MaxInFlight: 5}),
	} {
		ctx, cancel := context.WithCancel(t.Context())
		busy := make(chan struct{})
		errs := make(chan []error)
		go func() {
			errs <- askAll(closer{server, busy}, ctx, 8, number)
		}()
		for range 3 {
			<-busy
		}
		cancel()
		var refused int
		for _, err := range <-errs {
			if errors.Is(err, exchange.ErrBusy) {
				refused++
			} else if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		}
		if refused != 3 {
			t.Errorf("%d refused", refused)
		}
		server.Close()
	}
}

// closer tells of every ErrBusy.
type closer struct {
	exchange.Server
	busy chan<- struct{}
}

func (c closer) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	answer, err := c.Server.Exchange(ctx, query)
	if errors.Is(err, exchange.ErrBusy) {
		c.busy <- struct{}{}
	}
	return answer, err
}

func TestIdleConnectionIsClosed(t *testing.T) {
	wantGoroutines(t)
	ended := make(chan struct{})
	s := (&standIn{handle: plain, wrap: func(conn net.Conn) net.Conn { return watched{conn, ended} }}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{IdleTimeout: 50 * time.Millisecond}))
	for range 2 {
		if err := ask(server, t.Context(), "a.test"); err != nil {
			t.Fatal(err)
		}
		<-ended
	}
	if s.accepted.Load() != 2 {
		t.Errorf("%d connections", s.accepted.Load())
	}
}

// watched tells when the peer has ended the connection.
type watched struct {
	net.Conn
	ended chan<- struct{}
}

func (w watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.ended <- struct{}{}
	}
	return n, err
}

// TestServerClosesIdleConnection: whenever it does so, no question is lost.
func TestServerClosesIdleConnection(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	for i := range 200 {
		if err := ask(server, t.Context(), number(i)); err != nil {
			t.Fatal(err)
		}
		s.hangUp()
	}
}

// TestServerAnswersFewQuestionsAConnection and closes it, with others unanswered.
func TestServerAnswersFewQuestionsAConnection(t *testing.T) {
	wantGoroutines(t)
	for _, most := range []int{1, 7} {
		s := (&standIn{}).start(t)
		var mutex sync.Mutex
		answered := make(map[int]int)
		s.serial = true
		s.handle = func(p *peer, query []byte) {
			mutex.Lock()
			defer mutex.Unlock()
			p.send(answer(query, 0))
			if answered[p.number]++; answered[p.number] == most {
				p.Close()
			}
		}
		server := exchange.NewTCP("tcp.test", s.dial, exchange.Config{})
		if err := errors.Join(askAll(server, t.Context(), 100, number)...); err != nil {
			t.Errorf("%d a connection: %v", most, err)
		}
		if asked := s.asked.Load(); asked > 1000 {
			t.Errorf("%d a connection: asked %d times for 100 answers", most, asked)
		}
		server.Close()
	}
}

func TestBareErrorGetsItsQuestionBack(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(p *peer, query []byte) {
		p.send([]byte{query[0], query[1], 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0})
	}}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	q := query("a.test")
	got, err := server.Exchange(t.Context(), q)
	want := bytes.Clone(q)
	want[2], want[3] = 0x80, 1
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v", got, err)
	}
}

func TestGiantAnswer(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(p *peer, query []byte) {
		if firstLabel(query) == "giant" {
			p.send(answer(query, 65535-len(answer(query, 1))+1))
			return
		}
		p.send(answer(query, 0))
	}}).start(t)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{}))
	for range 3 {
		got, err := server.Exchange(t.Context(), query("giant.test"))
		if err != nil || len(got) != 65535 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if err := ask(server, t.Context(), "small.test"); err != nil {
			t.Fatal(err)
		}
	}
	if s.accepted.Load() != 1 {
		t.Errorf("%d connections", s.accepted.Load())
	}
}

func TestNoQuery(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain}).start(t)
	servers := []exchange.Server{
		exchange.NewTCP("a server", s.dial, exchange.Config{}),
		exchange.NewUDP("a server", silentUDP(t).dial, s.dial, exchange.Config{}),
	}
	two := query("a.test")
	two[5] = 2
	pointer := append(query("a.test")[:12], 0xc0, 12, 0, 1, 0, 1)
	for _, message := range [][]byte{nil, query("a.test")[:12], query("a.test")[:15], two, pointer, answer(query("a.test"), 0), make([]byte, 65536)} {
		for _, server := range servers {
			if _, err := server.Exchange(t.Context(), message); err == nil || !strings.Contains(err.Error(), "a server") {
				t.Errorf("%.40x: %v", message, err)
			}
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, server := range servers {
		if _, err := server.Exchange(ended, query("a.test")); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		server.Close()
		server.Close()
		if _, err := server.Exchange(t.Context(), query("a.test")); !errors.Is(err, exchange.ErrClosed) {
			t.Error(err)
		}
	}
	if s.asked.Load() > 0 {
		t.Error("something was asked")
	}
}

func TestCloseEndsQuestions(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(*peer, []byte) {}}).start(t)
	stuck := func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
	udp := silentUDP(t)
	for name, server := range map[string]exchange.Server{
		"connected": exchange.NewTCP("s", s.dial, exchange.Config{}),
		"dialling":  exchange.NewTCP("s", stuck, exchange.Config{}),
		"UDP":       exchange.NewUDP("s", udp.dial, stuck, exchange.Config{}),
	} {
		errs := make(chan []error)
		go func() { errs <- askAll(server, t.Context(), 10, number) }()
		for name == "connected" && s.asked.Load() < 10 || name == "UDP" && udp.asked.Load() < 10 {
			time.Sleep(time.Millisecond)
		}
		within(t, time.Second, name, func() {
			server.Close()
			for _, err := range <-errs {
				if !errors.Is(err, exchange.ErrClosed) {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

func TestRefusedDialFailsSoon(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: plain}).start(t)
	s.stop()
	server := closed(t, exchange.NewTCP("refused.test", s.dial, exchange.Config{}))
	for range 4 {
		within(t, time.Second, "the error", func() {
			err := ask(server, t.Context(), "a.test")
			if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), "refused.test") {
				t.Error(err)
			}
		})
	}
}
