package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// What a handshake ends with, wrapped as a dialer wraps it.
var (
	errDenied    = fmt.Errorf("tunnel: %w", &upstream.RefusedError{Code: 407, Denied: true})
	errForbidden = fmt.Errorf("tunnel: %w", &upstream.RefusedError{Code: 403})
)

func withCredential(t *testing.T) *upstream.Proxy {
	t.Helper()
	proxy, err := parseBasic("http://user:pass@proxy:3128")
	if err != nil {
		t.Fatal(err)
	}
	return proxy
}

// acquire fails the test if it would have to wait or is refused.
func acquire(t *testing.T, proxy *upstream.Proxy) *upstream.Lease {
	t.Helper()
	lease, ok, err := try(proxy)
	if !ok || err != nil {
		t.Fatalf("no lease: ok %v, error %v", ok, err)
	}
	return lease
}

// wantRefused fails the test if a lease is to be had.
func wantRefused(t *testing.T, proxy *upstream.Proxy) {
	t.Helper()
	if _, ok, err := try(proxy); ok || !errors.Is(err, upstream.ErrCredentialRefused) {
		t.Fatalf("ok %v, error %v; want it refused", ok, err)
	}
	if _, err := proxy.Acquire(t.Context()); !errors.Is(err, upstream.ErrCredentialRefused) {
		t.Fatalf("error %v; want it refused", err)
	}
}

// wantWait fails the test if the turn is free or the credential refused.
func wantWait(t *testing.T, proxy *upstream.Proxy) {
	t.Helper()
	if _, ok, err := try(proxy); ok || err != nil {
		t.Fatalf("ok %v, error %v; want to wait", ok, err)
	}
}

func TestNoCredential(t *testing.T) {
	proxy, err := parseBasic("http://proxy:3128")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if lease := acquire(t, proxy); lease != nil {
			t.Fatal("a lease of nothing")
		}
		lease, err := proxy.Acquire(t.Context())
		if lease != nil || err != nil {
			t.Fatal(lease, err)
		}
		lease.Settle(errDenied)
	}
	proxy.Reset()
}

// TestSingleFlight starts 100 flows at once on an untried credential.
func TestSingleFlight(t *testing.T) {
	for _, test := range []struct {
		name    string
		outcome error
		sent    int64
	}{{"refused", errDenied, 1}, {"accepted", nil, 100}} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				proxy := withCredential(t)
				var sent, alone, refused atomic.Int64
				var flows sync.WaitGroup
				for range 100 {
					flows.Go(func() {
						lease, err := proxy.Acquire(t.Context())
						if errors.Is(err, upstream.ErrCredentialRefused) {
							refused.Add(1)
							return
						}
						if err != nil {
							t.Error(err)
							return
						}
						if sent.Add(1) == 1 {
							time.Sleep(time.Second)
							alone.Store(sent.Load())
						}
						lease.Settle(test.outcome)
					})
				}
				flows.Wait()
				if alone.Load() != 1 || sent.Load() != test.sent || refused.Load() != 100-test.sent {
					t.Errorf("%d sent before the first answer, %d in all, %d refused", alone.Load(), sent.Load(), refused.Load())
				}
			})
		})
	}
}

// TestTurnIsPassed: answers that say nothing about the credential leave it untried,
// and the flows get their turn one after the other.
func TestTurnIsPassed(t *testing.T) {
	outcomes := []error{
		errForbidden,
		&upstream.RefusedError{Code: 502},
		os.ErrDeadlineExceeded,
		io.ErrUnexpectedEOF,
		context.Canceled,
	}
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		var order []int
		var trying atomic.Int64
		var flows sync.WaitGroup
		for i, outcome := range outcomes {
			flows.Go(func() {
				lease, err := proxy.Acquire(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if trying.Add(1) != 1 {
					t.Error("two at a time")
				}
				order = append(order, i)
				time.Sleep(time.Second)
				trying.Add(-1)
				lease.Settle(outcome)
			})
			synctest.Wait() // in line
		}
		flows.Wait()
		if fmt.Sprint(order) != "[0 1 2 3 4]" {
			t.Errorf("order %v", order)
		}
		acquire(t, proxy).Settle(errDenied)
		wantRefused(t, proxy)
	})
}

// TestSlowAnswer: after 2 s the next may try, and either answer counts.
func TestSlowAnswer(t *testing.T) {
	for _, test := range []struct {
		name          string
		first, second error
		refused       bool
	}{
		{"late refusal", errDenied, errForbidden, true},
		{"late tunnel", nil, errForbidden, false},
		{"refusal", errForbidden, errDenied, true},
		{"tunnel then refusal of the slow one", errDenied, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				proxy := withCredential(t)
				slow := acquire(t, proxy)
				start := time.Now()
				next, err := proxy.Acquire(t.Context())
				if waited := time.Since(start); err != nil || waited != 2*time.Second {
					t.Fatalf("waited %s, error %v", waited, err)
				}
				wantWait(t, proxy)
				next.Settle(test.second)
				slow.Settle(test.first)
				if test.refused {
					wantRefused(t, proxy)
				} else {
					acquire(t, proxy)
					acquire(t, proxy)
				}
			})
		})
	}
	t.Run("nobody in line", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			proxy := withCredential(t)
			slow := acquire(t, proxy)
			time.Sleep(1999 * time.Millisecond)
			wantWait(t, proxy)
			time.Sleep(2 * time.Millisecond)
			next := acquire(t, proxy)
			slow.Settle(errForbidden) // must not free the turn of the next
			wantWait(t, proxy)
			next.Settle(errForbidden)
			acquire(t, proxy).Settle(nil)
		})
	})
}

func TestWaitingIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		first := acquire(t, proxy)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := proxy.Acquire(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Second {
			t.Errorf("error %v after %s", err, time.Since(start))
		}
		first.Settle(errForbidden)
		acquire(t, proxy) // the turn was not given to the one that left

		// The turn and the cancellation at the same moment: never lost.
		for range 100 {
			proxy := withCredential(t)
			first := acquire(t, proxy)
			ctx, cancel := context.WithCancel(t.Context())
			var flows sync.WaitGroup
			flows.Go(func() {
				if lease, err := proxy.Acquire(ctx); err == nil {
					lease.Settle(errForbidden)
				}
			})
			synctest.Wait()
			cancel()
			first.Settle(errForbidden)
			flows.Wait()
			acquire(t, proxy)
		}
	})
}

// TestSuspended: a credential that was accepted is retried alone, after growing
// pauses.
func TestSuspended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		acquire(t, proxy).Settle(nil)
		inFlight := acquire(t, proxy)
		acquire(t, proxy).Settle(errForbidden)
		acquire(t, proxy).Settle(io.ErrUnexpectedEOF)
		acquire(t, proxy).Settle(errDenied)
		wantRefused(t, proxy)
		if _, _, err := try(proxy); !strings.Contains(err.Error(), "one more try in 1m0s") {
			t.Errorf("error %v", err)
		}

		for _, minutes := range []int{1, 2, 4, 8, 15, 15, 15} {
			time.Sleep(time.Duration(minutes)*time.Minute - time.Second)
			inFlight.Settle(errDenied) // one change of state, whoever else is refused
			inFlight.Settle(nil)
			wantRefused(t, proxy)
			time.Sleep(time.Second)
			retry := acquire(t, proxy)
			wantRefused(t, proxy)
			retry.Settle(errDenied)
			wantRefused(t, proxy)
		}

		time.Sleep(15 * time.Minute)
		acquire(t, proxy).Settle(errForbidden) // which leaves the retry to the next flow
		acquire(t, proxy).Settle(os.ErrDeadlineExceeded)
		wantRefused(t, proxy)
		time.Sleep(15 * time.Minute)
		acquire(t, proxy).Settle(nil)
		first, second := acquire(t, proxy), acquire(t, proxy)
		if first != second {
			t.Error("an accepted credential is not shared")
		}

		first.Settle(errDenied) // the pauses start again
		time.Sleep(time.Minute)
		acquire(t, proxy).Settle(nil)
		acquire(t, proxy)
	})
}

// TestLateRetry: the answer to a retry that took longer than its pause is of no
// account.
func TestLateRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		acquire(t, proxy).Settle(nil)
		acquire(t, proxy).Settle(errDenied)
		time.Sleep(time.Minute)
		slow := acquire(t, proxy)
		time.Sleep(time.Minute)
		next := acquire(t, proxy)
		slow.Settle(errForbidden)
		wantRefused(t, proxy)
		next.Settle(nil)
		acquire(t, proxy)
	})
}

// TestRefusedAtOnce: of the flows that an accepted credential's change of password
// caught, all see their refusal and the state changes once.
func TestRefusedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		acquire(t, proxy).Settle(nil)
		var leases []*upstream.Lease
		for range 100 {
			leases = append(leases, acquire(t, proxy))
		}
		var flows sync.WaitGroup
		for _, lease := range leases {
			flows.Go(func() { lease.Settle(errDenied) })
		}
		flows.Wait()
		wantRefused(t, proxy)
		time.Sleep(time.Minute) // not two: none of the 100 counted as a retry
		acquire(t, proxy).Settle(nil)
	})
}

func TestReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy := withCredential(t)
		first := acquire(t, proxy)
		proxy.Reset() // nothing was refused: still one at a time
		wantWait(t, proxy)
		first.Settle(errDenied)
		time.Sleep(24 * time.Hour)
		wantRefused(t, proxy)

		proxy.Reset()
		again := acquire(t, proxy)
		wantWait(t, proxy)
		again.Settle(errDenied)
		wantRefused(t, proxy)

		proxy.Reset()
		acquire(t, proxy).Settle(nil)
		standing := acquire(t, proxy)
		proxy.Reset()
		if acquire(t, proxy) != standing {
			t.Error("Reset touched an accepted credential")
		}
		standing.Settle(errDenied)
		time.Sleep(time.Minute)
		retry := acquire(t, proxy)
		proxy.Reset()
		fresh := acquire(t, proxy)
		retry.Settle(errDenied) // of before the Reset
		wantWait(t, proxy)
		fresh.Settle(nil)
		acquire(t, proxy)
	})
}

func TestAcceptedCostsNothing(t *testing.T) {
	proxy := withCredential(t)
	acquire(t, proxy).Settle(nil)
	ctx := t.Context()
	if allocations := testing.AllocsPerRun(100, func() {
		lease, err := proxy.Acquire(ctx)
		if err != nil {
			t.Fatal(err)
		}
		lease.Settle(nil)
	}); allocations > 0 {
		t.Errorf("%v allocations", allocations)
	}
}

// try is Acquire without the wait: ok is false, without an error, where that would
// wait.
func try(p *upstream.Proxy) (lease *upstream.Lease, ok bool, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	lease, err = p.Acquire(ctx)
	if errors.Is(err, context.Canceled) {
		return nil, false, nil
	}
	return lease, err == nil, err
}

func TestStandingIsTheLeaseOfAnAcceptedCredential(t *testing.T) {
	open, err := parseBasic("http://proxy.test:3128")
	if err != nil {
		t.Fatal(err)
	}
	if lease, ok := open.Standing(); lease != nil || !ok {
		t.Errorf("without a credential: %v, %t", lease, ok)
	}
	proxy, err := parseBasic("http://user:password@proxy.test:3128")
	if err != nil {
		t.Fatal(err)
	}
	if lease, ok := proxy.Standing(); lease != nil || ok {
		t.Errorf("untried: %v, %t", lease, ok)
	}
	first, err := proxy.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first.Settle(nil)
	lease, ok := proxy.Standing()
	if lease == nil || !ok {
		t.Fatalf("accepted: %v, %t", lease, ok)
	}
	lease.Settle(&upstream.RefusedError{Code: 407, Denied: true})
	if lease, ok := proxy.Standing(); lease != nil || ok {
		t.Errorf("suspended: %v, %t", lease, ok)
	}
}

// TestJoin: one account is one credential, at however many proxies.
func TestJoin(t *testing.T) {
	parse := func(url string) *upstream.Proxy {
		proxy, err := parseBasic(url)
		if err != nil {
			t.Fatal(err)
		}
		return proxy
	}
	for _, test := range []struct {
		a, b   string
		same   bool
		shared bool // what one is refused, the other is
	}{
		{"http://u:p@h:3128", "http://u:p@h:3128/", true, true},
		{"http://u:p@h", "u:p@h:3128", true, true},
		{"http://u:p@h:3128", "http://u:p@other:3128", false, true},
		{"http://u:p@h:3128", "http://u:q@h:3128", false, false},
		{"http://u:p@h:3128", "http://h:3128", false, false},
		{"http://h:3128", "http://h:3128", true, false},
		{"socks5://u:p@h:3128", "http://u:p@h:3128", false, true},
		{"socks5://u:p@h", "socks5h://u:p@h:1080", true, true},
		{"socks5://h:3128", "http://h:3128", false, false},
	} {
		a, b := parse(test.a), parse(test.b)
		if same := a.Join(b); same != test.same {
			t.Errorf("%s, %s: same %t", test.a, test.b, same)
		}
		lease, _, _ := try(b)
		lease.Settle(&upstream.RefusedError{Code: 407, Denied: true})
		if _, _, err := try(a); errors.Is(err, upstream.ErrCredentialRefused) != test.shared {
			t.Errorf("%s, %s: after a refusal of the second, the first: %v", test.a, test.b, err)
		}
	}
	var none *upstream.Proxy
	if !none.Join(nil) || none.Join(parse("http://h:3128")) || parse("http://h:3128").Join(nil) {
		t.Error("no proxy is the same as no proxy only")
	}
}
