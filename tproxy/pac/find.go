package pac

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

const (
	// maxResults bounds the answers that are kept, at about 300 bytes each. A
	// result more than that pushes out any other.
	maxResults = 4096

	// maxWaiting bounds the evaluations that run or wait for an evaluator. At
	// runLimit each, the last would wait longer than clients do.
	maxWaiting = 256

	// resultLife is how long an answer holds that the script would give again:
	// until the script or the network changes, which both throw it away. This
	// bound is for what neither tells: that a variable of the script has changed.
	resultLife = 10 * time.Minute

	// failureLife is how long a host for which the script failed is not tried
	// again; each failure may cost runLimit of CPU time.
	failureLife = 10 * time.Second
)

// target is what an answer is for and holds for: scripts see nothing else. The
// scheme is part of it because scripts commonly send http and https to different
// proxies, and the port because the url has it.
type target struct {
	scheme string
	host   string // in lower case, without a dot at its end
	port   uint16
}

// newTarget checks what comes from a client: a name with anything else in it than
// names have could make another URL of it.
func newTarget(scheme, host string, port uint16) (target, error) {
	if scheme != "http" && scheme != "https" {
		return target{}, fmt.Errorf("scheme %.20q: scripts know http and https", scheme)
	}
	if !plainName(host) {
		address, err := netip.ParseAddr(host)
		if err != nil {
			return target{}, fmt.Errorf("%.80q is neither a name nor an address", host)
		}
		host = address.Unmap().WithZone("").String()
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "" {
		return target{}, errors.New("the root of all names is not a host")
	}
	return target{scheme, host, port}, nil
}

// url is what the script sees: the port is left out where it is the scheme's.
func (t target) url() string {
	host := t.host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if t.scheme == "https" && t.port == 443 || t.scheme == "http" && t.port == 80 {
		return t.scheme + "://" + host + "/"
	}
	return t.scheme + "://" + net.JoinHostPort(t.host, strconv.Itoa(int(t.port))) + "/"
}

// result is an answer, or the evaluation that will give one.
type result struct {
	done    chan struct{} // closed when the rest is set
	choices []Choice
	err     error
	until   time.Time // zero as long as the evaluation is under way
}

// Find returns the ways for flows to host, a name or an address, and port, in the
// order in which to try them; there is at least one. The scheme is http for plain
// HTTP and https for everything else: what else there is goes through a proxy as
// https does, by CONNECT. Several flows to the same destination share one
// evaluation. The slice is shared too: it must not be changed.
//
// It waits for at most a few seconds (names are looked up, an evaluator is
// started), less if ctx ends. An error is a script's that threw, took too much or
// gave an answer that cannot be used, and says so in one line; it is kept for a
// while as an answer is.
func (s *Script) Find(ctx context.Context, scheme, host string, port uint16) ([]Choice, error) {
	to, err := newTarget(scheme, host, port)
	if err != nil {
		return nil, fmt.Errorf("pac: %w", err)
	}
	entry, err := s.entry(ctx, to)
	if err != nil {
		return nil, fmt.Errorf("pac: %w", err)
	}
	select {
	case <-entry.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("pac: wait for the script's answer about %s: %w", to.host, context.Cause(ctx))
	}
	if entry.err != nil {
		return nil, fmt.Errorf("pac: %s: %w", to.host, entry.err)
	}
	return entry.choices, nil
}

// Cached returns what Find would return at once, and without waiting for anything.
// It does not allocate when host is in lower case.
func (s *Script) Cached(scheme, host string, port uint16) (choices []Choice, ok bool) {
	to := target{scheme, strings.ToLower(strings.TrimSuffix(host, ".")), port}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	entry := s.results[to]
	if entry == nil || entry.err != nil || !time.Now().Before(entry.until) {
		return nil, false
	}
	return entry.choices, true
}

// entry returns the answer for a target or starts an evaluation.
func (s *Script) entry(ctx context.Context, to target) (*result, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if entry := s.results[to]; entry != nil && (entry.until.IsZero() || time.Now().Before(entry.until)) {
		return entry, nil
	}
	if s.waiting == maxWaiting {
		return nil, fmt.Errorf("%d evaluations wait already", maxWaiting)
	}
	if len(s.results) >= maxResults {
		s.forgetOne()
	}
	entry := &result{done: make(chan struct{})}
	s.results[to] = entry
	s.waiting++
	s.running.Add(1)
	// The evaluation is everybody's who waits for it, and not the flow's that came
	// first: it is not given up with that.
	go s.evaluate(context.WithoutCancel(ctx), to, s.current, entry)
	return entry, nil
}

// forgetOne takes any finished answer out: a map is walked in random order. It is
// called under the mutex.
func (s *Script) forgetOne() {
	for to, entry := range s.results {
		if !entry.until.IsZero() {
			delete(s.results, to)
			return
		}
	}
}

// evaluate completes an entry.
func (s *Script) evaluate(ctx context.Context, to target, script *version, entry *result) {
	defer s.running.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go cancelWith(ctx, s.ending, cancel)

	answer, err := s.pool.find(ctx, script, to, s)
	var choices []Choice
	if err == nil {
		choices, err = parseResult(answer.Text)
	}

	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.waiting--
	now := time.Now()
	entry.choices, entry.err = choices, err
	switch {
	case err != nil:
		entry.until = now.Add(failureLife)
	case answer.Varies:
		// The ranges of time and date change on the minute.
		entry.until = now.Truncate(time.Minute).Add(time.Minute)
	default:
		entry.until = now.Add(resultLife)
	}
	close(entry.done)
}

// cancelWith calls cancel when ending is closed, and returns when ctx ends.
func cancelWith(ctx context.Context, ending <-chan struct{}, cancel context.CancelFunc) {
	select {
	case <-ending:
		cancel()
	case <-ctx.Done():
	}
}

// forget throws all answers away. Evaluations under way answer those who wait for
// them and are not kept.
func (s *Script) forget() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	clear(s.results)
}
