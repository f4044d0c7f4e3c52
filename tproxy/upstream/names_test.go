package upstream

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	one   = netip.MustParseAddr("192.0.2.1")
	two   = netip.MustParseAddr("192.0.2.2")
	three = netip.MustParseAddr("2001:db8::3")
)

// nameService is a stand-in for the name service.
type nameService struct {
	answer []netip.Addr
	err    error
	delay  time.Duration
	asked  int
}

func (s *nameService) ask(ctx context.Context, _ string) ([]netip.Addr, error) {
	s.asked++
	select {
	case <-time.After(s.delay):
		return s.answer, s.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// wantAddresses asks and compares.
func wantAddresses(t *testing.T, n *names, s *nameService, want ...netip.Addr) {
	t.Helper()
	got, err := n.addresses(t.Context(), "proxy", s.ask)
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
}

func TestAddressesAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n names
		service := &nameService{answer: []netip.Addr{one, two}}
		wantAddresses(t, &n, service, one, two)
		time.Sleep(nameLife - time.Second)
		service.answer = []netip.Addr{three}
		wantAddresses(t, &n, service, one, two)
		if service.asked != 1 {
			t.Fatalf("asked %d times", service.asked)
		}
		time.Sleep(time.Second)
		wantAddresses(t, &n, service, three)

		// The name service goes away: the addresses stay, and it is not pressed.
		service.answer, service.err, service.asked = nil, errors.New("no such host"), 0
		for range 100 {
			time.Sleep(nameLife / 100)
			wantAddresses(t, &n, service, three)
		}
		for range 10 {
			wantAddresses(t, &n, service, three)
		}
		if service.asked > 2 {
			t.Errorf("asked %d times", service.asked)
		}
		service.answer, service.err = []netip.Addr{}, nil // an empty answer is none
		time.Sleep(nameRetry)
		wantAddresses(t, &n, service, three)
	})
}

func TestSlowLookupDelaysOneFlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n names
		service := &nameService{answer: []netip.Addr{one}}
		wantAddresses(t, &n, service, one)
		time.Sleep(nameLife)
		service.delay, service.answer = time.Second, []netip.Addr{two}

		var flows sync.WaitGroup
		flows.Go(func() { wantAddresses(t, &n, service, two) })
		synctest.Wait()
		start := time.Now()
		wantAddresses(t, &n, service, one)
		if time.Since(start) != 0 {
			t.Error("a flow waited though addresses were known")
		}
		flows.Wait()
	})
}

func TestFirstLookupIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n names
		service := &nameService{answer: []netip.Addr{one}, delay: time.Second}
		ctx, cancel := context.WithCancel(t.Context())
		var flows sync.WaitGroup
		flows.Go(func() {
			if _, err := n.addresses(ctx, "proxy", service.ask); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
		synctest.Wait()
		for range 50 {
			flows.Go(func() { wantAddresses(t, &n, service, one) })
		}
		synctest.Wait()
		cancel() // of the flow that asks: another asks in its place
		flows.Wait()
		if service.asked != 2 {
			t.Errorf("asked %d times", service.asked)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		var n names
		failure := errors.New("no such host")
		service := &nameService{err: failure, delay: 100 * time.Millisecond}
		var flows sync.WaitGroup
		for range 50 {
			flows.Go(func() {
				if _, err := n.addresses(t.Context(), "proxy", service.ask); !errors.Is(err, failure) {
					t.Errorf("error %v", err)
				}
			})
		}
		flows.Wait()
		if service.asked != 1 {
			t.Errorf("asked %d times", service.asked)
		}
		time.Sleep(nameRetry)
		service.answer, service.err = []netip.Addr{one}, nil
		wantAddresses(t, &n, service, one)
	})
	synctest.Test(t, func(t *testing.T) {
		var n names
		service := &nameService{delay: time.Hour}
		go n.addresses(t.Context(), "proxy", service.ask)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.addresses(ctx, "proxy", service.ask); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v of a flow that waits for another's look-up", err)
		}
	})
}

func TestWorkingAddressGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n names
		service := &nameService{answer: []netip.Addr{one, two, three}}
		wantAddresses(t, &n, service, one, two, three)
		n.worked("proxy", three)
		wantAddresses(t, &n, service, three, one, two)
		time.Sleep(nameLife)
		service.answer = []netip.Addr{two, one, three}
		wantAddresses(t, &n, service, three, two, one)
		time.Sleep(nameLife)
		service.answer = []netip.Addr{two, one}
		wantAddresses(t, &n, service, two, one)
	})
}
