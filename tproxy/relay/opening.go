package relay

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// opening is what a flow needs until its relay starts. What was peeked waits as
// the pending bytes of the client's way.
type opening struct {
	hop    Hop
	addrs  []netip.AddrPort // of the hop, still to be tried
	unsent []byte           // of the handshake, not yet taken by the next hop's socket
	warm   bool             // the connection was opened ahead, and nothing has come on it yet
}

// open starts a flow whose client's socket is set.
func (l *loop) open(f *flow) {
	f.stage, f.since = peeking, l.now
	if err := l.watch(f.ends[client].socket, f.token(client), edges); err != nil {
		l.finish(f, ClientFailed, fmt.Errorf("watch client: %w", err))
		return
	}
	if !f.session.Peek(nil, false) {
		l.route(f)
		return
	}
	l.arm(f)
}

// peek reads what the client says first for as long as the session wants more.
func (l *loop) peek(f *flow) {
	end, flight := &f.ends[client], &f.ways[client].held
	for end.readable {
		n, err := end.read(l.buffer[:MaxFlight-len(*flight)])
		switch {
		case err == unix.EAGAIN:
			return
		case err != nil:
			l.fail(f, client, "read from", err)
			return
		case n == 0 && len(*flight) == 0:
			l.finish(f, Abandoned, nil)
			return
		}
		*flight = append(*flight, l.buffer[:n]...)
		last := n == 0 || len(*flight) == MaxFlight
		if more := f.session.Peek(*flight, last); last || !more {
			l.route(f)
			return
		}
	}
}

// route asks where the flow goes and starts on the way.
func (l *loop) route(f *flow) {
	hop, err := f.session.Route()
	if err != nil {
		l.finish(f, RouteFailed, err)
		return
	}
	l.head(f, hop)
}

// head sets out for a hop.
func (l *loop) head(f *flow, hop Hop) {
	if hop.Detach != nil {
		socket, flight := f.ends[client].socket, f.ways[client].held
		// It cannot fail for a socket that is registered (epoll_ctl(2)).
		control(l.epoll, unix.EPOLL_CTL_DEL, socket, token{}, 0)
		l.release(f)
		hop.Detach(socket, flight)
		return
	}
	f.opening = &opening{hop: hop, addrs: hop.Addrs}
	if hop.Warm && len(hop.Addrs) > 0 && l.config.MaxWarm > 0 {
		if l.takeWarm(f) {
			return
		}
	}
	l.dial(f, errors.New("the hop has no address"))
}

// retry asks the session for another way when a hop has failed, before any of the
// client's bytes has left.
func (l *loop) retry(f *flow, how End, err error) {
	hop, again := f.session.Retry(how, err)
	if !again {
		l.finish(f, how, err)
		return
	}
	if socket := f.ends[upstream].socket; socket != none {
		shut(socket)
	}
	f.ends[upstream] = end{socket: none}
	l.head(f, hop)
}

// dial starts a connection to the next address of the hop. cause is why the flow
// fails when there is none left.
func (l *loop) dial(f *flow, cause error) {
	for len(f.opening.addrs) > 0 {
		next := f.opening.addrs[0]
		f.opening.addrs = f.opening.addrs[1:]
		f.address = netip.AddrPortFrom(next.Addr().Unmap(), next.Port())
		socket, err := l.connectTo(f.address, f.opening.hop.Source, f.opening.hop.Handshake != nil)
		if err == nil {
			if err = l.watch(socket, f.token(upstream), edges); err == nil {
				f.ends[upstream] = end{socket: socket}
				l.enter(f, connecting)
				return
			}
			shut(socket)
		}
		cause = fmt.Errorf("connect to %s: %w", f.address, err)
	}
	l.retry(f, ConnectFailed, cause)
}

// redial gives up an address.
func (l *loop) redial(f *flow, err error) {
	shut(f.ends[upstream].socket)
	f.ends[upstream].socket = none
	l.dial(f, fmt.Errorf("connect to %s: %w", f.address, err))
}

// connected goes on when the socket to the next hop says how its connect went.
func (l *loop) connected(f *flow, events uint32) {
	switch {
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		l.redial(f, socketError(f.ends[upstream].socket))
		return
	case events&unix.EPOLLOUT == 0:
		return
	}
	address, took, warm := f.address, l.now-f.since, f.opening.hop.Warm
	f.session.Connected(address, took)
	l.greet(f)
	if warm {
		l.measured(address, took)
	}
}

// greet starts the handshake on a connection that stands.
func (l *loop) greet(f *flow) {
	if f.opening.hop.Handshake == nil {
		l.relay(f)
		return
	}
	f.opening.unsent = f.opening.hop.Handshake.Hello()
	l.enter(f, shaking)
	l.shake(f)
}

// shake drives the handshake as far as it goes now. The next hop is not read while
// it does not take what it was sent.
func (l *loop) shake(f *flow) {
	end, opening := &f.ends[upstream], f.opening
	for {
		if err := l.tell(end, opening); err != nil {
			l.refuse(f, err)
			return
		}
		if len(opening.unsent) > 0 || !end.readable {
			return
		}
		n, err := end.read(l.buffer[:])
		switch {
		case err == unix.EAGAIN:
			return
		case err == nil && n == 0:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil:
			l.refuse(f, err)
			return
		}
		opening.warm = false
		out, rest, done, err := opening.hop.Handshake.Feed(l.buffer[:n])
		if err != nil {
			l.refuse(f, err)
			return
		}
		if !done {
			opening.unsent = out // all before it is sent, and Feed is not called before this is
			continue
		}
		if len(out) > 0 {
			// Its last words go ahead of the client's first; they do not count.
			way := &f.ways[client]
			way.held = append(append([]byte(nil), out...), way.held...)
			way.moved -= int64(len(out))
		}
		f.ways[upstream].held = append([]byte(nil), rest...)
		l.relay(f)
		return
	}
}

// tell sends what is unsent of the handshake.
func (l *loop) tell(to *end, o *opening) error {
	if len(o.unsent) == 0 {
		return nil
	}
	n, err := to.write(o.unsent)
	o.unsent = o.unsent[n:]
	return err
}

// refuse gives up a handshake that failed. A connection that was opened ahead may have
// been closed meanwhile, which says nothing about the hop: it is dialled then.
func (l *loop) refuse(f *flow, err error) {
	if f.opening.warm && !errors.Is(err, os.ErrDeadlineExceeded) {
		shut(f.ends[upstream].socket)
		f.ends[upstream] = end{socket: none}
		f.opening.warm = false
		l.dial(f, err)
		return
	}
	l.retry(f, HandshakeFailed, fmt.Errorf("handshake with %s: %w", f.address, err))
}

// expire is the visit of the wheel: it ends what has taken too long.
func (l *loop) expire(f *flow) {
	limit := l.limit(f)
	if limit == 0 {
		return
	}
	if due := f.since + limit; l.now < due {
		l.wheel.set(f, due)
		return
	}
	switch f.stage {
	case peeking:
		f.session.Peek(f.ways[client].held, true)
		l.route(f)
	case connecting:
		l.redial(f, unix.ETIMEDOUT)
	case shaking:
		l.refuse(f, os.ErrDeadlineExceeded)
	case relaying:
		how := Idle
		if f.ways[client].ended || f.ways[upstream].ended {
			how = HalfClosed
		}
		l.finish(f, how, fmt.Errorf("%s: nothing moved for %s", how, limit))
	case warming, warm:
		l.discard(f)
	}
}
