// Package pac says by a proxy auto-configuration script where a flow leaves: direct
// or through which proxies, in which order.
//
// A PAC script is JavaScript with a function FindProxyForURL(url, host), which
// Netscape described in "Navigator Proxy Auto-Config File Format" (1996) and which
// no standard describes; where browsers differ from that text, this package does
// what they do.
//
// A script comes over the network, often unprotected, so it is hostile until proven
// otherwise. No JavaScript engine for Go bounds its memory, and one expression
// ('x'.repeat(1e10)) has the Go runtime end the whole process. Scripts are therefore
// evaluated in processes of their own, which have no environment, can open no file and
// no socket, and have a limit on memory that the kernel holds (RLIMIT_DATA). One that
// takes too much memory or too long dies alone and is replaced; the flow gets an
// error. Resolving names and logging is done by this side of the pipes, within
// bounds.
//
// A transparent gateway knows no URLs, only hosts and ports: scripts see
// https://host/, http://host/ or, on other ports, the same with the port. No script
// sees a path, also not that of an http URL, so that the answer holds for every
// flow to the host and port and can be kept. myIpAddress is the gateway's address,
// not the client's.
//
// The build tag nopac leaves the JavaScript engine out: Open then returns
// ErrNotBuilt.
package pac

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// ErrNotBuilt is what Open and Evaluate return in a build with the tag nopac.
var ErrNotBuilt = errors.New("this build has no PAC: it was made with the build tag nopac; name the proxies with --upstream or take the full build")

const (
	// maxMemory bounds the writable memory of an evaluator in bytes. 42 MiB of it
	// is what the Go runtime maps for itself and hardly touches; a script with a table
	// of 50,000 names takes 14 MiB.
	maxMemory = 128 << 20

	// runLimit bounds an evaluation, the time in which names are looked up not
	// counted. Real scripts take microseconds to a few milliseconds; an event loop
	// never waits for it, a client does.
	runLimit = time.Second

	// startLimit bounds the start of an evaluator and the script's top level. A table
	// of 50,000 names takes 70 ms, on a busy or slow machine many times that; it is
	// once for each evaluator, and a script that takes it in vain is refused.
	startLimit = 5 * time.Second

	// killGrace is how much longer an evaluator may take that does not notice that
	// its time is up: it only looks between two operations of the script, and one
	// operation (a regular expression, a sort) can take for ever.
	killGrace = time.Second

	// lookupLimit bounds the time that one evaluation spends on looking names up,
	// all together: what glibc allows one server for one name.
	lookupLimit = 5 * time.Second
)

// Choice is one way for a flow: direct or through a proxy.
type Choice struct {
	Direct bool
	Proxy  string // http://host:port, https://…, socks5://… or socks4a://…; empty if Direct
}

// Config is what a script needs. All fields but Control and Logger must be set.
type Config struct {
	// Location is the script's: an http:// or https:// URL, or a file's name.
	Location string

	// Evaluator is the command line of a process that does nothing but call
	// Evaluate with its standard input and output: the program's own file and an
	// argument that it knows.
	Evaluator []string

	// Resolve looks up the addresses of a host, both families, for the scripts'
	// dnsResolve and for the server of Location.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)

	// Addresses are this machine's as others see it, the one to be known by first;
	// they are what myIpAddress says.
	Addresses func() []netip.Addr

	// Control, if set, is called with each socket before it connects to the server
	// of Location; it marks the socket so that it is not captured. See net.Dialer.
	Control func(network, address string, connection syscall.RawConn) error

	// Logger gets what alert says and what became of a refresh.
	Logger zerolog.Logger
}

// Script answers where flows leave. Its methods may be called from any goroutine.
type Script struct {
	config Config
	source *source
	pool   *pool
	alerts allowance
	wanted chan struct{} // a refresh is wanted; capacity 1
	ending chan struct{} // closed by Close

	running sync.WaitGroup // evaluations under way
	mutex   sync.Mutex
	current *version
	results map[target]*result
	waiting int // evaluations under way
	closed  bool
}

// version is one version of the script. It is never changed.
type version struct {
	name string // for messages: the location without a password
	text string
}

// Open loads the script and evaluates its top level, so that a script that cannot
// be had or that is none is an error at once, in one line with the place and the
// remedy. Who calls Open calls Close.
func Open(ctx context.Context, config Config) (*Script, error) {
	if !built {
		return nil, ErrNotBuilt
	}
	source, err := newSource(config)
	if err != nil {
		return nil, err
	}
	s := &Script{
		config:  config,
		source:  source,
		pool:    newPool(config.Evaluator),
		wanted:  make(chan struct{}, 1),
		ending:  make(chan struct{}),
		results: make(map[target]*result),
	}
	text, err := source.load(ctx)
	if err != nil {
		return nil, err
	}
	first := &version{name: source.name, text: text}
	if err := s.try(ctx, first); err != nil {
		return nil, err
	}
	s.current = first
	return s, nil
}

// try starts an evaluator with a version and leaves it in the pool.
func (s *Script) try(ctx context.Context, v *version) error {
	release, err := s.pool.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	s.pool.forgive()
	started, err := s.pool.start(ctx, v, s)
	if err != nil {
		return err
	}
	s.pool.put(started)
	return nil
}

// Close ends all evaluators and returns when they are gone. Find returns errors
// from then on. Serve must have returned before.
func (s *Script) Close() {
	s.mutex.Lock()
	if !s.closed {
		s.closed = true
		close(s.ending)
	}
	s.mutex.Unlock()
	s.pool.close()
	s.running.Wait()
}

// resolve answers an evaluator's question. A name without an answer has no
// addresses; why is the resolver's to log.
func (s *Script) resolve(ctx context.Context, host string) []netip.Addr {
	if !plainName(host) {
		return nil
	}
	found, err := s.config.Resolve(ctx, host)
	if err != nil {
		return nil
	}
	return found[:min(len(found), maxAddresses)]
}

// addresses answers an evaluator's question.
func (s *Script) addresses() []netip.Addr {
	own := s.config.Addresses()
	return own[:min(len(own), maxAddresses)]
}

// alert logs what the script says.
func (s *Script) alert(text string) {
	if s.alerts.take(time.Now()) {
		s.config.Logger.Info().Str("script", s.source.name).Msg("pac alert: " + text)
	}
}

// maxAddresses bounds the addresses that a script is told of a name; more make
// answers longer than a script can use.
const maxAddresses = 32

// maxAlertsPerMinute bounds what the log gets from scripts that call alert for
// every flow, as they are left by those who searched a fault in them.
const maxAlertsPerMinute = 10

// allowance counts what may still be logged in this minute.
type allowance struct {
	mutex  sync.Mutex
	minute time.Time
	used   int
}

func (a *allowance) take(now time.Time) bool {
	a.mutex.Lock()
	defer a.mutex.Unlock()
	if minute := now.Truncate(time.Minute); !minute.Equal(a.minute) {
		a.minute, a.used = minute, 0
	}
	a.used++
	return a.used <= maxAlertsPerMinute
}

// errClosed is what Find returns after Close.
var errClosed = errors.New("the PAC script is closed")
