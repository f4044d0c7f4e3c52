//go:build !nopac

package pac

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestCachedDoesNotAllocate(t *testing.T) {
	s := open(t, "testdata/corporate.pac")
	if _, ok := s.Cached("https", "www.example.com", 443); ok {
		t.Error("an answer before anybody asked")
	}
	if _, err := s.Find(t.Context(), "https", "www.example.com", 443); err != nil {
		t.Fatal(err)
	}
	if allocated := testing.AllocsPerRun(100, func() {
		if choices, ok := s.Cached("https", "www.example.com", 443); !ok || len(choices) != 2 {
			t.Error("no answer")
		}
	}); allocated != 0 {
		t.Errorf("%v allocations", allocated)
	}
	if _, ok := s.Cached("http", "www.example.com", 443); ok {
		t.Error("the answer for https is given for http")
	}
	if _, ok := s.Cached("https", "www.example.com", 444); ok {
		t.Error("the answer for a port is given for another")
	}
	s.Refresh()
	if _, ok := s.Cached("https", "www.example.com", 443); ok {
		t.Error("the answer outlives a refresh")
	}
}

// What may differ the next time is kept for the rest of the minute.
func TestLifeOfAnswers(t *testing.T) {
	for script, short := range map[string]bool{"direct": false, "hash": false, "functions": true, "times": true, "date": true, "random": true, "resolved": true} {
		s := open(t, "testdata/"+script+".pac")
		if _, err := s.Find(t.Context(), "https", "week.example", 443); err != nil {
			t.Fatal(err)
		}
		s.mutex.Lock()
		left := time.Until(s.results[target{"https", "week.example", 443}].until)
		s.mutex.Unlock()
		if short != (left <= time.Minute) {
			t.Errorf("%s: the answer is kept for %v", script, left)
		}
	}
}

// A failure is kept too, but not given by Cached.
func TestFailureIsNotTriedAgainAtOnce(t *testing.T) {
	s := open(t, "testdata/endless.pac")
	_, err := s.Find(t.Context(), "https", "www.example", 443)
	start := time.Now()
	_, again := s.Find(t.Context(), "https", "www.example", 443)
	if err == nil || again == nil || err.Error() != again.Error() || time.Since(start) > runLimit/2 {
		t.Errorf("after %v: %v and %v", time.Since(start), err, again)
	}
	if _, ok := s.Cached("https", "www.example", 443); ok {
		t.Error("Cached gives a failure")
	}
}

// Flows to one host share one evaluation, and it outlives the flow that came first.
func TestSingleFlight(t *testing.T) {
	names := new(resolver)
	s, err := Open(t.Context(), configure("testdata/slow-dns.pac", names))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Find(short, "https", "www.example", 443); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the first: %v", err)
	}
	var flows sync.WaitGroup
	for range 100 {
		flows.Go(func() {
			if choices, err := s.Find(t.Context(), "https", "www.example", 443); err != nil || show(choices) != "http://inside:1" {
				t.Errorf("%v, %v", choices, err)
			}
		})
	}
	flows.Wait()
	if asked := names.asked.Load(); asked != 1 {
		t.Errorf("%d look-ups", asked)
	}
}

// Many flows, fresh and cached, to good and bad hosts, while the script changes.
func TestConcurrency(t *testing.T) {
	script := func(version string) string {
		return `function FindProxyForURL(url, host) {
			if (host == "bomb.example") return "x".repeat(1e9);
			if (host == "throw.example") throw host;
			return "PROXY ` + version + `." + host + ":1";
		}`
	}
	file := write(t, script("v0"))
	s := open(t, file)
	ctx, cancel := context.WithCancel(t.Context())
	var flows sync.WaitGroup
	for i := range 16 {
		flows.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				host := "host" + strconv.Itoa((i*7+k)%300) + ".example"
				switch k % 50 {
				case 1:
					host = "throw.example"
				case 2:
					host = "bomb.example"
				}
				choices, ok := s.Cached("https", host, 443)
				var err error
				if !ok {
					choices, err = s.Find(t.Context(), "https", host, 443)
				}
				if strings.HasPrefix(host, "host") && err != nil && !strings.Contains(err.Error(), "is not evaluated for") {
					t.Error(err)
				} else if err == nil && (len(choices) != 1 || !strings.HasSuffix(choices[0].Proxy, "."+host+":1")) {
					t.Errorf("%s: %v", host, choices)
				}
			}
		})
	}
	for version := 1; version <= 10; version++ {
		time.Sleep(100 * time.Millisecond)
		if err := os.WriteFile(file, []byte(script(fmt.Sprintf("v%d", version))), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.renew(ctx); err != nil {
			t.Error(err)
		}
		s.Refresh()
	}
	cancel()
	flows.Wait()
	s.pool.forgive() // the last may all have been bombs
	choices, err := s.Find(t.Context(), "https", "last.example", 443)
	if err != nil || show(choices) != "http://v10.last.example:1" {
		t.Errorf("after the last change: %v, %v", choices, err)
	}
	s.pool.mutex.Lock()
	if n := len(s.pool.all); n > maxEvaluators {
		t.Errorf("%d evaluators", n)
	}
	s.pool.mutex.Unlock()
}

// Evaluations that wait are bounded, and so are the answers kept.
func TestBounds(t *testing.T) {
	s := open(t, "testdata/dead-dns.pac")
	var flows sync.WaitGroup
	for i := range maxWaiting {
		flows.Go(func() {
			// Close ends them all.
			_, _ = s.Find(t.Context(), "https", "host"+strconv.Itoa(i), 443)
		})
	}
	for {
		s.mutex.Lock()
		full := s.waiting == maxWaiting
		s.mutex.Unlock()
		if full {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if _, err := s.Find(t.Context(), "https", "one.more", 443); err == nil || !strings.Contains(err.Error(), "256 evaluations wait already") {
		t.Errorf("one more: %v", err)
	}
	start := time.Now()
	s.Close()
	flows.Wait()
	if took := time.Since(start); took > time.Second {
		t.Errorf("Close took %v", took)
	}
	if _, err := s.Find(t.Context(), "https", "afterwards", 443); !errors.Is(err, errClosed) {
		t.Errorf("after Close: %v", err)
	}

	filled := open(t, "testdata/direct.pac")
	for i := range maxResults + 100 {
		filled.mutex.Lock()
		if len(filled.results) < maxResults {
			filled.results[target{"https", strconv.Itoa(i), 1}] = &result{until: time.Now()}
		}
		filled.mutex.Unlock()
	}
	for i := range 100 {
		if _, err := filled.Find(t.Context(), "https", "new"+strconv.Itoa(i), 443); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(filled.results); n > maxResults {
		t.Errorf("%d answers are kept", n)
	}
}

// A script that fails for every host must not keep the machine busy.
func TestDeathsInARowPause(t *testing.T) {
	s := open(t, "testdata/bomb-repeat.pac")
	var last error
	for i := range deathsInARow + 1 {
		_, last = s.Find(t.Context(), "https", "host"+strconv.Itoa(i), 443)
	}
	if last == nil || !strings.Contains(last.Error(), "the script is not evaluated for 1s: the last 3 times it took too much memory or time") {
		t.Errorf("got %v", last)
	}
}

// What earlier calls have left behind is not a flow's failure.
func TestLeakIsCleanedUp(t *testing.T) {
	s := open(t, "testdata/bomb-leak.pac")
	for i := range 30 { // 10 MB each
		if _, err := s.Find(t.Context(), "https", "host"+strconv.Itoa(i), 443); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
}

func TestAlertsAreBounded(t *testing.T) {
	synctest.Test(t, func(*testing.T) {
		var a allowance
		taken := 0
		for range 100 {
			if a.take(time.Now()) {
				taken++
			}
		}
		time.Sleep(time.Minute)
		if taken != maxAlertsPerMinute || !a.take(time.Now()) {
			t.Errorf("%d taken", taken)
		}
	})
}

// What a flow pays whose destination is known, and one whose is not.
func BenchmarkCached(b *testing.B) {
	s := open(b, "testdata/corporate.pac")
	if _, err := s.Find(b.Context(), "https", "www.example.com", 443); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, ok := s.Cached("https", "www.example.com", 443); !ok {
			b.Fatal("no answer")
		}
	}
}

func BenchmarkFind(b *testing.B) {
	s := open(b, "testdata/corporate.pac")
	for i := 0; b.Loop(); i++ {
		if _, err := s.Find(b.Context(), "https", "host"+strconv.Itoa(i)+".example.com", 443); err != nil {
			b.Fatal(err)
		}
	}
}
