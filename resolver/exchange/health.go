package exchange

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

const (
	// probePause is the time between two probes of a server that was put behind.
	probePause = time.Second

	// maxMisses is how many questions in a row a server may be overtaken in, or
	// given up on by the caller after a long wait, before it is put behind. An
	// error without any answer meanwhile is enough by itself.
	maxMisses = 3

	// longWait is the wait after which a question that the caller gives up on counts
	// against the server.
	longWait = time.Second

	// maxContradicted is the same for questions in a row to which it said SERVFAIL
	// or REFUSED and another server knew the answer. One name may be at fault.
	maxContradicted = 8

	// The next server is asked after the usual latency of the first and a quarter of
	// it, within these bounds. Below the first, scheduling alone makes for hedges; clients notice
	// what is above the second.
	minPatience = 10 * time.Millisecond
	maxPatience = time.Second
	// newPatience is the same for a server of which too little is known.
	newPatience = 200 * time.Millisecond

	// recentAnswers is how many latencies are kept of each server. The usual
	// latency is found anew after a quarter of that.
	recentAnswers = 64
)

// member is a server in a group and what is known of its health.
type member struct {
	server Server

	mutex                              sync.Mutex
	asked, answered, failed, overtaken int64
	behind                             bool
	nextProbe                          time.Time
	lastAnswer                         time.Time
	misses, contradictions             int
	latencies                          [recentAnswers]time.Duration // a ring
	measured                           int                          // all that were ever put into latencies
	usual, median                      time.Duration                // 95th and 50th percentile; 0: not known
}

// exchange asks the server. The caller waits for ctx; limited ends before it when
// another server has answered.
func (m *member) exchange(ctx, limited context.Context, query []byte) outcome {
	start := time.Now()
	m.mutex.Lock()
	m.asked++
	m.mutex.Unlock()
	answer, err := m.server.Exchange(limited, query)
	o := outcome{m, answer, err}
	end := time.Now()
	took := end.Sub(start)

	m.mutex.Lock()
	defer m.mutex.Unlock()
	switch {
	case err == nil:
		m.answered++
		m.lastAnswer = end
		m.misses = 0
		m.measure(took)
		if o.good() {
			m.behind = false
			m.contradictions = 0
		}
	case errors.Is(err, ErrClosed), errors.Is(err, ErrBusy):
		m.failed++ // neither says anything about the server
	case limited.Err() != nil && ctx.Err() == nil:
		m.overtaken++
		m.measure(took) // at least; without it slow answers would not count
		m.miss(start, end)
	case ctx.Err() != nil:
		if took > longWait {
			m.failed++
			m.miss(start, end)
		}
	default:
		m.failed++
		if !m.lastAnswer.After(start) {
			m.misses = maxMisses
		}
		m.miss(start, end)
	}
	return o
}

// miss takes note of a question that was not answered. One that was while others
// were may be at fault itself. The caller holds the mutex.
func (m *member) miss(start, now time.Time) {
	if m.lastAnswer.After(start) {
		return
	}
	if m.misses++; m.misses >= maxMisses {
		m.putBehind(now)
	}
}

func (m *member) putBehind(now time.Time) {
	if !m.behind {
		m.behind = true
		m.nextProbe = now.Add(probePause)
	}
}

// contradicted takes note that another server knew what this one did not.
func (m *member) contradicted(now time.Time) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.contradictions++; m.contradictions >= maxContradicted {
		m.putBehind(now)
	}
}

// measure takes note of a latency. The caller holds the mutex.
func (m *member) measure(latency time.Duration) {
	m.latencies[m.measured%recentAnswers] = latency
	m.measured++
	if m.measured%(recentAnswers/4) != 0 && m.median != 0 {
		return
	}
	sorted := m.latencies
	recent := sorted[:min(m.measured, recentAnswers)]
	slices.Sort(recent)
	m.median = recent[len(recent)/2]
	if len(recent) >= recentAnswers/4 {
		m.usual = recent[len(recent)*95/100]
	}
}

func (m *member) healthy() bool {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	return !m.behind
}

// probeDue reports whether to probe now, and expects the caller to do it.
func (m *member) probeDue(now time.Time) bool {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if !m.behind || now.Before(m.nextProbe) {
		return false
	}
	m.nextProbe = now.Add(probePause)
	return true
}

// patience is how long to wait for the server before the next is asked as well.
func (m *member) patience() time.Duration {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.usual == 0 {
		return newPatience
	}
	return min(max(m.usual+m.usual/4, minPatience), maxPatience)
}

func (m *member) stats() ServerStats {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	stats := ServerStats{
		Name: m.server.String(), Asked: m.asked, Answered: m.answered, Failed: m.failed,
		Overtaken: m.overtaken, Healthy: !m.behind, Latency: m.median,
	}
	if counter, ok := m.server.(interface{ mismatched() int64 }); ok {
		stats.Mismatched = counter.mismatched()
	}
	return stats
}
