package exchange

import (
	"context"
	"fmt"
	"slices"
	"time"
)

const (
	// redial is how long a dial may take while questions wait before another is
	// started: the first may have met an outage that is over. The kernel sends a
	// lost SYN again only after 1, 3 and 7 seconds (RFC 6298).
	redial = time.Second

	// maxDials bounds the dials at the same time: with redial, one for each second
	// of the default ConnectTimeout.
	maxDials = 4

	// The pauses between dials that fail grow from the first to the last: a server
	// that is back is found after 250 ms at the latest, and one that refuses costs
	// four dials a second.
	firstPause = 30 * time.Millisecond
	lastPause  = 250 * time.Millisecond
)

// dialling is what is known of dials.
type dialling struct {
	dials    int // under way
	attempts map[*attempt]struct{}
	lastDial time.Time // when the last was started
	failures int       // dials, and connections lost without an answer, since the last answer
	failedAt time.Time // when the last of them did
	// notBefore is the end of the pause before the next dial. pauses counts as
	// failures does, but only an answer on a connection that was opened since ends
	// it: one on another tells nothing of dials.
	notBefore time.Time
	pauses    int
	// depth bounds the questions on one connection. It falls to the number of
	// answers after which the server closed one although more was asked there, and
	// grows as more are answered: some servers answer one, dnsmasq a hundred.
	depth int
}

// attempt is a dial under way.
type attempt struct {
	began  time.Time
	cancel context.CancelFunc
}

// connect opens a connection and stays with it until it ends.
func (p *pool) connect(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, p.config.ConnectTimeout)
	defer cancel()
	attempt := &attempt{time.Now(), cancel}
	p.mutex.Lock()
	p.attempts[attempt] = struct{}{}
	p.mutex.Unlock()
	link, err := p.open(limited)
	if err != nil {
		p.mutex.Lock()
		defer p.mutex.Unlock()
		p.dials--
		if _, wanted := p.attempts[attempt]; wanted {
			delete(p.attempts, attempt)
			p.dialFailed(attempt, fmt.Errorf("connect: %w", err))
		}
		p.wake()
		return
	}
	now := time.Now()
	c := &connection{pool: p, link: link, flights: make(map[uint16]flight), opened: now, heard: now, used: now}
	p.mutex.Lock()
	p.dials--
	delete(p.attempts, attempt)
	p.overtake(now)
	if p.closed || len(p.connections) >= p.limit() {
		link.close()
	} else {
		p.connections = append(p.connections, c)
		p.advance(now)
		p.wake()
	}
	p.mutex.Unlock()

	err = link.serve(c)
	p.mutex.Lock()
	p.connections = slices.DeleteFunc(p.connections, func(other *connection) bool { return other == c })
	p.mutex.Unlock()
	link.wait()
	p.mutex.Lock()
	p.lose(c, err)
	p.mutex.Unlock()
}

// overtake ends the dials that have taken so long that others were started instead.
// It is called when one has succeeded.
func (p *pool) overtake(now time.Time) {
	for attempt := range p.attempts {
		if now.Sub(attempt.began) > redial {
			p.drop(attempt)
		}
	}
}

// drop ends a dial that nobody needs any more. Its end wakes run.
func (p *pool) drop(attempt *attempt) {
	delete(p.attempts, attempt)
	attempt.cancel()
}

// dropOldest makes room for another dial.
func (p *pool) dropOldest() {
	var oldest *attempt
	for attempt := range p.attempts {
		if oldest == nil || attempt.began.Before(oldest.began) {
			oldest = attempt
		}
	}
	if oldest != nil {
		p.drop(oldest)
	}
}

// limit bounds the connections.
func (p *pool) limit() int {
	if p.serial {
		return 4 * p.config.MaxConnections
	}
	return p.config.MaxConnections
}

// plan decides whether to dial now, and when to look again unless woken.
func (p *pool) plan(now time.Time) (dial bool, next time.Duration) {
	stuck := p.short || len(p.waiting) > 0
	crowded := true
	p.watched = false
	next = p.config.IdleTimeout
	for _, c := range p.connections {
		idle := p.config.IdleTimeout - now.Sub(later(c.used, c.heard))
		if c.live > 0 {
			p.watched = true
			idle = tick
		}
		next = min(next, max(idle, tick))
		crowded = crowded && (c.live >= crowd || c.silent)
	}
	crowded = crowded && p.watched
	if p.closed || !stuck && !crowded {
		return false, next
	}
	if wait := p.notBefore.Sub(now); wait > 0 {
		return false, min(wait, next)
	}
	switch {
	case p.dials == 0:
	case !stuck:
		return false, next
	case p.dials >= maxDials:
		if wait := redial - now.Sub(p.lastDial); wait > 0 {
			return false, min(wait, next)
		}
		if len(p.attempts) == maxDials { // else one is about to end
			p.dropOldest()
		}
		return false, next
	case p.failures == 0 && p.dials < len(p.waiting) && len(p.connections) > 0 && len(p.connections)+p.dials < p.limit():
		// The server can be reached, and its connections are full.
	default:
		if wait := redial - now.Sub(p.lastDial); wait > 0 {
			return false, min(wait, next)
		}
	}
	if len(p.connections) >= p.limit() {
		if stuck {
			p.evict(now)
		}
		return false, next
	}
	p.dials++
	p.lastDial = now
	return true, 0
}

// failed takes note of a dial that failed, or a connection that answered nothing,
// which began after the last failure: else it is the same. The first is followed by
// another dial at once.
func (p *pool) failed(began time.Time) {
	if !began.After(p.failedAt) {
		return
	}
	p.failedAt = time.Now()
	p.failures++
	if p.pauses++; p.pauses > 1 {
		p.notBefore = p.failedAt.Add(min(firstPause<<min(p.pauses-2, 8), lastPause))
	}
}

// dialFailed ends the calls that wait, unless there is hope: it is the first dial
// that failed, or another is under way, or there is a connection that will do.
func (p *pool) dialFailed(attempt *attempt, err error) {
	p.failed(attempt.began)
	for _, call := range slices.Clone(p.waiting) {
		call.refused++
		hope := p.failures < 2
		if len(p.connections) > 0 {
			hope = call.refused < 2 || call.lost == 0 && call.broken == 0
		}
		if !hope && p.dials == 0 {
			p.settle(call, nil, err)
		}
	}
}
