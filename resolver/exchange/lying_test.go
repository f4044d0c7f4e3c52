package exchange_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// announced returns a message with a length before it that is not its own.
func announced(length int, message []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(length)), message...)
}

// bad is what a server does when it is asked for the name "bad", and what becomes
// of that question.
type bad struct {
	name   string
	does   func(p *peer, query []byte)
	fails  bool // else it is answered
	serial bool // the server works off one question after the other
}

// bads returns what servers do. Those that wait do so until done is closed.
func bads(done <-chan struct{}) []bad {
	stuck := func(p *peer, _ []byte) { <-done }
	return []bad{
		{name: "length a little too long", does: func(p *peer, q []byte) { p.raw(announced(len(answer(q, 0))+7, answer(q, 0))) }, serial: true},
		{name: "length far too long", fails: true, does: func(p *peer, q []byte) { p.raw(announced(60000, answer(q, 0))) }},
		{name: "length and nothing", fails: true, does: func(p *peer, q []byte) { p.raw([]byte{255, 255}) }},
		{name: "half a length", fails: true, does: func(p *peer, q []byte) { p.raw([]byte{0}) }},
		{name: "length too short", fails: true, does: func(p *peer, q []byte) { p.raw(announced(len(q)+3, answer(q, 0))) }},
		{name: "length of half a header", fails: true, does: func(p *peer, q []byte) { p.raw(announced(5, answer(q, 0))) }},
		{name: "length 0", fails: true, does: func(p *peer, q []byte) { p.raw([]byte{0, 0}) }},
		{name: "closed in the middle", fails: true, does: func(p *peer, q []byte) { p.raw(framed(answer(q, 0))[:30]); p.Close() }},
		{name: "closed", fails: true, does: func(p *peer, q []byte) { time.Sleep(50 * time.Millisecond); p.Close() }},
		{name: "a byte at a time", fails: true, does: func(p *peer, q []byte) {
			p.mutex.Lock()
			defer p.mutex.Unlock()
			for _, b := range framed(answer(q, 0)) {
				if _, err := p.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
		}},
		{name: "never answered", fails: true, does: func(p *peer, q []byte) {}},
		{name: "slow, and others behind it", fails: true, does: stuck, serial: true},
		{name: "another id", fails: true, does: func(p *peer, q []byte) { q[0]++; p.send(answer(q, 0)) }},
		{name: "another name", fails: true, does: func(p *peer, q []byte) { q[13] = 'x'; p.send(answer(q, 0)) }},
		{name: "another case", fails: true, does: func(p *peer, q []byte) { q[13] = 'B'; p.send(answer(q, 0)) }},
		{name: "another type", fails: true, does: func(p *peer, q []byte) { q[len(q)-3] = 28; p.send(answer(q, 0)) }},
		{name: "its own query", fails: true, does: func(p *peer, q []byte) { p.send(q) }},
		{name: "compression loop", fails: true, does: func(p *peer, q []byte) {
			m := answer(q, 0)
			m[len(q)+1] = byte(len(q)) // the owner's name points at itself
			p.send(m)
		}},
		{name: "wrong and right", does: func(p *peer, q []byte) {
			wrong := answer(q, 0)
			wrong[0], wrong[13] = wrong[0]^1, 'x'
			p.send(wrong, answer(q, 0), answer(q, 0))
		}},
		{name: "many answers", fails: true, does: func(p *peer, q []byte) {
			for i := range 300 {
				strange := answer(query("strange.test"), 0)
				binary.BigEndian.PutUint16(strange, uint16(i))
				p.send(strange)
			}
			p.send(answer(q, 0))
		}},
	}
}

// TestBadAnswerIsNoOtherQuestionsConcern: whatever a server does to one question,
// the others that are asked at the same time and later are answered soon.
func TestBadAnswerIsNoOtherQuestionsConcern(t *testing.T) {
	wantGoroutines(t)
	done := make(chan struct{})
	var checks sync.WaitGroup
	for _, b := range bads(done) {
		s := (&standIn{serial: b.serial, handle: func(p *peer, query []byte) {
			if firstLabel(query) == "bad" {
				b.does(p, query)
				return
			}
			if !b.serial {
				time.Sleep(time.Duration(query[1]%20) * time.Millisecond)
			}
			p.send(answer(query, 0))
		}}).start(t)
		checks.Go(func() { b.check(t, s) })
	}
	checks.Wait()
	close(done)
}

// check asks s, which does what b says.
func (b bad) check(t *testing.T, s *standIn) {
	server := exchange.NewTCP(b.name, s.dial, exchange.Config{Timeout: 6 * time.Second})
	defer server.Close()
	if err := ask(server, t.Context(), "first.test"); err != nil {
		t.Error(err)
	}
	result := make(chan error)
	for range 2 {
		go func() { result <- ask(server, t.Context(), "bad.test") }()
	}
	within(t, 5*time.Second, b.name+": the other answers", func() {
		for range 3 {
			if err := errors.Join(askAll(server, t.Context(), 60, number)...); err != nil {
				t.Error(err)
			}
		}
	})
	for range 2 {
		if err := <-result; (err != nil) != b.fails {
			t.Errorf("the bad question: %v", err)
		}
	}
	if accepted := s.accepted.Load(); accepted > 60 {
		t.Errorf("%s: %d connections", b.name, accepted)
	}
}

// TestMismatchedAnswersAreCounted, on streams as with UDP.
func TestMismatchedAnswersAreCounted(t *testing.T) {
	wantGoroutines(t)
	s := (&standIn{handle: func(p *peer, query []byte) {
		other := bytes.Clone(query)
		other[13] ^= 0x20
		p.send(answer(other, 0), answer(query, 0))
	}}).start(t)
	group := closed(t, exchange.NewGroup("group", exchange.NewTCP("tcp.test", s.dial, exchange.Config{})))
	for range 3 {
		if err := ask(group, t.Context(), "a.test"); err != nil {
			t.Fatal(err)
		}
	}
	if stats := group.Stats().Servers[0]; stats.Mismatched != 3 || stats.Answered != 3 || stats.Name != "tcp.test" {
		t.Errorf("%+v", stats)
	}
}

// TestServerThatDoesNotRead costs no more than bounded memory and time.
func TestServerThatDoesNotRead(t *testing.T) {
	wantGoroutines(t)
	block := make(chan struct{})
	s := (&standIn{serial: true, handle: func(p *peer, query []byte) { <-block }}).start(t)
	defer close(block)
	server := closed(t, exchange.NewTCP("tcp.test", s.dial, exchange.Config{Timeout: time.Second}))
	long := append(query("a.test"), make([]byte, 60000)...)
	errs := make(chan error)
	for range 300 { // 18 MB
		go func() { _, err := server.Exchange(t.Context(), long); errs <- err }()
	}
	within(t, 3*time.Second, "the time-out", func() {
		for range 300 {
			if err := <-errs; !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		}
	})
}
