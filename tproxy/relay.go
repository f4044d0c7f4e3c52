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
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Errors that end a session before both sides closed it.
var (
	errIdle      = errors.New("idle limit")
	errHalfClose = errors.New("one side closed and the other stood still")
)

// session is the relay between one client and where its flow goes.
type session struct {
	client, upstream upstream.Conn
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
	keepUrgent(s.client)
	keepUrgent(s.upstream)
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
	// Now a close is an orderly one: what is still unsent is sent, then a FIN.
	s.client.SetLinger(-1)
	s.upstream.SetLinger(-1)
	s.client.Close()
	s.upstream.Close()
	return sent, received, nil
}

// carry sends what was read before, copies one direction to its end and passes the
// FIN on.
func (s *session) carry(direction string, to, from upstream.Conn, before []byte, watchdog *time.Timer) (moved int64) {
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
func (s *session) passFIN(to, from upstream.Conn, watchdog *time.Timer) error {
	s.ending.Lock()
	defer s.ending.Unlock()
	if s.aborted != nil {
		return s.aborted // before this side could be told that all is well
	}
	if _, reset := upstream.Look(from); reset && !s.halved {
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
		client, _ := upstream.Look(s.client)
		moved, _ := upstream.Look(s.upstream)
		moved += client
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

// keepUrgent leaves urgent data in the stream (tcp(7)), where it is carried like other.
func keepUrgent(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	if raw, err := tcp.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	}
}
