package sniff

import (
	"math/rand/v2"
	"testing"
	"time"
)

// sniffer is what TLS and HTTP have in common.
type sniffer interface {
	Next(flight []byte) (name string, verdict Verdict)
}

// result is what a sniffer says in the end.
type result struct {
	name    string
	verdict Verdict
}

func (v Verdict) String() string {
	return [...]string{"More", "Found", "Absent"}[v]
}

// feed shows a flight to a sniffer as it grows to each of the lengths.
func feed(s sniffer, flight []byte, lengths func(yield func(int) bool)) result {
	var r result
	for n := range lengths {
		// The capacity is cut, so that looking ahead panics.
		if r.name, r.verdict = s.Next(flight[:n:n]); r.verdict != More {
			break
		}
	}
	return r
}

// whole feeds all at once.
func whole(flight []byte) func(yield func(int) bool) {
	return func(yield func(int) bool) { yield(len(flight)) }
}

// singly feeds one byte a call.
func singly(flight []byte) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for n := range len(flight) + 1 {
			if !yield(n) {
				return
			}
		}
	}
}

// randomly feeds pieces of random length.
func randomly(flight []byte, random *rand.Rand) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for n := 0; n < len(flight); n += 1 + random.IntN(1+len(flight)/2) {
			if !yield(n) {
				return
			}
		}
		yield(len(flight))
	}
}

// cut feeds a flight in several ways and fails the test when they do not all end
// in the same result, which it returns.
func cut[S any, P interface {
	*S
	sniffer
}](t *testing.T, flight []byte,
) result {
	t.Helper()
	want := feed(P(new(S)), flight, whole(flight))
	if got := feed(P(new(S)), flight, singly(flight)); got != want {
		t.Errorf("byte by byte %v, at once %v\n%q", got, want, flight)
	}
	random := rand.New(rand.NewPCG(1, uint64(len(flight))))
	for range 4 {
		if got := feed(P(new(S)), flight, randomly(flight, random)); got != want {
			t.Errorf("in pieces %v, at once %v\n%q", got, want, flight)
		}
	}
	if want.verdict != Found && want.name != "" {
		t.Errorf("%v comes with the name %q", want.verdict, want.name)
	}
	if want.verdict == Found {
		if canonical, ok := ValidName(want.name); !ok || canonical != want.name {
			t.Errorf("%q is found and is not a valid name in canonical form", want.name)
		}
	}
	if want.verdict == More && len(flight) >= MaxFlight {
		t.Errorf("%d bytes, and more are wanted", len(flight))
	}
	return want
}

// linear fails the test when feeding a flight byte by byte takes more than in
// proportion to its length. flight makes one of at most n bytes.
func linear(t *testing.T, fresh func() sniffer, flight func(n int) []byte) {
	t.Helper()
	cost := func(n int) time.Duration {
		bytes, least := flight(n), time.Hour
		for range 20 {
			s, start := fresh(), time.Now()
			feed(s, bytes, singly(bytes))
			least = min(least, time.Since(start))
		}
		return least
	}
	const short, long, slack = MaxFlight / 8, MaxFlight, 3
	// Quadratic cost makes it 64 instead of 8.
	if few, many := cost(short), cost(long); many > slack*long/short*few {
		t.Errorf("%d bytes take %v and %d bytes %v", short, few, long, many)
	}
}
