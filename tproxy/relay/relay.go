package relay

import (
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	// spliceAfter is how many bytes one direction moves by recv and send, which
	// are cheaper for little, before it uses splice.
	spliceAfter = 256 << 10 // bytes

	// spliceLeast is what a source must have at a time for its bytes to count
	// towards spliceAfter. Below it a flow of requests and answers pays the pipe
	// without gaining anything.
	spliceLeast = 8 << 10 // bytes
)

// relay starts the last stage: everything before the client's bytes is said.
func (l *loop) relay(f *flow) {
	f.opening = nil
	l.wheel.remove(f) // a visit at the time-outs of the opening would be for nothing
	l.enter(f, relaying)
	if l.pump(f, client) {
		l.pump(f, upstream)
	}
}

// carry goes on with a flow after an event on one of its ends.
func (l *loop) carry(f *flow, s side, broken bool) {
	// A way that has used up its turn waits for the next one.
	if f.ends[s].readable && (broken || !f.ways[s].queued) && !l.pump(f, s) {
		return
	}
	if back := s.other(); f.ways[back].pending() && !l.pump(f, back) {
		return
	}
	if broken {
		// What came before the error was read and passed on as far as the other
		// side took it; a reset does not wait for it to take the rest.
		l.fail(f, s, "carry bytes of", socketError(f.ends[s].socket))
	}
}

// pump moves the bytes of one way until the source is dry, the destination is
// full or its turn is over. It reports whether the flow is still there.
func (l *loop) pump(f *flow, from side) (alive bool) {
	way, source, destination := &f.ways[from], &f.ends[from], &f.ends[from.other()]
	for moved := 0; ; {
		if err := l.deliver(f, way, destination); err != nil {
			l.fail(f, from.other(), "write to", err)
			return false
		}
		if way.pending() {
			return true
		}
		if !source.readable || way.ended {
			if 0 < moved && moved < spliceLeast {
				way.run = 0
			}
			l.unlend(way)
			return true
		}
		if moved >= turn {
			l.yield(f, from)
			return true
		}
		n, err := l.fill(way, source)
		switch {
		case err == unix.EAGAIN:
		case err != nil:
			l.fail(f, from, "read from", err)
			return false
		case n == 0:
			return l.halfClose(f, from)
		}
		moved += n
		way.run += n
	}
}

// fill reads what the source has into the pipe, or else into the buffer of the
// loop. Nothing is pending.
func (l *loop) fill(way *way, source *end) (n int, err error) {
	if way.pipe == nil && way.run >= spliceAfter && !source.marked {
		way.pipe = l.pipes.take()
	}
	if way.pipe == nil {
		return l.receive(way, source)
	}
	// The pipe is empty, so that EAGAIN can only mean the source. A short count
	// means nothing: the pipe counts its capacity in segments, not in bytes.
	n, err = splice(source.socket, way.pipe.write, pipeSize)
	if (err == nil && n == 0 || err == unix.EAGAIN && source.urgent) && queued(source.socket) > 0 {
		// It stands before the mark of urgent data: that is no end, nor does it go on
		// by itself.
		source.marked = true
		l.unlend(way)
		return l.receive(way, source)
	}
	if err == unix.EAGAIN {
		source.readable = false
	}
	way.pipe.fill = n
	return n, err
}

// receive reads into the buffer of the loop.
func (l *loop) receive(way *way, source *end) (n int, err error) {
	n, err = source.read(l.buffer[:])
	if n > 0 {
		way.held = l.buffer[:n]
	}
	return n, err
}

// queued is how many bytes wait in a socket to be read (SIOCINQ, tcp(7)).
func queued(socket int) int {
	n, err := unix.IoctlGetInt(socket, unix.SIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

// deliver writes what is pending. What the destination does not take remains.
func (l *loop) deliver(f *flow, way *way, destination *end) error {
	if len(way.held) > 0 {
		n, err := destination.write(way.held)
		if err != nil {
			return err
		}
		l.count(f, way, n)
		switch {
		case n == len(way.held):
			way.held = nil
		case &way.held[0] == &l.buffer[0]:
			// The loop needs its buffer for others.
			way.held = append([]byte(nil), way.held[n:]...)
		default:
			way.held = way.held[n:]
		}
		return nil
	}
	for way.pipe != nil && way.pipe.fill > 0 && !destination.full {
		n, err := splice(way.pipe.read, destination.socket, way.pipe.fill)
		switch err {
		case nil:
			way.pipe.fill -= n
			way.pipe.moved += int64(n)
			l.count(f, way, n)
		case unix.EINTR:
			// A signal was pending; nothing was moved.
		case unix.EAGAIN:
			destination.full = true
		default:
			return err
		}
	}
	return nil
}

// count takes note of bytes that a destination took.
func (l *loop) count(f *flow, way *way, n int) {
	if n > 0 {
		way.moved += int64(n)
		f.since = l.now
	}
}

// yield lets the other flows have their turn before this way goes on.
func (l *loop) yield(f *flow, from side) {
	if way := &f.ways[from]; !way.queued {
		way.queued = true
		l.ready = append(l.ready, f.token(from))
	}
}

// unlend gives the pipe back. It is empty.
func (l *loop) unlend(way *way) {
	if way.pipe != nil {
		l.pipes.give(way.pipe)
		way.pipe = nil
	}
}

// halfClose passes the FIN of a source on; everything before it is delivered. It
// reports whether the flow is still there.
func (l *loop) halfClose(f *flow, from side) (alive bool) {
	way := &f.ways[from]
	way.ended = true
	l.unlend(way)
	if f.ways[from.other()].ended {
		// The closes send the FIN that is still to be sent.
		l.finish(f, Orderly, nil)
		return false
	}
	if err := shutdown(f.ends[from.other()].socket); err != nil {
		l.fail(f, from.other(), "shut down", err)
		return false
	}
	f.since = l.now
	l.arm(f)
	return true
}

// fail ends a flow by the error of one of its sides.
func (l *loop) fail(f *flow, s side, action string, err error) {
	if s == client {
		l.finish(f, ClientFailed, fmt.Errorf("%s client: %w", action, err))
		return
	}
	l.finish(f, UpstreamFailed, fmt.Errorf("%s %s: %w", action, f.address, err))
}
