package relay

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// flow is one captured connection, from its accept to its end. All of them lie in
// the slab of their loop; a flow at rest has nothing outside of it but what its
// session holds.
type flow struct {
	session Session
	opening *opening       // until the relay starts
	ways    [2]way         // by the side that is read
	ends    [2]end         // by side
	address netip.AddrPort // of the next hop; zero before it is known
	started time.Duration
	since   time.Duration // when its stage began, or when bytes last moved

	// For the slab and the wheel.
	next, prev *flow
	when       int64  // the tick at which the wheel visits it; 0 outside of the wheel
	at         uint16 // level and slot of the wheel
	slot       int32
	generation int32
	stage      stage
}

// stage says what a flow waits for.
type stage uint8

const (
	vacant     stage = iota // not a flow
	peeking                 // the client's first bytes
	connecting              // the connection to the next hop
	shaking                 // the next hop's part of the handshake
	relaying                // bytes, both ways

	// A connection without a client, opened ahead (warm.go).
	warming // the connection
	warm    // a client that needs it
)

// side names an end of a flow, and the way of the bytes that are read there.
type side uint8

const (
	client side = iota
	upstream
)

func (s side) other() side { return s ^ 1 }

// end is the socket of one side, with what its last events and calls told. The
// events are edges, so that what they say holds until a call says otherwise.
type end struct {
	socket   int  // none, or the descriptor
	readable bool // there may be something to read
	full     bool // a write would not take anything
	// urgent: a read that is shorter than its buffer does not prove that nothing
	// is left, because a FIN, an error or the mark of urgent data may follow.
	urgent bool
	// marked: there was urgent data, at whose mark splice(2) would stop for good.
	marked bool
}

// none is the socket of an end that is not there.
const none = -1

// way is one direction. Its source is not read while something of it is pending:
// that is the back-pressure.
type way struct {
	held   []byte // pending: read, or to be sent first, and not yet taken by the destination
	pipe   *pipe  // lent while data flows; pending is what it is filled with
	moved  int64  // bytes that the destination took
	run    int    // bytes read in a row, see spliceAfter
	ended  bool   // the source has sent its FIN and everything before it was taken
	queued bool   // in the ready queue of the loop
}

// pending reports whether bytes wait for the destination.
func (w *way) pending() bool {
	return len(w.held) > 0 || w.pipe != nil && w.pipe.fill > 0
}

// edges are the events of a flow's sockets. The mark of urgent data is among them
// because a read stops at it (tcp(7)).
const edges = unix.EPOLLET | unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI

// token names a side of the flow in events.
func (f *flow) token(s side) token {
	return token{slot: f.slot<<1 | int32(s), generation: f.generation}
}

// enter starts a stage and its time-out.
func (l *loop) enter(f *flow, stage stage) {
	f.stage = stage
	f.since = l.now
	l.arm(f)
}

// arm makes sure that the wheel visits f when its time-out is due, or earlier.
func (l *loop) arm(f *flow) {
	if limit := l.limit(f); limit > 0 {
		l.wheel.set(f, f.since+limit)
	}
}

// limit returns the time-out of a flow's stage, counted from f.since; 0 for none.
func (l *loop) limit(f *flow) time.Duration {
	switch f.stage {
	case peeking:
		return l.config.PeekTimeout
	case connecting:
		return l.config.ConnectTimeout
	case shaking:
		return l.config.HandshakeTimeout
	case warming:
		return l.config.ConnectTimeout
	case warm:
		return warmLife
	}
	if f.ways[client].ended || f.ways[upstream].ended {
		return l.config.HalfCloseTimeout
	}
	return l.config.IdleTimeout
}

// handle takes note of an event and goes on with what waited for it.
func (l *loop) handle(f *flow, s side, events uint32) {
	end := &f.ends[s]
	if events&unix.EPOLLOUT != 0 {
		end.full = false
	}
	const closing = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR | unix.EPOLLPRI
	if events&(unix.EPOLLIN|closing) != 0 {
		end.readable = true
		end.urgent = end.urgent || events&closing != 0
	}
	broken := events&unix.EPOLLERR != 0
	switch {
	case f.stage == relaying:
		l.carry(f, s, broken)
	case f.stage == warming:
		l.warmed(f, events)
	case f.stage == warm:
		l.spoiled(f, events)
	case s == client && broken:
		// Nobody waits for the connection or the handshake any more. A FIN does
		// not say that: the client may have sent all it had to say.
		l.fail(f, client, "wait for", socketError(end.socket))
	case f.stage == peeking:
		l.peek(f)
	case s == client:
		// What it sends stays in its socket until the handshake is done.
	case f.stage == connecting:
		l.connected(f, events)
	case f.stage == shaking:
		l.shake(f)
	}
}

// read receives from an end.
func (e *end) read(into []byte) (n int, err error) {
	n, err = receive(e.socket, into)
	if err == unix.EAGAIN || n > 0 && n < len(into) && !e.urgent {
		e.readable = false
	}
	return n, err
}

// write sends to an end. A short count is not an error: the end is full then.
func (e *end) write(bytes []byte) (n int, err error) {
	if e.full {
		return 0, nil
	}
	n, err = send(e.socket, bytes)
	if err == unix.EAGAIN {
		n, err = 0, nil
	}
	e.full = n < len(bytes)
	return n, err
}

// finish ends a flow and tells its session. Whatever the flow held is released
// before, so that the session sees the engine as it is without it.
func (l *loop) finish(f *flow, how End, err error) {
	for s := range f.ends {
		if socket := f.ends[s].socket; socket != none {
			if how == Orderly || how == Abandoned {
				setLinger(socket, false)
			}
			shut(socket)
		}
		if pipe := f.ways[s].pipe; pipe != nil {
			l.pipes.give(pipe)
		}
	}
	session, outcome := f.session, Outcome{
		Sent:     f.ways[client].moved,
		Received: f.ways[upstream].moved,
		Duration: l.now - f.started,
		Address:  f.address,
		End:      how,
		Err:      err,
	}
	l.release(f)
	session.Closed(outcome)
}

// release gives the flow's entry back.
func (l *loop) release(f *flow) {
	l.wheel.remove(f)
	l.flows.give(f)
	l.engine.counters.flows.Add(-1)
}
