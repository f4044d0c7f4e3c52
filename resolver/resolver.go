// Package resolver answers DNS queries (RFC 1034, RFC 1035): those that the kernel's
// tproxy statement delivers, whatever server they were meant for, and those of
// clients that ask it as an ordinary server.
//
// A query that is answered from the cache never leaves the loop that read it and
// costs no allocation: the answer is stored in wire form, and only its id, flags
// and the letter case of its question are the client's. Everything else is worked
// out on a goroutine: identical questions are asked once, of the servers of the
// longest zone that the name is in. When no server answers, an expired answer is
// given, for as long as RFC 8767 allows.
//
// The answer to a captured query leaves from the address that was asked. Over UDP
// the source port is that of the listener; what put the query there has to put the
// port right as well (package netfilter does).
//
// # What is not passed on
//
// EDNS (RFC 6891) is spoken with either side by itself. Of a client's options only
// its subnet is passed on, and that only if it is asked for (RFC 7871). ANY is
// answered with as little as RFC 8482 allows. Names that mean this host or nothing
// at all (RFC 6761, RFC 7686) never leave.
package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/cache"
	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/fakeip"
)

// Way asks the servers of one way.
type Way interface {
	// Exchange asks a whole message with one question, and returns an answer that
	// has its id and question. It returns soon after ctx is done.
	Exchange(ctx context.Context, query []byte) (answer []byte, err error)
	// String names the way in logs and counters.
	String() string
}

// Zone is the names that end in Suffix, from a label border on, and who is asked
// for them.
type Zone struct {
	Suffix string // in any case; empty for every name
	Below  bool   // not Suffix itself
	Way    Way    // nil: answered with the addresses of Config.Fake
	// Servers are those that Way asks, if they may be clients as well: what they do not
	// know of these names they would ask themselves.
	Servers []netip.Addr
}

// Config says where to listen, who may ask and who is asked.
type Config struct {
	// Transparent are the addresses on loopback to which captured queries are
	// delivered, at most one a family, and UDP and TCP which of them are served.
	Transparent []netip.AddrPort
	UDP, TCP    bool

	// Listen are ordinary addresses, served over both. An unspecified one answers
	// from the address that was asked.
	Listen []netip.AddrPort
	// Allow says who may ask there; others are refused. Whose queries are captured
	// is the kernel's business. It is called by many goroutines at once.
	Allow func(client netip.Addr) bool

	// Mark is the SO_MARK of every socket; 0 for none.
	Mark uint32

	// Zones say who is asked: the longest that a name is in, and of two alike the
	// first. A name that is in none is refused.
	Zones []Zone
	// Fake gives names the addresses of zones without a way. It remains the caller's.
	Fake *fakeip.Pool

	CacheBytes      int  // bound of the answers that are kept
	KeepECS         bool // pass on the client's subnet; such answers are not kept
	AllowPrivateDNS bool // leave the names alone by which browsers find resolvers of their own

	MaxInFlight    int // questions that are asked at once; more get an expired answer or SERVFAIL
	MaxPerClient   int // of one client
	MaxConnections int // open TCP connections of a listener; more wait in the kernel

	Log zerolog.Logger // one debug line a query
}

// Server owns the listeners and the questions that are being asked.
type Server struct {
	config Config
	zones  zones
	cache  *cache.Cache
	told   *told
	stats  counters
	debug  bool // a line a query is wanted

	udp []*udpListener
	tcp []*tcpListener

	flights  flights
	inFlight atomic.Int64
	asking   map[string]*atomic.Int64 // of inFlight, by way; the map never changes
	clients  clients
	running  sync.WaitGroup // everything that Serve started
}

// Limits of what is kept: RFC 8767 section 4 and 5, RFC 2308 section 5.
const (
	maxTTL      = 7 * 24 * time.Hour
	maxNegative = 3 * time.Hour
	maxStale    = 24 * time.Hour
)

// Listen binds the listeners; queries wait until Serve. Serve closes them; without
// a call of Serve, Close does.
func Listen(config Config) (*Server, error) {
	s := &Server{
		config: config,
		zones:  newZones(config.Zones),
		cache:  cache.New(cache.Config{MaxBytes: config.CacheBytes, MaxTTL: maxTTL, MaxNegative: maxNegative, MaxStale: maxStale}),
		told:   newTold(),
		asking: make(map[string]*atomic.Int64),
		debug:  config.Log.GetLevel() <= zerolog.DebugLevel,
	}
	for _, zone := range config.Zones {
		if zone.Way != nil && s.asking[zone.Way.String()] == nil {
			s.asking[zone.Way.String()] = new(atomic.Int64)
		}
	}
	for _, address := range config.Transparent {
		if err := s.listen(address, true); err != nil {
			s.Close()
			return nil, fmt.Errorf("listen for captured DNS: %w", inUse(err, "--dns-tproxy-listen"))
		}
	}
	for _, address := range config.Listen {
		if err := s.listen(address, false); err != nil {
			s.Close()
			return nil, fmt.Errorf("listen for DNS: %w", inUse(err, "--dns-proxy-listen"))
		}
	}
	return s, nil
}

// listen opens what is served at an address.
func (s *Server) listen(address netip.AddrPort, transparent bool) error {
	if !transparent || s.config.UDP {
		listeners, err := listenUDP(address, transparent, s.config.Mark)
		if err != nil {
			return err
		}
		s.udp = append(s.udp, listeners...)
	}
	if !transparent || s.config.TCP {
		listener, err := listenTCP(address, transparent, s.config.Mark)
		if err != nil {
			return err
		}
		s.tcp = append(s.tcp, listener)
	}
	return nil
}

// Listeners calls f with every socket of the transparent listeners, up to the first error, which it returns. The sockets stay
// the server's, which closes them once Serve's context is done.
func (s *Server) Listeners(f func(socket int) error) error {
	var conns []syscall.Conn
	for _, listener := range s.udp {
		if listener.transparent {
			conns = append(conns, listener.conn)
		}
	}
	for _, listener := range s.tcp {
		if listener.transparent {
			conns = append(conns, listener.listener)
		}
	}
	for _, conn := range conns {
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		var failure error
		if err := raw.Control(func(fd uintptr) { failure = f(int(fd)) }); err != nil || failure != nil {
			return errors.Join(err, failure)
		}
	}
	return nil
}

// Close closes the listeners of a server that is not served.
func (s *Server) Close() {
	for _, listener := range s.udp {
		listener.conn.Close()
	}
	for _, listener := range s.tcp {
		listener.close()
	}
}

// Serve answers until ctx is cancelled. When it returns, all that it started has
// ended. The error tells of a listener that failed, which ends the whole server; it
// is nil after a cancellation.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, s.Close)()
	for _, listener := range s.udp {
		s.running.Go(func() { cancel(s.serveUDP(ctx, listener)) })
	}
	for _, listener := range s.tcp {
		s.running.Go(func() { cancel(s.serveTCP(ctx, listener)) })
	}
	<-ctx.Done()
	s.Close()
	s.running.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Name returns the name for which a client was last told an address.
func (s *Server) Name(client, destination netip.Addr) (name string, ok bool) {
	if s.config.Fake != nil && s.config.Fake.Contains(destination) {
		return s.config.Fake.Name(destination)
	}
	return s.told.name(client, destination)
}
