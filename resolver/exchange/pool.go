package exchange

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// pool is a Server that keeps connections. Its questions are in a line until a
// connection has room for them. What is on the wire and what the line waits for is
// all guarded by one mutex, under which nothing blocks; one goroutine (run) dials
// and keeps the times.
type pool struct {
	name   string
	config Config
	open   opener

	cancel context.CancelFunc // ends run
	ended  chan struct{}      // closed when run has returned
	awake  chan struct{}      // room for one: something changed that run acts on

	mismatches atomic.Int64

	mutex       sync.Mutex
	closed      bool
	inFlight    int
	waiting     []*call // on no connection
	connections []*connection
	serial      bool          // connections take one question at a time
	latency     time.Duration // smoothed
	watched     bool          // run looks at the connections soon without being woken
	short       bool          // questions of silent connections have nowhere to go
	dialling
}

// opener opens a connection ready for questions.
type opener func(ctx context.Context) (link, error)

// call is one question that somebody waits for.
type call struct {
	query  []byte
	end    int         // of the question in query
	result chan result // room for one

	// Guarded by the pool.
	spots    []spot    // where it has been sent and may be answered
	lost     int       // connections that ended without having answered anything since it was sent
	lostAt   time.Time // when the last did
	broken   int       // connections that broke under it and others
	brokenAt time.Time // when the last did
	refused  int       // dials that failed while it waited
	suspect  bool      // was the oldest on a silent connection
	settled  bool      // nobody waits any more
}

// spot is a place of a call.
type spot struct {
	connection *connection
	id         uint16
}

// company returns how many questions may be on a connection with the call.
func (c *call) company() int {
	switch c.broken {
	case 0:
		return math.MaxInt
	case 1:
		return few
	}
	return 1
}

// stuck reports whether the call is only on connections that are silent.
func (c *call) stuck() bool {
	return !slices.ContainsFunc(c.spots, func(s spot) bool { return !s.connection.silent })
}

// vacate takes note that the call is not on the connection any more.
func (c *call) vacate(connection *connection) {
	c.spots = slices.DeleteFunc(c.spots, func(s spot) bool { return s.connection == connection })
}

// These bound the connections on which one question is at the same time. One that
// may be why they are silent leaves others free.
const (
	maxSpots        = 3
	maxSuspectSpots = 2
)

type result struct {
	answer []byte
	err    error
}

func newPool(name string, open opener, config Config) *pool {
	ctx, cancel := context.WithCancel(context.Background())
	p := &pool{
		name:   name,
		config: config.withDefaults(),
		open:   open,
		cancel: cancel,
		ended:  make(chan struct{}),
		awake:  make(chan struct{}, 1),
	}
	p.depth, p.attempts = p.config.MaxInFlight, make(map[*attempt]struct{})
	go p.run(ctx)
	return p
}

func (p *pool) String() string { return p.name }

// mismatched returns how many answers were ignored because they were none to a
// question that had been asked.
func (p *pool) mismatched() int64 { return p.mismatches.Load() }

func (p *pool) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	answer, err := p.exchange(ctx, query)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", p.name, err)
	}
	return answer, nil
}

func (p *pool) exchange(ctx context.Context, query []byte) ([]byte, error) {
	end, err := checkQuery(query)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	c := &call{query: query, end: end, result: make(chan result, 1)}
	if err := p.enter(c); err != nil {
		return nil, err
	}
	timeout := time.NewTimer(p.config.Timeout)
	defer timeout.Stop()
	select {
	case r := <-c.result:
		return r.answer, r.err
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timeout.C:
		err = errTimeout(p.config.Timeout)
	}
	p.mutex.Lock()
	p.settle(c, nil, err)
	p.mutex.Unlock()
	r := <-c.result // an answer, if it came in the meantime
	return r.answer, r.err
}

// errTimeout is the error of a server that has not answered.
func errTimeout(limit time.Duration) error {
	return fmt.Errorf("no answer within %s: %w", limit, context.DeadlineExceeded)
}

// Close ends all connections. Dials under way end by their context.
func (p *pool) Close() {
	p.mutex.Lock()
	p.closed = true
	for _, c := range slices.Clone(p.waiting) {
		p.settle(c, nil, ErrClosed)
	}
	for _, c := range p.connections {
		for _, flight := range c.flights {
			if flight.call != nil {
				p.settle(flight.call, nil, ErrClosed)
			}
		}
		c.link.close()
	}
	p.mutex.Unlock()
	p.cancel()
	<-p.ended
}

// enter takes a call on.
func (p *pool) enter(c *call) error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	switch {
	case p.closed:
		return ErrClosed
	case p.inFlight >= p.config.MaxInFlight:
		return ErrBusy
	}
	p.inFlight++
	p.waiting = append(p.waiting, c)
	p.advance(time.Now())
	if len(p.waiting) > 0 || !p.watched {
		p.wake()
	}
	return nil
}

// settle ends a call, unless it has ended. The caller holds the mutex, as those of
// all methods below do.
func (p *pool) settle(c *call, answer []byte, err error) {
	if c.settled {
		return
	}
	c.settled = true
	c.result <- result{answer, err}
	p.inFlight--
	if len(c.spots) == 0 {
		if i := slices.Index(p.waiting, c); i >= 0 {
			p.waiting = slices.Delete(p.waiting, i, i+1)
		}
	}
	for _, spot := range c.spots {
		spot.connection.giveUp(spot.id)
	}
	c.spots = nil
	if len(p.waiting) > 0 {
		p.wake() // a connection may have become free
	}
}

// advance sends the calls that wait, as long as there is room.
func (p *pool) advance(now time.Time) {
	if slices.ContainsFunc(p.connections, (*connection).room) {
		p.waiting = slices.DeleteFunc(p.waiting, func(c *call) bool {
			connection := p.pick(func(other *connection) bool { return fit(other, c) })
			if connection != nil {
				connection.place(c, now)
			}
			return connection != nil
		})
	}
}

// fit reports whether a call that waits may be sent on a connection. One that was
// lost with another needs a new one: when a server restarts, all of its old ones
// are dead. One under which another broke stays away from those that are in order.
func fit(c *connection, call *call) bool {
	if call.broken > 0 && (c.live >= call.company() || !c.opened.After(call.brokenAt)) {
		return false
	}
	return call.lost == 0 || c.answers == 0 && c.opened.After(call.lostAt)
}

// wake makes run look at what there is to do.
func (p *pool) wake() {
	select {
	case p.awake <- struct{}{}:
	default:
	}
}

// crowd is the number of questions on a connection from which on another is
// opened. Servers stop reading when they work on many: BIND at 23.
const crowd = 64

// pick returns the connection for the next question of those that are fit: the
// first that is not silent and not crowded, so that the others become idle when
// they are not needed; else the one with the fewest, a silent one last.
func (p *pool) pick(fit func(*connection) bool) *connection {
	var best *connection
	for _, c := range p.connections {
		switch {
		case !c.room() || !fit(c):
		case !c.silent && c.live < crowd:
			return c
		case best == nil || best.silent && !c.silent || best.silent == c.silent && c.live < best.live:
			best = c
		}
	}
	return best
}
