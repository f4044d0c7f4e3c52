// Package forward carries HTTP/1 requests one by one: those of captured clients,
// who believe that they talk to the origin server, and those of clients that are
// told to use this gateway as their proxy. Each request goes its own way, by its own
// host: to an HTTP proxy in absolute form (RFC 9112 section 3.2.2), or in origin form
// through a SOCKS5 tunnel or directly.
//
// A [Session] is one client's connection, on a goroutine of its own. While it waits for
// the next request it holds no buffer and no connection to a proxy. Bodies are
// streamed: what has a known length and is long is spliced.
//
// What it reads is hostile on both sides. A request that two readers could take for
// different ones is refused (RFC 9112 section 11.2): nothing of it is sent on. Heads
// are rewritten field by field, and chunks chunk by chunk, so that nothing leaves
// that was not understood here.
package forward

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Kind is what a session's client takes the gateway for.
type Kind uint8

const (
	// Captured clients know of no proxy. They get the configured credential, and
	// never see that one is asked for.
	Captured Kind = iota
	// Passing is a proxy that passes the client's own credential on.
	Passing
	// Authenticating is a proxy that adds the configured credential.
	Authenticating
)

// explicit reports whether the client knows that it talks to a proxy.
func (k Kind) explicit() bool { return k != Captured }

// Client is whom a session serves.
type Client struct {
	Kind    Kind
	Address netip.AddrPort
	// Destination is the original destination of a captured client; of an explicit
	// one it is the address at which it reached the gateway.
	Destination netip.AddrPort
}

// Way is how one request leaves.
type Way struct {
	Proxy  *upstream.Proxy // nil: directly
	Target upstream.Target // what the proxy is asked for
	// Direct is where the request goes without a proxy: of a captured client the address
	// that it chose. If that is not valid Target is looked up.
	Direct netip.AddrPort

	others []*upstream.Proxy // to be tried when Proxy cannot be connected to
}

// Via sets the proxies, of which there is at least one, in the order in which to try them.
// direct:// stands for the way without one.
func (w *Way) Via(proxies []*upstream.Proxy) {
	w.Proxy, w.others = proxies[0], proxies[1:]
	if w.Proxy.Direct() {
		w.Proxy = nil
	}
}

// Config is what the sessions of a server share. All durations must be positive.
type Config struct {
	// Dialer opens the connections to the next hop.
	Dialer *upstream.Dialer
	// Route decides about a request for a host, in lower case, or for the original
	// destination if the host is empty. port is that of the request. Its error
	// refuses the request, and is told to the client.
	Route func(client Client, host string, port uint16) (Way, error)
	// Check decides about an address that the name of a direct request was found to
	// have, as Route does about those that are given as such.
	Check func(netip.Addr) error
	// Relay carries a tunnel to its end and closes both connections. flight was read
	// of the client already, rest of the next hop.
	Relay func(ctx context.Context, client, next upstream.Conn, flight, rest []byte) (sent, received int64, err error)
	// Record receives every request at its end, from many goroutines. It must not
	// wait for anything slow.
	Record func(Record)

	IdleTimeout      time.Duration // an exchange in which nothing moves
	HandshakeTimeout time.Duration // waiting until another flow has tried the credential

	Via          bool // say so in a Via field (RFC 9110 section 7.6.3)
	ForwardedFor bool // tell the client's address in X-Forwarded-For
	Query        bool // keep the query in the URL of records
}

// Record is what is known of one request at its end.
type Record struct {
	Client
	Tunnel    bool          // a CONNECT that was let through; URL is then the authority
	Method    string        // empty if the request could not be read
	URL       string        // in absolute form, without a user and, unless asked for, a query
	Status    int           // of the answer that the client got; 0 for none
	Proxy     string        // its URL without credentials; empty for the direct way or none
	Direct    bool          // it went out directly
	Sent      int64         // bytes of the body, or of the tunnel, from the client
	Received  int64         // the same to the client
	FirstByte time.Duration // from the request's head to the answer's; 0 if there was none
	Duration  time.Duration // from the request's head to the end of the answer
	Reused    bool          // it went out on a connection that others had used before
	Err       error         // why it failed; nil if the answer was passed on whole
}

// Server holds what sessions share. Close closes the idle connections that it keeps.
type Server struct {
	config Config
	pool   pool

	// Memory that sessions have only while they are at work.
	buffers   sync.Pool // of *[]byte, each of bufferSize
	exchanges sync.Pool // of *exchange
}

// NewServer returns a server. It starts nothing.
func NewServer(config Config) *Server {
	return &Server{config: config}
}

// Close closes the connections that wait for a next request. Sessions may still run.
func (s *Server) Close() { s.pool.close() }

// NetworkChanged tells that connections which wait for a next request may lead nowhere any
// more. It is safe for concurrent use.
func (s *Server) NetworkChanged() { s.pool.clear() }

// Open returns the session of a client, which owns conn from now on; one of Serve and
// Refuse has to be called. flight is what was already read of conn.
func (s *Server) Open(conn *net.TCPConn, client Client, flight []byte) *Session {
	t := &Session{server: s, who: client, client: stream{conn: conn, buffers: &s.buffers}}
	t.client.preload(flight)
	return t
}
