package relay

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPipes: what was left in a pipe never reaches the flow that gets one next,
// and a pool keeps to its limit.
func TestPipes(t *testing.T) {
	pool := pipes{limit: 2, counters: new(counters)}
	defer pool.trim()
	first, second := pool.take(), pool.take()
	if first == nil || second == nil || pool.take() != nil {
		t.Fatal("the limit is not 2")
	}
	n, err := unix.Write(first.write, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	first.fill, first.moved = n, 10
	pool.give(first)
	pool.give(second)
	if spliced := pool.counters.spliced.Load(); spliced != 10 {
		t.Errorf("counted %d bytes", spliced)
	}
	for range 2 {
		lent := pool.take()
		if lent == nil {
			t.Fatal("no pipe although all were given back")
		}
		if n, err := unix.Read(lent.read, make([]byte, 100)); err != unix.EAGAIN {
			t.Errorf("read %d bytes of a pipe that was just lent: %v", n, err)
		}
		defer pool.give(lent)
	}
}

// TestWait: a loop does not park while a way waits for its next turn, nor beyond
// the time of a timer.
func TestWait(t *testing.T) {
	l, err := newLoop(&Engine{}, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	done := make(chan error)
	wait := func() {
		t.Helper()
		go func() { done <- l.wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the loop has parked")
		}
	}
	l.ready = []token{{}}
	wait()
	l.ready = nil

	var f flow
	l.wheel.set(&f, time.Since(l.start)+3*tick)
	due := l.wheel.next()
	for visited := false; !visited; {
		wait()
		l.now = time.Since(l.start)
		if l.now < due {
			t.Fatalf("woken %s too early", due-l.now)
		}
		l.wheel.advance(l.now, func(*flow) { visited = true })
	}
	// A deadline that has passed does not end the next wait.
	go func() { done <- l.wait() }()
	select {
	case <-done:
		t.Error("it wakes without a reason")
	case <-time.After(2 * tick):
	}
	l.engine.loops = []*loop{l}
	l.engine.stop()
	<-done
}
