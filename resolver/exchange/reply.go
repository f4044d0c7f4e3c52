package exchange

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

const (
	// maxStrange bounds the answers in a row, on one connection, to nothing that was
	// asked. Some servers answer twice; one that does nothing else is of no use.
	maxStrange = 100

	// When a connection breaks and it is not known which of its questions is to
	// blame, they are asked again a few together, and those of the few where it
	// happens again alone: then it is known.
	few       = 8
	maxBroken = 2

	// maxLost is how many connections may be lost under a question before it fails.
	// Any server may close an idle one at the moment when a question is sent.
	maxLost = 1
)

var (
	errHeld    = errors.New("only a part of an answer arrived")
	errStrange = fmt.Errorf("more than %d answers to questions that were not asked", maxStrange)
	errLength  = errors.New("the length before an answer is not that of the answer")
)

// answer is told a message from the server; it keeps nothing of it. The error
// ends the connection. The question whose answer was wrong is not asked again, so
// that it cannot spoil the next connection as well. The link calls it without the
// mutex.
func (c *connection) answer(message []byte) error {
	if len(message) < headerSize {
		return errMalformed
	}
	c.pool.mutex.Lock()
	defer c.pool.mutex.Unlock()
	id := binary.BigEndian.Uint16(message)
	flight, asked := c.flights[id]
	call := flight.call
	var end int
	switch {
	case asked && call == nil:
		delete(c.flights, id)
		c.hear(flight)
		var ok bool
		if end, ok = questionEnd(message); !ok {
			return nil // perhaps a bare error
		}
	case asked && bareError(message, call.query):
		c.hear(flight)
		c.finish(call, id, own(withQuestion(message, call.query, call.end), call.query), nil)
		return nil
	case asked && answers(message, call.query, call.end):
		end = call.end
	default:
		return c.mismatch()
	}

	last, err := walk(message, end, nil)
	switch {
	case call == nil && (err != nil || last != len(message)):
		c.blamed = true
		return errLength
	case call == nil:
		return nil
	case err != nil:
		c.blamed = true
		c.fail(id, err)
		return err
	}
	c.hear(flight)
	c.finish(call, id, own(message[:last], call.query), nil)
	if last != len(message) {
		c.blamed = true
		// What followed may be the beginning of the next answers.
		return errLength
	}
	return nil
}

// told is what answer is for a link that matches answers by itself: one to the
// question with the id, or an error. After an answerError the connection is in
// order; after any other the question may be asked again. The link calls it
// without the mutex.
func (c *connection) told(id uint16, answer []byte, err error) {
	p := c.pool
	p.mutex.Lock()
	defer p.mutex.Unlock()
	flight, asked := c.flights[id]
	var useless answerError
	switch {
	case !asked:
	case flight.call == nil:
		delete(c.flights, id)
	case err == nil:
		c.hear(flight)
		c.finish(flight.call, id, own(answer, flight.call.query), nil)
	case errors.As(err, &useless):
		c.hear(flight)
		if errors.Is(err, errMismatch) {
			p.mismatches.Add(1)
		}
		c.fail(id, useless.error)
	default:
		c.again(id, flight, err)
		p.advance(time.Now())
		p.wake()
	}
}

// again puts the call with the id, which will not be answered here, into the line
// unless it is on another connection as well. If it has been lost too often it
// fails with err.
func (c *connection) again(id uint16, flight flight, err error) {
	call := c.remove(id)
	if call == nil || len(call.spots) > 0 {
		return
	}
	now := time.Now()
	switch {
	case c.broken:
		call.broken++
		call.brokenAt = now
	case !c.blamed && !c.heard.After(flight.sent):
		call.lost++
		call.lostAt = now
	}
	switch {
	case c.pool.closed:
		c.pool.settle(call, nil, ErrClosed)
	case call.lost > maxLost || call.broken > maxBroken:
		c.pool.settle(call, nil, err)
	default:
		c.pool.waiting = append(c.pool.waiting, call)
	}
}

// breaks takes note of bytes that are no answer to anything. The link calls it
// without the mutex.
func (c *connection) breaks() {
	c.pool.mutex.Lock()
	defer c.pool.mutex.Unlock()
	c.broken = true
}

// mismatch counts an answer to nothing that was asked.
func (c *connection) mismatch() error {
	c.pool.mismatches.Add(1)
	if c.strange++; c.strange > maxStrange {
		c.broken = true
		return errStrange
	}
	return nil
}

// hear takes note of an answer to a question.
func (c *connection) hear(f flight) {
	c.heard = time.Now()
	c.silent = false
	c.strange = 0
	if c.answers++; c.answers >= 2*c.pool.depth {
		c.pool.depth = min(2*c.pool.depth, c.pool.config.MaxInFlight)
	}
	c.pool.measure(c.heard.Sub(f.sent))
	c.pool.failures = 0
	if c.opened.After(c.pool.failedAt) {
		c.pool.pauses, c.pool.notBefore = 0, time.Time{}
	}
}

// finish ends the call with the id by what was answered.
func (c *connection) finish(call *call, id uint16, answer []byte, err error) {
	c.remove(id)
	c.used = time.Now()
	c.pool.settle(call, answer, err)
}
