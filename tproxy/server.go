// Package tproxy takes captured connections in and relays them: transparent
// listeners on the one side, a direct connection or a tunnel through the upstream
// proxy on the other. It holds the way of a flow from the accepted socket to its
// line in the access log; what the kernel must be told so that connections arrive
// is the business of the packages netfilter and routing.
//
// An accepted socket's local address is the flow's original destination, because
// TPROXY delivers packets unchanged (Documentation/networking/tproxy.rst): no NAT,
// no look-up.
package tproxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

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
	// MaxFlows is how many flows are carried at once; more are reset.
	MaxFlows int

	PeekTimeout      time.Duration // waiting for a name on the ports that are peeked
	ConnectTimeout   time.Duration // opening the connection to the upstream or the destination
	HandshakeTimeout time.Duration // the upstream's answer to CONNECT, which includes its own dialling
	IdleTimeout      time.Duration // a flow on which nothing moves; ends within two of these
	HalfCloseTimeout time.Duration // the same once one side has closed
	DrainTimeout     time.Duration // how long flows may run on once Serve is cancelled

	// Access receives the record of every flow at its end. It is called from many
	// goroutines at once.
	Access func(Record)
	Log    zerolog.Logger
}

// Server owns the transparent listeners and the flows that came through them.
type Server struct {
	config    Config
	policy    Policy
	dialer    upstream.Dialer
	burst     zerolog.Logger // for what may happen to every flow
	listeners []*net.TCPListener
	open      atomic.Int64 // flows carried now
	shedding  atomic.Bool  // the last connection was refused because of MaxFlows
}

var errStopped = errors.New("the gateway stops")

// Listen binds the transparent listeners; connections wait in their queues until
// Serve. Serve closes them; without a call of Serve, Close does.
func Listen(ctx context.Context, config Config, policy Policy) (*Server, error) {
	server := &Server{
		config: config,
		policy: policy,
		burst:  config.Log.Sample(&zerolog.BurstSampler{Burst: 5, Period: 10 * time.Second}),
		dialer: upstream.Dialer{
			ConnectTimeout:   config.ConnectTimeout,
			HandshakeTimeout: config.HandshakeTimeout,
			Control: func(_, _ string, raw syscall.RawConn) error {
				var failure error
				if err := raw.Control(func(fd uintptr) { failure = setMark(int(fd), config.Mark) }); err != nil {
					return err
				}
				return failure
			},
		},
	}
	for _, address := range config.Listen {
		listener, err := listenTransparent(ctx, address, config.Mark)
		if err != nil {
			server.Close()
			return nil, err
		}
		server.listeners = append(server.listeners, listener)
	}
	return server, nil
}

// Close closes the listeners.
func (s *Server) Close() {
	for _, listener := range s.listeners {
		listener.Close()
	}
}

// Serve carries flows until ctx is cancelled. Then it takes in what the kernel
// has already accepted, closes the listeners, lets the flows run for at most
// DrainTimeout, resets those that are left and returns nil: when it returns, all
// that it started has ended.
func (s *Server) Serve(ctx context.Context) error {
	flows, reset := context.WithCancel(context.WithoutCancel(ctx))
	defer reset()
	var accepting, running sync.WaitGroup
	for _, listener := range s.listeners {
		accepting.Go(func() { s.accept(ctx, flows, listener, &running) })
	}
	accepting.Wait()
	s.Close()

	drained := make(chan struct{})
	go func() {
		running.Wait()
		close(drained)
	}()
	select {
	case <-drained:
	case <-time.After(s.config.DrainTimeout):
		reset()
		<-drained
	}
	return nil
}

// Accept errors are of the moment (a full descriptor table, a client that went
// away) and never end a listener; the pause between two tries grows to the limit.
const (
	acceptPauseFirst = 5 * time.Millisecond
	acceptPauseLimit = time.Second
	// acceptLast is how long a stopping listener still takes in connections whose
	// handshake the kernel has completed.
	acceptLast = 20 * time.Millisecond
)

// accept takes connections of one listener until ctx is cancelled and starts a
// flow for each. Flows run under flows and count in running.
func (s *Server) accept(ctx, flows context.Context, listener *net.TCPListener, running *sync.WaitGroup) {
	stop := context.AfterFunc(ctx, func() { listener.SetDeadline(time.Now().Add(acceptLast)) })
	defer stop()
	pause := acceptPauseFirst
	for {
		client, err := listener.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			s.config.Log.Warn().Err(err).Dur("pause", pause).Msg("accept")
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, acceptPauseLimit)
			continue
		}
		pause = acceptPauseFirst
		if !s.admit() {
			client.Close()
			continue
		}
		running.Go(func() {
			defer s.open.Add(-1)
			s.config.Access(s.handle(flows, client))
		})
	}
}

// admit counts a new flow in, or says that there are too many. Only the change
// between the two is logged: a flood must not flood the log as well.
func (s *Server) admit() bool {
	if s.open.Add(1) > int64(s.config.MaxFlows) {
		s.open.Add(-1)
		if s.shedding.CompareAndSwap(false, true) {
			s.config.Log.Warn().Int("flows", s.config.MaxFlows).
				Msg("too many flows: new ones are reset until some end; raise --max-conns or the limit of open files")
		}
		return false
	}
	if s.shedding.Load() && s.shedding.CompareAndSwap(true, false) {
		s.config.Log.Info().Msg("new flows are taken again")
	}
	return true
}
