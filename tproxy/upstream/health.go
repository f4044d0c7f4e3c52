package upstream

import (
	"context"
	"errors"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// failuresDown is how many connects in a row have to fail until a proxy is taken for
	// down. One may be a chance: a full queue, a moment without a route.
	failuresDown = 2

	// silentProbe is how many flows in a row have to end without an answer until the
	// proxy is asked whether it is there at all. A single one says nothing: proxies are
	// silent while they dial, and some close instead of refusing.
	silentProbe = 3
)

// health is what flows have found out about a proxy, which is up to begin with. Nobody waits here: the way of a flow through it is a few atomic operations.
type health struct {
	failures atomic.Int32 // connects in a row that failed
	silent   atomic.Int32 // flows in a row that ended without an answer
	down     atomic.Bool
	latency  atomic.Int64          // of a connect, smoothed, in nanoseconds; 0 while unknown
	group    atomic.Pointer[Group] // whose Watch looks after it; nil if nobody does
	wake     chan struct{}         // asks that for a look; room for one
}

func newHealth() *health { return &health{wake: make(chan struct{}, 1)} }

// Up reports whether flows are sent to the proxy.
func (p *Proxy) Up() bool { return !p.health.down.Load() }

// Latency is what a connect to the proxy takes of late; 0 while that is not known.
func (p *Proxy) Latency() time.Duration { return time.Duration(p.health.latency.Load()) }

// Connected takes note that the proxy was connected to. It is for a caller that connects
// by itself; a Dialer does it for its own.
func (p *Proxy) Connected(took time.Duration) {
	if p.health.failures.Load() != 0 {
		p.health.failures.Store(0)
	}
	took = max(took, 1) // 0 is for not known
	before := p.health.latency.Load()
	if after := before + (int64(took)-before)/8; before != 0 {
		took = time.Duration(max(after, 1))
	}
	p.health.latency.Store(int64(took))
}

// Failed takes note that the proxy could not be connected to. What says nothing about the
// proxy, as a lack of local ports does, is ignored.
func (p *Proxy) Failed(err error) {
	if p.protocol == protocolDirect || !unreachable(err) || p.health.failures.Add(1) < failuresDown {
		return
	}
	if group := p.health.group.Load(); group != nil && p.health.down.CompareAndSwap(false, true) {
		group.arrange()
		p.look()
	}
}

// Answered takes note that the proxy has answered a flow, with whatever.
func (p *Proxy) Answered() {
	if p.health.silent.Load() != 0 {
		p.health.silent.Store(0)
	}
}

// Unanswered takes note that a flow has ended without an answer of the proxy.
func (p *Proxy) Unanswered() {
	if p.health.silent.Add(1) >= silentProbe {
		p.health.silent.Store(0)
		p.look()
	}
}

// look has the proxy probed.
func (p *Proxy) look() {
	select {
	case p.health.wake <- struct{}{}:
	default: // it is asked for already, or nobody watches
	}
}

// unreachable reports whether the error of a connect says something about the other side,
// or about the way there.
func unreachable(err error) bool {
	for _, errno := range []syscall.Errno{
		syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.ETIMEDOUT,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN,
		syscall.ENOENT, // of a unix socket
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || // in a TLS handshake
		errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// Elsewhere reports whether another proxy may carry a flow that failed here with err: one
// that could not be connected to, or that closed the connection without an answer. What
// it answered, be it a refusal, is the flow's answer; and a proxy that is silent for long
// is most likely dialling a destination that is silent for others as well.
func Elsewhere(err error) bool {
	if _, connecting := errors.AsType[*ConnectError](err); connecting {
		return true
	}
	if _, answered := errors.AsType[*RefusedError](err); answered {
		return false
	}
	return lost(err)
}

// lost reports whether a connection ended before there was an answer.
func lost(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// ConnectError is why a proxy could not be connected to: its name was not resolved, or
// none of its addresses took the connection.
type ConnectError struct{ Err error }

// Error is that of Err.
func (e *ConnectError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *ConnectError) Unwrap() error { return e.Err }
