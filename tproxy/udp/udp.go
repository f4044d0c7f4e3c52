// Package udp carries captured datagrams: transparent listeners take them in from
// clients, a SOCKS5 proxy relays them (UDP ASSOCIATE, RFC 1928 section 7), and what comes
// back leaves from the address that the client has asked.
//
// # Sessions
//
// A session is all that one endpoint of a client, its address and port, sends and gets,
// whoever it talks to: its mapping is endpoint-independent (RFC 4787 REQ-1), because all
// of it goes through one association. Who may answer is [Filter] (REQ-8). A session ends
// when the client has sent nothing for a while (REQ-5, REQ-6), or when the proxy ends the
// association. Destinations that are exempt from the proxy are sent to directly, from a
// socket of the session.
//
// # How it waits
//
// One event loop does all: it owns an epoll instance that is parked in the poller of the
// Go runtime, as those of package relay are. A session at rest holds two descriptors and
// its entry in a table, and no goroutine. Only the opening of an association, which waits
// for the proxy, is done on a goroutine of its own; meanwhile a few datagrams of the
// client are kept. Being only one, the loop keeps the order of datagrams and needs no
// lock.
//
// # Replies
//
// A reply leaves from a socket that is bound to the address and port that the client has
// asked (IP_TRANSPARENT, ip(7)). Such a socket is not connected: all sessions that talk to
// the address share it, and the kernel gives it none of the clients' datagrams, neither
// with nftables' tproxy statement, which takes unconnected sockets only at the listener's
// address, nor with a sk_lookup program, which is asked before it.
//
// # Sizes
//
// Whether a client forbids fragments cannot be seen. Towards the proxy a datagram that is
// longer than the path is known to take leaves in fragments, any other with DF
// (IP_PMTUDISC_WANT); towards clients, of whose paths nothing can be learnt since ICMP
// errors go to the address that was asked, the length of the link counts
// (IP_PMTUDISC_OMIT).
package udp

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Filter is whose datagrams reach a client (RFC 4787 section 5).
type Filter uint8

const (
	// AddressDependent lets in what comes from addresses that the client has sent to, from
	// any port. RFC 4787 REQ-8 recommends it where stringency counts most.
	AddressDependent Filter = iota
	// EndpointIndependent lets in whatever the proxy relays. RFC 4787 REQ-8 recommends it
	// where transparency counts most: games and calls between clients need it.
	EndpointIndependent
)

// Way is how the datagrams to a destination leave.
type Way uint8

const (
	// Refused is for destinations that are not to be reached: what is sent there is
	// dropped.
	Refused Way = iota
	// Direct is past the proxy.
	Direct
	// Upstream is through the proxy.
	Upstream
)

// String is the way's name in the access log; empty for Refused.
func (w Way) String() string {
	switch w {
	case Direct:
		return "direct"
	case Upstream:
		return "upstream"
	}
	return ""
}

// Route is what becomes of a client's datagrams to a destination.
type Route struct {
	Way Way
	// Name is what the client means by the destination, where that is known, and NameFrom
	// how it is known. The proxy is given the name and not the address.
	Name, NameFrom string
	// Placeholder says that the destination's address leads nowhere by itself.
	Placeholder bool
}

// Config says what is served and within which bounds. Times and numbers must be positive.
type Config struct {
	// Listen are the loopback addresses to which the kernel delivers, one a family.
	Listen []netip.AddrPort
	// Mark is the bypass mark, carried by every socket that is opened here.
	Mark uint32

	// Associate opens an association for a client; the zero Addr stands for none, for which
	// it is only tried. It is called on goroutines, by many at once.
	Associate func(ctx context.Context, client netip.Addr) (*upstream.Association, error)
	// Carry is told whether the proxy carries datagrams: first when that is known, then
	// whenever it has changed, with the reason if it does not. Until it does, and while it
	// does not, the kernel should refuse what it would capture. Calls are made one at a
	// time, on a goroutine that may wait.
	Carry func(carried bool, reason error)
	// Route decides about a destination of a client. It is called on the event loop and
	// must not wait.
	Route func(client netip.Addr, destination netip.AddrPort) Route
	// Impostor reports whether an address cannot be that of a sender that a proxy relays:
	// the gateway's own, its neighbours', those that are never routed. Like Route.
	Impostor func(netip.Addr) bool

	Filter Filter
	// Timeout is how long a session lives after the client has last sent something.
	Timeout time.Duration
	// MaxSessions bounds the sessions, of two descriptors each, or three more with direct
	// destinations; MaxPerClient those of one address; MaxReplies the sockets from which
	// replies leave, each for one address and port that was asked.
	MaxSessions, MaxPerClient, MaxReplies int

	// Access receives the record of every session at its end, on the event loop: it must
	// not wait.
	Access func(Record)
	Log    zerolog.Logger
}

// Record is what is known of one session at its end.
type Record struct {
	Duration     time.Duration
	Client       netip.AddrPort
	Destination  netip.AddrPort // the first one; Name and NameFrom are of the same
	Destinations int            // how many there were, at least
	Name         string
	NameFrom     string
	Way          Way    // of the first one
	Upstream     string // the proxy, without credentials; empty without an association

	// Payloads from and to the client, in bytes and in datagrams.
	Sent, Received                   int64
	SentDatagrams, ReceivedDatagrams int64

	Err error // why it ended; nil after Timeout
}

// Server owns the listeners and the sessions.
type Server struct {
	config   Config
	loop     *loop
	counters counters
	lost     chan error    // from the loop: the proxy does not carry datagrams any more
	retry    chan struct{} // from Retry
}

// Listen binds the listeners; datagrams wait in their queues until Serve. Serve closes
// them; without a call of Serve, Close does.
func Listen(config Config) (*Server, error) {
	s := &Server{config: config, lost: make(chan error, 1), retry: make(chan struct{}, 1)}
	var err error
	if s.loop, err = newLoop(s); err != nil {
		return nil, err
	}
	return s, nil
}

// Listeners calls f with every listener, up to its first error, which it returns. The
// sockets stay the server's, which closes them once Serve's context is done.
func (s *Server) Listeners(f func(socket int) error) error {
	for _, socket := range s.loop.listeners {
		if err := f(socket); err != nil {
			return err
		}
	}
	return nil
}

// Close closes the listeners of a server whose Serve was not called.
func (s *Server) Close() { s.loop.close() }

// Serve carries datagrams until ctx is cancelled. Then it sends what has come in already,
// ends all sessions and returns: when it does, all that it started has ended.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var watching sync.WaitGroup
	watching.Go(func() { s.watch(ctx) })
	watching.Go(func() {
		<-ctx.Done()
		s.loop.stop()
	})
	err := s.loop.run(ctx)
	cancel()
	watching.Wait()
	s.loop.finishLast(ctx)
	if err != nil {
		return fmt.Errorf("carry UDP: %w", err)
	}
	return nil
}

// Retry has a proxy that does not carry datagrams asked again at once.
func (s *Server) Retry() {
	select {
	case s.retry <- struct{}{}:
	default:
	}
}
