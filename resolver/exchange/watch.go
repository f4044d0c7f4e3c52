package exchange

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"
)

const (
	// tick is how often connections with questions on them are looked at.
	tick = 100 * time.Millisecond

	// A connection with questions on it is silent when nothing has been heard for
	// four times as long as answers usually take, within these bounds. The lower is
	// what a recursive server needs for a name that is not in its cache.
	minSilence = 400 * time.Millisecond
	maxSilence = 2 * time.Second

	// evictSilence is the silence after which a connection makes room for another
	// one: that of a server that has long been asked elsewhere.
	evictSilence = 2 * time.Second

	// hopeless is the number of failures in a row after which no question is to blame.
	hopeless = 5
)

var (
	errSilent = errors.New("the connection was silent for long")
	errEnded  = errors.New("the server closed the connection without an answer")
)

// run dials when connections are wanted and watches those that there are, until
// ctx is done and all of them have ended.
func (p *pool) run(ctx context.Context) {
	defer close(p.ended)
	var running sync.WaitGroup
	defer running.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		p.mutex.Lock()
		now := time.Now()
		p.inspect(now)
		dial, next := p.plan(now)
		p.mutex.Unlock()
		if dial {
			running.Go(func() { p.connect(ctx) })
			continue
		}
		timer.Reset(next)
		select {
		case <-ctx.Done():
			return
		case <-p.awake:
		case <-timer.C:
		}
	}
}

// inspect finds connections that are of no use, and silent ones, whose questions
// it asks elsewhere as well. The caller holds the mutex, as those of all methods
// below do.
func (p *pool) inspect(now time.Time) {
	p.short = false
	for _, c := range p.connections {
		if err := c.link.check(now); err != nil {
			if id, _, ok := c.link.partial(); ok && id >= 0 && c.flights[uint16(id)].call != nil {
				c.blamed = true
				c.fail(uint16(id), err)
			}
			c.end(err)
			continue
		}
		oldest, busy := c.oldest()
		switch {
		case !busy && (c.retired || now.Sub(later(c.used, c.heard)) > p.config.IdleTimeout):
			c.end(nil)
		case busy && now.Sub(later(oldest, c.heard)) > p.silence():
			c.silent = true
		}
		if !c.silent {
			continue
		}
		if id, begun, ok := c.link.partial(); ok && now.Sub(begun) > p.silence() {
			c.release(id)
		} else if !c.leave(now) {
			p.short = true
		}
	}
	p.advance(now)
}

// silence is how long a connection may be silent.
func (p *pool) silence() time.Duration {
	return min(max(4*p.latency, minSilence), maxSilence)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// measure takes note of an answer that took latency.
func (p *pool) measure(latency time.Duration) {
	if p.latency == 0 {
		p.latency = latency
	}
	p.latency += (latency - p.latency) / 8 // as in RFC 6298 section 2
}

// evict makes room for another connection: it ends the one that nothing has been
// heard of for longest, of those that are idle or have been silent for long. If all
// are at work but a question needs a new one, the oldest takes no more. An end wakes
// run.
func (p *pool) evict(now time.Time) {
	var quiet, oldest *connection
	soon := false
	for _, c := range p.connections {
		if c.live == 0 || c.silent && now.Sub(c.heard) > evictSilence {
			if quiet == nil || c.heard.Before(quiet.heard) {
				quiet = c
			}
		} else if c.retired {
			soon = true
		}
		if oldest == nil || c.opened.Before(oldest.opened) {
			oldest = c
		}
	}
	if quiet != nil {
		quiet.end(errSilent)
	} else if !soon && slices.ContainsFunc(p.waiting, func(c *call) bool { return c.lost > 0 || c.broken > 0 }) {
		oldest.retired = true
	}
}

// end closes the connection. reason is what its questions fail with if they are
// not asked again; nil if there are none.
func (c *connection) end(reason error) {
	if c.reason == nil {
		c.reason = reason
	}
	c.retired = true
	c.link.close()
}

// lose is called when a connection has ended by itself with err, or by end, and is
// taken out. What was asked on it is asked on another one.
func (p *pool) lose(c *connection, err error) {
	switch {
	case c.reason != nil:
		err = c.reason
	case errors.Is(err, io.EOF):
		err = errEnded
	}
	if id, _, cut := c.link.partial(); cut && id >= 0 && c.reason == nil {
		if call := c.flights[uint16(id)].call; call != nil {
			c.blamed = true
			call.lost++
			call.lostAt = time.Now()
		}
	}
	switch {
	case c.broken:
	case c.answers == 0 && c.sent > 0:
		p.failed(c.opened)
		// Perhaps one question was too much for the server, or all of them. If it
		// keeps on it is the server that does not work.
		c.broken = !c.blamed && c.live > 1 && p.failures <= hopeless
	case c.live > 0 && c.reason == nil && !c.blamed:
		p.depth = min(p.depth, c.answers)
	}
	for id, flight := range c.flights {
		c.again(id, flight, err)
	}
	p.advance(time.Now())
	p.wake()
}
