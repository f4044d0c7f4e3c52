package exchange

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"time"
)

// link is what is spoken on one connection. All methods but serve and wait are
// called under the pool's mutex and do not block.
type link interface {
	// room reports whether send would take a question.
	room() bool
	// send asks the question of a call, whose query is not touched when it has
	// returned. The answer is told to c under the id.
	send(c *connection, id uint16, query []byte)
	// giveUp says that nobody waits for the answer to id, which may come all the same.
	giveUp(id uint16)
	// partial tells of an answer of which only a part has arrived, which keeps back
	// those behind it: when it began, and its id, -1 if that has not arrived yet.
	partial() (id int, begun time.Time, ok bool)
	// check returns why the connection is of no use any more, if so.
	check(now time.Time) error
	// close ends the connection at once, which makes serve return.
	close()

	// serve tells c the answers until the connection has ended, and returns why. A
	// connection that was in order until the server closed it ends with io.EOF.
	serve(c *connection) error
	// wait returns when all goroutines of the link have ended, and have told c what
	// they know. It is called after serve, when nothing is sent any more.
	wait()
}

// connection is a kept connection and the questions that are on it. All is guarded
// by the pool's mutex.
type connection struct {
	pool    *pool
	link    link
	flights map[uint16]flight
	live    int // flights that somebody waits for
	company int // what the live flights put up with, see call.company
	sent    int // questions, ever
	opened  time.Time
	heard   time.Time // when the last answer came, at first when it was opened
	used    time.Time // when the last question was sent or given up
	strange int       // answers to nothing that was asked since the last other one
	retired bool      // takes no more questions
	// silent: questions are on it and nothing has been heard for long. The next
	// answer ends that.
	silent  bool
	answers int
	blamed  bool  // one question is to blame for the end of the connection
	broken  bool  // one is to blame, and it is not known which
	reason  error // why the pool has ended the connection
}

// flight is a question that was sent on a connection. The call is nil when nobody
// waits for it: its id stays in use until it is answered.
type flight struct {
	call  *call
	sent  time.Time
	order int // of sending on this connection
}

// maxGivenUp bounds the questions on one connection that were given up and never
// answered. A new connection costs less than to remember them.
const maxGivenUp = 1024

// room reports whether c takes another question.
func (c *connection) room() bool {
	return !c.retired && c.live < c.pool.depth && (c.live == 0 || c.live < c.company) && c.link.room()
}

// place sends a call on c, which has room.
func (c *connection) place(call *call, now time.Time) {
	// An off-path forger would have to guess the sequence numbers of TCP; the id is
	// random all the same. The generator is ChaCha8, seeded by the kernel.
	id := uint16(rand.Uint32())
	for range 1 << 16 {
		if _, used := c.flights[id]; !used {
			break
		}
		id++
	}
	c.sent++
	c.flights[id] = flight{call, now, c.sent}
	if c.live == 0 {
		c.company = call.company()
	}
	c.company = min(c.company, call.company())
	c.live++
	c.used = now
	call.spots = append(call.spots, spot{c, id})
	c.link.send(c, id, call.query)
}

// giveUp is called when the call with the id has ended otherwise.
func (c *connection) giveUp(id uint16) {
	c.live--
	c.used = time.Now()
	c.link.giveUp(id)
	flight := c.flights[id]
	flight.call = nil
	c.flights[id] = flight
	c.retired = c.retired || len(c.flights)-c.live > maxGivenUp
}

// remove takes a call off the connection, which does not answer it.
func (c *connection) remove(id uint16) *call {
	c.link.giveUp(id)
	call := c.flights[id].call
	delete(c.flights, id)
	if call != nil {
		c.live--
		call.vacate(c)
	}
	return call
}

// fail ends the call with the id, which is to blame for what happened, unless it
// may be answered elsewhere.
func (c *connection) fail(id uint16, err error) {
	call := c.remove(id)
	if call != nil && len(call.spots) == 0 {
		c.pool.settle(call, nil, err)
	}
}

// oldest returns when the call that has waited longest here was sent.
func (c *connection) oldest() (sent time.Time, ok bool) {
	for _, flight := range c.flights {
		if flight.call != nil && (!ok || flight.sent.Before(sent)) {
			sent, ok = flight.sent, true
		}
	}
	return sent, ok
}

// release puts the questions behind an answer of which only a part has arrived
// into the line, and takes no more. It is called when the connection is silent.
func (c *connection) release(partial int) {
	if _, asked := c.flights[uint16(partial)]; partial < 0 || !asked {
		c.broken = true
		c.end(errHeld)
		return
	}
	c.retired = true
	for id, flight := range c.flights {
		if flight.call != nil && int(id) != partial {
			c.giveUp(id)
			flight.call.vacate(c)
			if len(flight.call.spots) == 0 {
				c.pool.waiting = append(c.pool.waiting, flight.call)
			}
		}
	}
}

// leave asks the questions on c, which is silent, elsewhere as well, on one that has
// been heard of since. It reports whether there was any. The question that has
// waited longest goes last: it may be what the others wait for.
func (c *connection) leave(now time.Time) bool {
	var flights []flight
	for _, flight := range c.flights {
		if flight.call != nil {
			flights = append(flights, flight)
		}
	}
	if len(flights) == 0 {
		return true
	}
	slices.SortFunc(flights, func(a, b flight) int { return cmp.Compare(a.order, b.order) })
	flights[0].call.suspect = true
	for _, flight := range append(flights[1:], flights[0]) {
		call := flight.call
		if len(call.spots) >= maxSpots || call.suspect && len(call.spots) >= maxSuspectSpots || !call.stuck() {
			continue
		}
		to := c.pool.pick(func(other *connection) bool { return !other.silent && other.heard.After(flight.sent) })
		if to == nil {
			return false
		}
		to.place(call, now)
	}
	return true
}
