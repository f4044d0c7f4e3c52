package relay

import (
	"math/rand/v2"
	"testing"
	"time"
)

// TestWheel compares the wheel with what it promises, for random times up to
// beyond its horizon: no flow is visited early, none later than a tick after the
// time, none twice, none that was removed.
func TestWheel(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var w wheel
	var now time.Duration
	due := make(map[*flow]time.Duration)
	flows := make([]flow, 500)
	visits := 0
	for round := range 20_000 {
		f := &flows[random.IntN(len(flows))]
		switch random.IntN(4) {
		case 0:
			w.remove(f)
			delete(due, f)
		default:
			// Spread over all orders of magnitude, from less than a tick to 100 days.
			at := now + time.Duration(random.Int64N(1<<(20+random.IntN(34))))
			if before, in := due[f]; !in || at < before {
				due[f] = at
			}
			w.set(f, at)
		}
		next := w.next()
		for f, at := range due {
			if next > at+tick {
				t.Fatalf("round %d: the next visit is at %s, but a flow is due at %s (slot %d)", round, next, at, f.at)
			}
		}
		if random.IntN(3) == 0 {
			now += time.Duration(random.Int64N(1 << (20 + random.IntN(31))))
		} else if next != never {
			now = max(now, next)
		}
		w.advance(now, func(f *flow) {
			visits++
			at, in := due[f]
			if !in || at > now {
				t.Fatalf("round %d, %s: visit of a flow that is due at %s (%t)", round, now, at, in)
			}
			delete(due, f)
			if random.IntN(10) == 0 {
				other := &flows[random.IntN(len(flows))]
				w.remove(other)
				delete(due, other)
			}
		})
		for _, at := range due {
			if at < now-tick {
				t.Fatalf("round %d: at %s a flow that was due at %s was not visited", round, now, at)
			}
		}
	}
	if visits < 1000 {
		t.Errorf("only %d visits", visits)
	}
}

// TestWheelCascades: an entry that lies far ahead costs few visits of the loop.
func TestWheelCascades(t *testing.T) {
	var w wheel
	var f flow
	w.set(&f, 24*time.Hour)
	steps := 0
	for visited := false; !visited; steps++ {
		w.advance(w.next(), func(*flow) { visited = true })
	}
	if steps > wheelLevels {
		t.Errorf("%d wake-ups for one time-out", steps)
	}
	if w.next() != never {
		t.Errorf("an empty wheel wakes at %s", w.next())
	}
}

// TestSlab: a token finds its flow until that ends, and never the next one.
func TestSlab(t *testing.T) {
	var s slab
	live := make(map[token]*flow)
	var stale []token
	random := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		if random.IntN(2) == 0 || len(live) == 0 {
			f := s.take()
			if f.when != 0 || f.session != nil || f.stage != vacant {
				t.Fatal("a new flow is not empty")
			}
			f.stage = relaying
			live[f.token(upstream)] = f
		} else {
			for name, f := range live {
				s.give(f)
				delete(live, name)
				stale = append(stale, name)
				break
			}
		}
	}
	for name, f := range live {
		if found, at := s.find(name); found != f || at != upstream {
			t.Fatalf("%+v finds %p, %d", name, found, at)
		}
	}
	for _, name := range stale {
		if found, _ := s.find(name); found != nil {
			t.Fatalf("%+v of an ended flow finds one", name)
		}
	}
	n := 0
	s.each(func(*flow) { n++ })
	if n != len(live) || s.used != len(live) {
		t.Errorf("%d and %d flows, want %d", n, s.used, len(live))
	}
	if chunks := len(s.chunks); chunks > 10 {
		t.Errorf("%d chunks: slots are not used again", chunks)
	}
}
