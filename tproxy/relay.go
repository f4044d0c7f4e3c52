package tproxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors that end a session before both sides closed it.
var (
	errIdle      = errors.New("idle limit")
	errHalfClose = errors.New("one side closed and the other stood still")
)

// session is the relay between one client and where its flow goes.
type session struct {
	client, upstream *net.TCPConn
	idle, halfClose  time.Duration

	aborted atomic.Pointer[error] // why the watchdog or one direction ended it
	halved  atomic.Bool           // one side's FIN is passed on
}

// relay carries bytes both ways until both sides have closed, one fails, or the
// session stands still for too long. flight is what was already read of the
// client, rest what was already read of the upstream: each goes out first.
//
// A FIN is passed on as a FIN and leaves the other direction running (half-close,
// RFC 9293 section 3.6); anything else resets both sides. Both connections are
// closed on return. The copies are io.Copy between *net.TCPConn, which is
// splice(2): the bytes do not enter user space.
func (s *session) relay(flight, rest []byte) (sent, received int64, err error) {
	watchdog := s.watch()
	defer watchdog.Stop()

	var down sync.WaitGroup
	down.Go(func() { received = s.carry("to the client", s.client, s.upstream, rest, watchdog) })
	sent = s.carry("from the client", s.upstream, s.client, flight, watchdog)
	down.Wait()

	if cause := s.aborted.Load(); cause != nil {
		return sent, received, *cause
	}
	// Both sides are at their end: now a close is an orderly one.
	clearLinger(s.client)
	clearLinger(s.upstream)
	s.client.Close()
	s.upstream.Close()
	return sent, received, nil
}

// carry sends what was read before, copies one direction to its end and passes the
// FIN on.
func (s *session) carry(direction string, to, from *net.TCPConn, before []byte, watchdog *time.Timer) (moved int64) {
	var err error
	if len(before) > 0 { // an empty write is a system call, too
		var n int
		n, err = to.Write(before)
		moved = int64(n)
	}
	if err == nil {
		var n int64
		n, err = io.Copy(to, from)
		moved += n
	}
	if err == nil && !s.halved.Load() && info(from).State == stateClose {
		// The kernel tells of a reset once. If that was to the write of the other
		// direction, the read here sees an end that looks like a FIN.
		err = syscall.ECONNRESET
	}
	// Before the FIN goes out: once both sides have sent one, the state above is
	// that of an orderly end.
	first := err == nil && s.halved.CompareAndSwap(false, true)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		s.abort(fmt.Errorf("%s: %w", direction, cause(err)))
		return moved
	}
	if first {
		watchdog.Reset(s.halfClose)
	}
	return moved
}

// cause is what the kernel said, without the addresses that package net puts
// around it: they stand in the access line already.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// abort resets both sides; the first cause is the one that is told.
func (s *session) abort(cause error) {
	if s.aborted.CompareAndSwap(nil, &cause) {
		s.client.Close()
		s.upstream.Close()
	}
}

// watch ends a session in which nothing moved for a whole period. It asks the
// kernel's own byte counters, so that neither copy has to be interrupted and a
// copy that is blocked in writing is seen as well.
func (s *session) watch() *time.Timer {
	var timer *time.Timer
	ready := make(chan struct{})
	before := int64(-1)
	timer = time.AfterFunc(s.idle, func() {
		<-ready
		limit, cause := s.idle, errIdle
		if s.halved.Load() {
			limit, cause = s.halfClose, errHalfClose
		}
		moved := progress(s.client) + progress(s.upstream)
		if moved == before {
			s.abort(cause)
			return
		}
		before = moved
		timer.Reset(limit)
	})
	close(ready)
	return timer
}

// progress is how many bytes conn has received and how many of those it sent
// were acknowledged; 0 when it is closed.
func progress(conn *net.TCPConn) int64 {
	state := info(conn)
	return int64(state.Bytes_received + state.Bytes_acked)
}

// stateClose is that of a connection of which nothing is left: TCP_CLOSE of the
// kernel's include/net/tcp_states.h. After a FIN it is another.
const stateClose = 7

// info is the kernel's view of a connection (TCP_INFO, tcp(7)); zero when it is
// closed here.
func info(conn *net.TCPConn) (state unix.TCPInfo) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return state
	}
	raw.Control(func(fd uintptr) {
		if known, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			state = *known
		}
	})
	return state
}

// clearLinger makes the next close an ordinary one: what is still unsent is
// sent, then a FIN.
func clearLinger(conn *net.TCPConn) {
	conn.SetLinger(-1)
}
