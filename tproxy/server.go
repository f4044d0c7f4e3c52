// Package tproxy takes captured connections in and relays them: transparent
// listeners on the one side, a direct connection or a tunnel through the upstream
// proxy on the other. It holds the way of a flow from the accepted socket to its
// line in the access log; what the kernel must be told so that connections arrive
// is the business of the packages netfilter and routing.
//
// An accepted socket's local address is the flow's original destination, because
// TPROXY delivers packets unchanged (Documentation/networking/tproxy.rst): no NAT,
// no look-up.
//
// Flows run on the event loops of package relay. One that has to wait for
// something other than a socket (the proxy's name, the first use of a credential)
// is taken off its loop and carried by goroutines of its own, with the same
// sniffers and handshakes. So is one of HTTP/1 requests, each of which goes its own
// way (package forward), as do those of clients that use the gateway as their proxy.
package tproxy

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/forward"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Config says what to listen on and within which limits flows are carried. All
// durations must be positive.
type Config struct {
	// Listen are the loopback addresses to which the kernel delivers, one a family.
	Listen []netip.AddrPort
	// Mark is the bypass mark, carried by every socket that is opened here, so
	// that the gateway never captures itself.
	Mark uint32
	// Dialer opens the connections of flows that leave the event loops. Its Control
	// sets the mark. It may be shared with others.
	Dialer *upstream.Dialer
	// MaxFlows is how many flows are carried at once; more are reset.
	MaxFlows int
	// MaxPipes bounds the pipes, of two descriptors each, through which bulk data
	// goes; see relay.Config.
	MaxPipes int
	// MaxWarm bounds the connections that are opened to proxies ahead of the flows that
	// need them; 0 opens none.
	MaxWarm int

	PeekTimeout      time.Duration // waiting for a name on the ports that are peeked
	ConnectTimeout   time.Duration // opening the connection to the upstream or the destination
	HandshakeTimeout time.Duration // the upstream's answers, which include its own dialling
	IdleTimeout      time.Duration // a flow on which nothing moves
	HalfCloseTimeout time.Duration // the same once one side has closed
	DrainTimeout     time.Duration // how long flows may run on once Serve is cancelled

	// Explicit are the listeners for clients that use the gateway as their proxy, and
	// AllowTo what these may reach of what is refused otherwise: addresses of the
	// gateway itself, and those that are never routed.
	Explicit []Explicit
	AllowTo  []netip.Prefix

	Via          bool // add a Via field to requests and answers
	ForwardedFor bool // add the client's address to requests, as X-Forwarded-For
	Query        bool // keep the query in the URL of a request's record

	// Request receives the record of every HTTP request at its end; like Access.
	Request func(forward.Record)
	// Access receives the record of every flow at its end. It is called on event
	// loops and from other goroutines at once, and must not wait for anything slow.
	Access func(Record)
	Log    zerolog.Logger
}

// warmAbove is how far a proxy has to be away for connections to be opened ahead: to one on
// the LAN that costs processor time (no TCP_DEFER_ACCEPT, and more calls of epoll), and
// saves nothing that anybody notices.
const warmAbove = time.Millisecond

// Server owns the transparent listeners and the flows that came through them.
type Server struct {
	config    Config
	policy    Policy
	burst     zerolog.Logger              // for what may happen to every flow
	source    func(netip.Addr) netip.Addr // of connections to proxies; nil for the kernel's choice
	sockets   []int                       // of the transparent listeners, all loops
	engine    *relay.Engine
	explicit  []explicitListener
	forwarder *forward.Server
	detached  detached     // flows that have goroutines of their own
	open      atomic.Int64 // flows carried now
	shedding  atomic.Bool  // the last connection was refused because of MaxFlows

	accepted, refused, acceptErrors, exhausted atomic.Int64 // see Stats
}

// Listen binds the transparent listeners; connections wait in their queues until
// Serve. Serve closes them; without a call of Serve, Close does.
func Listen(config Config, policy Policy) (*Server, error) {
	s := &Server{
		config: config,
		policy: policy,
		burst:  config.Log.Sample(&zerolog.BurstSampler{Burst: 5, Period: 10 * time.Second}),
	}
	if len(config.Dialer.Sources) > 0 {
		s.source = config.Dialer.Source
	}
	s.forwarder = s.newForwarder()
	if err := s.listenExplicit(); err != nil {
		return nil, err
	}
	sockets, err := listenAll(config)
	if err != nil {
		s.closeExplicit()
		return nil, err
	}
	s.sockets = slices.Concat(sockets...)
	s.engine, err = relay.Open(relay.Config{
		Sockets:          sockets,
		Accept:           s.accept,
		AcceptFailed:     s.acceptFailed,
		Mark:             config.Mark,
		PeekTimeout:      config.PeekTimeout,
		ConnectTimeout:   config.ConnectTimeout,
		HandshakeTimeout: config.HandshakeTimeout,
		IdleTimeout:      config.IdleTimeout,
		HalfCloseTimeout: config.HalfCloseTimeout,
		DrainTimeout:     config.DrainTimeout,
		MaxWarm:          (config.MaxWarm + len(sockets) - 1) / len(sockets),
		WarmAbove:        warmAbove,
		MaxPipes:         config.MaxPipes,
	})
	if err != nil {
		closeAll(sockets)
		s.closeExplicit()
		return nil, err
	}
	return s, nil
}

// listenAll opens every listener once for each loop.
func listenAll(config Config) ([][]int, error) {
	loops := relay.Loops()
	sockets := make([][]int, loops)
	for loop := range sockets {
		for _, address := range config.Listen {
			socket, err := listenTransparent(address, config.Mark, loops > 1)
			if err != nil {
				closeAll(sockets)
				return nil, err
			}
			sockets[loop] = append(sockets[loop], socket)
		}
	}
	return sockets, nil
}

func closeAll(sockets [][]int) {
	for _, socket := range slices.Concat(sockets...) {
		unix.Close(socket)
	}
}

// Close closes the listeners of a server whose Serve was not called.
func (s *Server) Close() {
	s.closeExplicit()
	s.engine.Close()
}

// Serve carries flows until ctx is cancelled. Then it takes in what the kernel
// has already accepted, closes the listeners, lets the flows run for at most
// DrainTimeout, resets those that are left and returns: when it does, all that it
// started has ended.
func (s *Server) Serve(ctx context.Context) error {
	cancelled := make(chan time.Time, 1)
	stop := context.AfterFunc(ctx, func() {
		s.detached.drain()
		s.closeExplicit()
		cancelled <- time.Now()
	})
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		s.serveExplicit()
	}()
	err := s.engine.Serve(ctx)
	var left time.Duration // none if it was the engine that failed
	if ctx.Err() != nil {
		// The engine may be done before the time of the cancellation is known.
		left = s.config.DrainTimeout
		if !stop() {
			left -= time.Since(<-cancelled)
		}
	}
	s.closeExplicit()
	<-accepting
	s.detached.close(left)
	s.forwarder.Close()
	return err
}

// Listeners calls f with every socket of the transparent listeners, up to its first error, which it returns. The sockets stay
// the server's, which may close them once Serve's context is done.
func (s *Server) Listeners(f func(socket int) error) error {
	for _, socket := range s.sockets {
		if err := f(socket); err != nil {
			return err
		}
	}
	return nil
}

// NetworkChanged tells that the ways to the proxies may be others now: connections that no
// flow has are not used any more. It is safe for concurrent use.
func (s *Server) NetworkChanged() {
	s.engine.NetworkChanged()
	s.forwarder.NetworkChanged()
}

// Stats are counters since the start.
type Stats struct {
	Accepted       int64 // flows that were taken in
	Refused        int64 // connections that were reset because of MaxFlows
	AcceptErrors   int64 // pauses of a listener
	PortsExhausted int64 // flows for which there was no local port left
	Spliced        int64 // bytes that did not enter user space
	Warm           int64 // flows for which a connection to the proxy had been opened ahead
}

// Stats returns the counters. It is safe for concurrent use.
func (s *Server) Stats() Stats {
	engine := s.engine.Stats()
	return Stats{
		Accepted:       s.accepted.Load(),
		Refused:        s.refused.Load(),
		AcceptErrors:   s.acceptErrors.Load(),
		PortsExhausted: s.exhausted.Load(),
		Spliced:        engine.Spliced,
		Warm:           engine.Warm,
	}
}

// accept starts a flow, on its loop.
func (s *Server) accept(client, destination netip.AddrPort) relay.Session {
	if !s.admit() {
		return nil
	}
	return s.newFlow(client, destination)
}

// acceptFailed tells of a listener that pauses.
func (s *Server) acceptFailed(err error, pause time.Duration) {
	s.acceptErrors.Add(1)
	s.burst.Warn().Err(err).Dur("pause", pause).Msg("accept")
}

// warn logs what an administrator can do something about: an upstream that refuses
// or cannot be reached. A refused credential is told whenever the upstream says
// so, which the credential's breaker makes rare; of the others a burst is enough.
func (s *Server) warn(err error) {
	if errors.Is(err, upstream.ErrAllDown) {
		return // it was told when it came to that
	}
	if upstream.Denied(err) {
		s.config.Log.Error().Err(err).Msg("the upstream refuses the credential")
		return
	}
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		s.exhausted.Add(1)
		s.burst.Error().Err(err).Msg("all local ports towards the upstream are in use: " +
			"add addresses with --upstream-source, or widen net.ipv4.ip_local_port_range")
		return
	}
	s.burst.Warn().Err(err).Msg("a flow was not carried")
}

// admit counts a new flow in, or says that there are too many. Only the change
// between the two is logged: a flood must not flood the log as well.
func (s *Server) admit() bool {
	if s.open.Add(1) > int64(s.config.MaxFlows) {
		s.open.Add(-1)
		s.refused.Add(1)
		if s.shedding.CompareAndSwap(false, true) {
			s.config.Log.Warn().Int("flows", s.config.MaxFlows).
				Msg("too many flows: new ones are reset until some end; raise --max-conns or the limit of open files")
		}
		return false
	}
	s.accepted.Add(1)
	if s.shedding.Load() && s.shedding.CompareAndSwap(true, false) {
		s.config.Log.Info().Msg("new flows are taken again")
	}
	return true
}
