// Package relay carries captured TCP connections on event loops: it accepts a
// client, lets the caller look at what the client says first, connects to the
// next hop, drives the handshake there and then moves bytes both ways until both
// sides have closed.
//
// It knows protocols only as bytes in, bytes out and done. What a flow is and
// where it goes is the caller's [Session]; what is said to the next hop is its
// [Handshake]. Both are called on a loop, one call at a time for each flow, and
// must not block: a loop carries thousands of flows.
//
// # How it waits
//
// Each loop owns an edge-triggered epoll instance (epoll(7)) whose descriptor is
// itself parked in the poller of the Go runtime. A loop without work is then an
// ordinary parked goroutine and holds no thread in epoll_wait(2), which would cost
// several times as much at a low rate of connections. Timers are read deadlines of
// that descriptor, and so is the signal to stop.
//
// # What a flow costs
//
// A flow at rest holds its two descriptors and one slab entry; no goroutine,
// buffer, pipe or timer. Small exchanges go through one buffer a loop with
// recv(2) and send(2). After 256 KiB one way the bytes stay in the kernel:
// splice(2) through a pipe that is lent by a capped pool while data flows.
//
// # How a flow ends
//
// A FIN is passed on as a FIN once everything before it is delivered, and leaves
// the other direction running (half-close, RFC 9293 section 3.6). Everything else
// is a reset of both sides. SO_LINGER with time 0 is set on both sockets while the
// flow runs, so that even a killed process ends its flows by reset and never by
// the FIN that would make half a download look whole.
package relay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// MaxFlight is how many bytes a session can peek at; the next are left in the
// client's socket. It is enough for a ClientHello with a post-quantum key share
// (about 1,800 bytes) many times over, and for the longest header field that
// common HTTP servers take.
const MaxFlight = 16 << 10 // bytes

// Config says what an engine serves. Every time-out may be 0 for none.
type Config struct {
	// Sockets are the listening sockets of each loop, so that their number is the
	// number of loops; [Loops] is a good one. Each is a TCP socket that is bound,
	// listening and non-blocking, and is named once; several on one address share
	// it by SO_REUSEPORT. They belong to the engine from a successful Open on.
	Sockets [][]int

	// Accept returns the session of a new connection. Its destination is the
	// local address of the socket, which is what the client dialled when the
	// connection came through the kernel's tproxy statement. A nil session
	// refuses the client by a reset. Addresses are never IPv4-mapped IPv6.
	Accept func(client, destination netip.AddrPort) Session

	// Mark is the SO_MARK of outgoing connections; 0 for none.
	Mark uint32

	// AcceptFailed is told of an error that made a loop stop accepting for a
	// pause: too many open files, mostly. It is called on the loop. May be nil.
	AcceptFailed func(err error, pause time.Duration)

	PeekTimeout      time.Duration // from the accept to the end of peeking
	ConnectTimeout   time.Duration // for each address of a hop
	HandshakeTimeout time.Duration // from the connect to the end of the handshake
	IdleTimeout      time.Duration // a flow on which nothing moves
	HalfCloseTimeout time.Duration // the same once one direction is closed
	DrainTimeout     time.Duration // for all flows, once Serve is cancelled; 0 resets them at once

	MaxFlows int // more are refused by a reset; 0 for no limit
	// MaxWarm bounds the connections of each loop that are opened ahead; 0 opens none.
	MaxWarm int
	// WarmAbove is the time that a connect has to take for this to be done.
	WarmAbove time.Duration
	// MaxPipes bounds the pipes of all loops together. Each holds two descriptors
	// and, while it is in use, up to 1 MiB. Without a free one a flow goes on with
	// recv and send, which costs about a third more. A user without CAP_SYS_RESOURCE
	// gets 64 of them by default (/proc/sys/fs/pipe-user-pages-soft).
	MaxPipes int
}

// Session is one captured flow as its owner sees it. The methods are called on
// the flow's loop, never two at a time, and must not block.
type Session interface {
	// Peek looks at everything that the client has sent so far and says whether
	// it needs more. The first call comes without any bytes, right after the
	// accept: a session that does not peek, as it must where the server speaks
	// first, answers false and is routed at once. last says that no more will
	// come: MaxFlight or the time is reached, or the client has sent its FIN; the
	// answer is ignored then. flight is valid during the call only.
	//
	// A client that closes without a single byte while it is asked for some is
	// not routed.
	Peek(flight []byte, last bool) (more bool)

	// Route is called once, after the last Peek. An error resets the client.
	Route() (Hop, error)

	// Connected tells that an address of the hop was connected to, and how long that
	// took. It is not called when the connection was there already (Hop.Warm).
	Connected(address netip.AddrPort, took time.Duration)

	// Retry is asked for another hop when the last one failed, and the client notices
	// nothing: how is ConnectFailed, with the error of the last of the addresses, or
	// HandshakeFailed. Without one (false) that is the end of the flow.
	Retry(how End, err error) (hop Hop, again bool)

	// Closed is the last call. It is not made for a detached flow.
	Closed(Outcome)
}

// Hop says where a flow goes next. What was peeked is the first that is sent
// there, after the handshake.
type Hop struct {
	// Addrs are tried in order until one connects.
	Addrs []netip.AddrPort

	// Handshake is what is said before the client's bytes. Nil for nothing.
	Handshake Handshake

	// Source returns the source address of a connection to an address, of the same
	// family; the zero Addr leaves it to the kernel. It must not block. May be nil.
	Source func(to netip.Addr) netip.Addr

	// Warm says that connections to the first address may be opened ahead of the flows
	// that need them: its handshake is the same for all until the first byte is sent.
	Warm bool

	// Detach, if it is set, takes the flow off the engine instead: the client's
	// socket, non-blocking and still set to end by a reset (SO_LINGER), with what
	// was read from it. Both are the callee's from then on; it runs on the loop
	// and has to leave the work to a goroutine. The flow no longer counts for
	// MaxFlows.
	Detach func(client int, flight []byte)
}

// Handshake is one flow's negotiation with the next hop. It does no input or
// output of its own, and bounds what it accepts.
type Handshake interface {
	// Hello is what to send first. It is called again if a connection that was opened
	// ahead turns out to be gone before there was a byte of an answer.
	Hello() []byte
	// Feed takes the bytes that were just received and returns what to send.
	// When done, rest is the part of in that already belongs to the client. An
	// error resets the client. in is valid during the call only; out and rest
	// until the next one.
	Feed(in []byte) (out, rest []byte, done bool, err error)
}

// Stats are counters of an engine since its start, but for Flows and Pipes, which
// are of the moment.
type Stats struct {
	Flows        int64 // open flows
	Accepted     int64 // connections given to Accept
	Refused      int64 // connections that were reset because of MaxFlows
	AcceptErrors int64 // pauses of a listener
	Pipes        int64 // pipes that exist, in use or waiting
	Spliced      int64 // bytes that went through pipes
	Warm         int64 // flows whose connection was there already
}

// Engine owns the listening sockets and the flows that came through them.
type Engine struct {
	config   Config
	loops    []*loop
	stopping atomic.Bool
	network  atomic.Uint32 // grows with each call of NetworkChanged
	counters counters
}

// counters are shared by the loops of an engine; each moves a few times a flow,
// never a time a chunk.
type counters struct {
	flows, accepted, refused, acceptErrors, pipes, spliced, warm atomic.Int64
}

// Loops is how many loops to run: one for every two processors that Go uses, at
// least one. The kernel's part of the work, other goroutines and neighbours need
// the rest. Measured on two processors that were shared with clients and servers,
// medians of 7 rounds, two loops against one: a new connection costs 1.12 times
// the processor time while 1.06 times as many are served, an exchange on a kept
// connection 1.08 times with 1.8 times the latency at the 99th percentile, a byte
// of bulk 1.0 to 1.1 times; at 60 connections a second there is no difference. At
// 90 µs a connection and 0.1 s a GB one loop is enough for most gateways.
func Loops() int { return (runtime.GOMAXPROCS(0) + 1) / 2 }

// Open prepares the loops; connections wait in the queues of the sockets until
// Serve. It sets SO_LINGER, TCP_NODELAY and keep-alive on the sockets, which accepted
// connections inherit. On an error the sockets remain the caller's. Without a
// call of Serve, Close releases everything.
func Open(config Config) (*Engine, error) {
	if len(config.Sockets) == 0 {
		return nil, errors.New("relay: no listening socket")
	}
	engine := &Engine{config: config}
	for number, sockets := range config.Sockets {
		// Each loop has its part of the pipes, so that no lock is needed.
		pipes := (config.MaxPipes + number) / len(config.Sockets)
		loop, err := newLoop(engine, sockets, pipes)
		if err != nil {
			for _, loop := range engine.loops {
				loop.file.Close()
			}
			return nil, fmt.Errorf("relay: %w", err)
		}
		engine.loops = append(engine.loops, loop)
	}
	return engine, nil
}

// Close closes the sockets of an engine whose Serve was not called.
func (e *Engine) Close() {
	for _, loop := range e.loops {
		loop.close()
	}
}

// Serve carries flows until ctx is cancelled. Then it takes in what the kernel
// has already accepted, closes the sockets, lets the flows run for at most
// DrainTimeout, resets those that are left and returns: when it does, all that it
// started has ended. The error tells of a loop whose epoll instance failed, which
// ends the whole engine; it is nil after a cancellation.
func (e *Engine) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, e.stop)()

	failures := make([]error, len(e.loops))
	var running sync.WaitGroup
	for number, loop := range e.loops {
		running.Go(func() {
			defer cancel()
			failures[number] = loop.run()
		})
	}
	running.Wait()
	return errors.Join(failures...)
}

// stop tells the loops to drain. A read deadline in the past is what wakes a
// parked loop; see loop.wait for why it cannot be missed.
func (e *Engine) stop() {
	e.stopping.Store(true)
	for _, loop := range e.loops {
		loop.file.SetReadDeadline(time.Unix(1, 0))
	}
}

// NetworkChanged tells that connections which nobody uses yet may lead nowhere any more:
// those opened ahead are not used. It is safe for concurrent use.
func (e *Engine) NetworkChanged() { e.network.Add(1) }

// Stats returns the counters. It is safe for concurrent use.
func (e *Engine) Stats() Stats {
	return Stats{
		Flows:        e.counters.flows.Load(),
		Accepted:     e.counters.accepted.Load(),
		Refused:      e.counters.refused.Load(),
		AcceptErrors: e.counters.acceptErrors.Load(),
		Pipes:        e.counters.pipes.Load(),
		Spliced:      e.counters.spliced.Load(),
		Warm:         e.counters.warm.Load(),
	}
}
