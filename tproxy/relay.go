package tproxy

import (
	"errors"
	"fmt"
	"math"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
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

	ending  sync.Mutex // one end at a time: a FIN is passed on, or both sides are reset
	aborted error      // why the watchdog or one direction reset it; guarded by ending
	halved  bool       // one side's FIN is passed on; guarded by ending
}

// relay carries bytes both ways until both sides have closed, one fails, or the
// session stands still for too long. flight is what was already read of the
// client, rest what was already read of the upstream: each goes out first.
//
// A FIN is passed on as a FIN and leaves the other direction running (half-close,
// RFC 9293 section 3.6); anything else resets both sides. Both connections are
// closed on return. The bytes go by splice(2) and do not enter user space; the pipe
// for that is taken only while there are some.
func (s *session) relay(flight, rest []byte) (sent, received int64, err error) {
	for _, conn := range []*net.TCPConn{s.client, s.upstream} {
		keepUrgent(conn)
	}
	watchdog := s.watch()
	defer watchdog.Stop()

	var down sync.WaitGroup
	down.Go(func() { received = s.carry("to the client", s.client, s.upstream, rest, watchdog) })
	sent = s.carry("from the client", s.upstream, s.client, flight, watchdog)
	down.Wait()

	s.ending.Lock()
	defer s.ending.Unlock()
	if s.aborted != nil {
		return sent, received, s.aborted
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
		n, err = relay.Copy(to, from, math.MaxInt64)
		moved += n
	}
	if err == nil {
		err = s.passFIN(to, from, watchdog)
	}
	if err != nil {
		s.abort(fmt.Errorf("%s: %w", direction, cause(err)))
	}
	return moved
}

// passFIN tells a side that the other will send no more.
func (s *session) passFIN(to, from *net.TCPConn, watchdog *time.Timer) error {
	s.ending.Lock()
	defer s.ending.Unlock()
	if s.aborted != nil {
		return s.aborted // before this side could be told that all is well
	}
	if !s.halved && info(from).State == stateClose {
		// The kernel tells of a reset once. If that was to the write of the other
		// direction, the read here sees an end that looks like a FIN. Once both
		// sides have sent one, this state is that of an orderly end.
		return syscall.ECONNRESET
	}
	if !s.halved {
		s.halved = true
		watchdog.Reset(s.halfClose)
	}
	return to.CloseWrite()
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
	s.ending.Lock()
	defer s.ending.Unlock()
	if s.aborted == nil {
		s.aborted = cause
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
		moved := progress(s.client) + progress(s.upstream)
		s.ending.Lock()
		limit, cause := s.idle, errIdle
		if s.halved {
			limit, cause = s.halfClose, errHalfClose
		}
		still := moved == before
		before = moved
		if !still {
			timer.Reset(limit) // under the mutex: passFIN may be about to shorten it
		}
		s.ending.Unlock()
		if still {
			s.abort(cause)
		}
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

// keepUrgent leaves urgent data in the stream (tcp(7)), where it is carried like other.
func keepUrgent(conn *net.TCPConn) {
	if raw, err := conn.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
}

// clearLinger makes the next close an ordinary one: what is still unsent is
// sent, then a FIN.
func clearLinger(conn *net.TCPConn) {
	conn.SetLinger(-1)
}
