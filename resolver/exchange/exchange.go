// Package exchange asks DNS servers: over UDP (RFC 1035 section 4.2.1), over TCP
// with kept, pipelined connections (RFC 7766), over TLS (RFC 7858) and over HTTPS
// (RFC 8484). Bytes go in and bytes come out: it reads no more of a message than
// what tells whether it answers the question that was asked (RFC 5452 section 9).
//
// A [Server] is one server asked in one of these ways. A [Group] is several that
// know the same names: it asks the first that is in health, asks the next when
// that takes longer than usual, and finds out by itself when one has come back.
//
// How bytes get to a server is the caller's: a [Dial] opens a socket or a tunnel.
//
// # What one bad answer can do
//
// Nothing to other questions. On a connection where a server stops in the middle
// of an answer, or where the length that it announces is not that of the message,
// all others are asked again on another connection. So are those on a connection
// where nothing has arrived for a while: it may be dead, or the server works off
// its questions one after the other and one of them takes long.
package exchange

import (
	"cmp"
	"context"
	"errors"
	"net"
	"time"
)

// Dial opens the connection to the one server: a socket, or a tunnel through a
// proxy. It returns soon after ctx is done. Whoever calls it closes the
// connection. It is called by several goroutines at once.
type Dial func(ctx context.Context) (net.Conn, error)

// Server asks one DNS server. It is safe for concurrent use.
type Server interface {
	// Exchange asks query, a whole message of at most 65,535 bytes with one
	// question, and returns the answer, at most 65,535 bytes. The answer was
	// matched by an id that this package chose and by the question, letter case
	// included, comes from the server that was asked, carries the id and the
	// question of query, and has no bytes after its last record. It may say
	// anything, SERVFAIL included.
	//
	// query is neither changed nor kept, the answer is the caller's. Errors name
	// the server. When ctx is done Exchange returns at once.
	Exchange(ctx context.Context, query []byte) (answer []byte, err error)
	// String returns the server's name, fit for logs.
	String() string
	// Close ends the server's connections, and every Exchange under way with
	// ErrClosed. It returns when all that the server started has ended.
	Close()
}

// Errors of Exchange that say nothing about the server.
var (
	ErrClosed = errors.New("closed")
	ErrBusy   = errors.New("too many questions wait for this server")
)

// Config bounds what one server may cost. The zero value of each field stands for
// its default.
type Config struct {
	// Timeout bounds one question, with connecting and asking again. Default 4 s:
	// clients commonly ask again after 5 s (resolv.conf(5)).
	Timeout time.Duration
	// ConnectTimeout bounds one dial with the TLS handshake. Default 4 s. While
	// questions wait, a dial that takes long does not keep others from being
	// started.
	ConnectTimeout time.Duration
	// IdleTimeout is how long a connection without a question is kept. Default
	// 30 s. Servers often close earlier (RFC 7766 section 6.2.3), which is no error.
	IdleTimeout time.Duration
	// MaxConnections bounds the kept connections; four times as many if the server
	// takes one question at a time on each (HTTP/1.1). Default 4. A second one is
	// opened only when the first is crowded or silent.
	MaxConnections int
	// MaxInFlight bounds the questions that wait for the server; more are refused
	// with ErrBusy. With UDP each of them has a socket. Default 1,024; at most
	// 32,768, so that ids are easily found.
	MaxInFlight int
}

// withDefaults fills in what is zero.
func (c Config) withDefaults() Config {
	c.Timeout = cmp.Or(c.Timeout, 4*time.Second)
	c.ConnectTimeout = cmp.Or(c.ConnectTimeout, 4*time.Second)
	c.IdleTimeout = cmp.Or(c.IdleTimeout, 30*time.Second)
	c.MaxConnections = cmp.Or(c.MaxConnections, 4)
	c.MaxInFlight = min(cmp.Or(c.MaxInFlight, 1024), 1<<15)
	return c
}
