package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxDatagram is what an answer over UDP may have; a longer one is asked for
	// again over TCP. RFC 6891 section 6.2.5 recommends it as the most to announce.
	maxDatagram = 4096 // bytes

	// firstWait is how long an answer is waited for before the query is sent once
	// more; the next wait is twice as long, and the last lasts until the time-out.
	// The first is more than most names take that are in no cache.
	firstWait = 800 * time.Millisecond
	sends     = 3

	// maxForged is how many wrong answers to one query make the question go over
	// TCP, where nobody can forge one unseen. Each is one guess of 2^16 ids times
	// the letters' case; a server by itself sends none.
	maxForged = 16
)

// NewUDP returns a server that is asked over UDP. Each query is sent from a socket
// of its own with a random id and random letter case, and again when no answer
// comes. What does not match is ignored and counted. An answer that is truncated,
// and a question of which only wrong answers have come, is asked for over TCP: tcp
// is used as by NewTCP. It may be nil; truncated answers are then returned as
// they are.
//
// udp must return a connected socket, so that the kernel drops what comes from
// elsewhere, bound to no port, so that the kernel chooses a random one.
func NewUDP(name string, udp, tcp Dial, config Config) Server {
	d := &datagram{name: name, dial: udp, config: config.withDefaults(), sockets: make(map[*net.Conn]struct{})}
	d.buffers.New = func() any { return new([maxDatagram + 1]byte) }
	if tcp != nil {
		d.stream = newTCP(name, tcp, config)
	}
	return d
}

// datagram is the Server of UDP.
type datagram struct {
	name    string
	dial    Dial
	config  Config
	stream  *pool     // nil: none
	buffers sync.Pool // of *[maxDatagram + 1]byte

	mismatches atomic.Int64

	mutex    sync.Mutex
	closed   bool
	inFlight int
	sockets  map[*net.Conn]struct{} // of questions under way; a Conn need not be comparable
}

// errOverTCP says that the question must be asked over TCP.
var errOverTCP = errors.New("ask over TCP")

func (d *datagram) String() string { return d.name }

func (d *datagram) mismatched() int64 {
	count := d.mismatches.Load()
	if d.stream != nil {
		count += d.stream.mismatched()
	}
	return count
}

// Close ends the questions under way.
func (d *datagram) Close() {
	d.mutex.Lock()
	d.closed = true
	for conn := range d.sockets {
		(*conn).Close()
	}
	d.mutex.Unlock()
	if d.stream != nil {
		d.stream.Close()
	}
}

func (d *datagram) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	limited, cancel := context.WithTimeoutCause(ctx, d.config.Timeout, errTimeout(d.config.Timeout))
	defer cancel()
	answer, err := d.exchange(limited, query)
	if err == errOverTCP {
		if answer, err = d.stream.exchange(limited, query); err != nil {
			err = fmt.Errorf("over TCP: %w", err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", d.name, err)
	}
	return answer, nil
}

func (d *datagram) exchange(ctx context.Context, query []byte) ([]byte, error) {
	end, err := checkQuery(query)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := d.enter(); err != nil {
		return nil, err
	}
	defer d.leave()
	conn, err := d.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	if !d.hold(&conn) {
		return nil, ErrClosed
	}
	defer d.release(&conn)

	// A deadline in the past interrupts the wait.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := d.ask(ctx, conn, query, end)
	switch {
	case err == nil || err == errOverTCP:
		return answer, err
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, net.ErrClosed):
		return nil, ErrClosed
	}
	return nil, err
}

// enter takes a question on.
func (d *datagram) enter() error {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	switch {
	case d.closed:
		return ErrClosed
	case d.inFlight >= d.config.MaxInFlight:
		return ErrBusy
	}
	d.inFlight++
	return nil
}

func (d *datagram) leave() {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.inFlight--
}

// hold makes Close close the socket.
func (d *datagram) hold(conn *net.Conn) bool {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	if !d.closed {
		d.sockets[conn] = struct{}{}
	}
	return !d.closed
}

func (d *datagram) release(conn *net.Conn) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	delete(d.sockets, conn)
}

// ask sends the query until there is an answer.
func (d *datagram) ask(ctx context.Context, conn net.Conn, query []byte, end int) ([]byte, error) {
	disguised := bytes.Clone(query)
	disguise(disguised, end)
	buffer := d.buffers.Get().(*[maxDatagram + 1]byte)
	defer d.buffers.Put(buffer)
	forged := 0
	for try := range sends {
		if forged > 0 && d.stream != nil {
			// Perhaps a server that does not keep the letters' case.
			return nil, errOverTCP
		}
		if _, err := conn.Write(disguised); err != nil {
			return nil, err
		}
		deadline := time.Now().Add(firstWait << try)
		if try == sends-1 {
			deadline = time.Time{} // until ctx is done
		}
		conn.SetReadDeadline(deadline)
		if err := ctx.Err(); err != nil { // in case this was overwritten
			return nil, err
		}
		answer, err := d.receive(conn, buffer[:], disguised, end, &forged)
		switch {
		case err == nil:
			reveal(answer, query, end)
			return bytes.Clone(answer), nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, err
		}
	}
	return nil, os.ErrDeadlineExceeded
}

// caseWait is how long a true answer may come behind one that is right but for the case
// of its letters. Those who forge one send it before that.
const caseWait = 50 * time.Millisecond

// receive waits for the answer to the disguised query, and counts what is none. The
// answer is in buffer.
func (d *datagram) receive(conn net.Conn, buffer, query []byte, end int, forged *int) ([]byte, error) {
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, err
		}
		answer := buffer[:n]
		matched := n >= headerSize && answer[0] == query[0] && answer[1] == query[1]
		switch {
		case matched && answers(answer, query, end):
			truncated := answer[flagsAt]&flagTruncated != 0 || n > maxDatagram
			if truncated && d.stream != nil {
				return nil, errOverTCP
			}
			if last, err := walk(answer, end, nil); err == nil {
				return answer[:last], nil
			}
		case matched && d.stream != nil && n >= end && bytes.EqualFold(answer[headerSize:end], query[headerSize:end]):
			// A server that does not keep the letters' case, or somebody who guesses. If the
			// true answer does not come soon the question goes over TCP.
			conn.SetReadDeadline(time.Now().Add(caseWait))
		case matched && bareError(answer, query) && d.stream != nil:
			// Without the question it is too easily forged.
			return nil, errOverTCP
		}
		d.mismatches.Add(1)
		if *forged++; *forged >= maxForged && d.stream != nil {
			return nil, errOverTCP
		}
	}
}
