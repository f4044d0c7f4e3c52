package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

const (
	// streamWindow bounds what waits here of a stream whose client does not read. With
	// 20 ms to the proxy and back it lets 50 MB a second through.
	streamWindow = 1 << 20 // bytes

	// multiplexIdle is how long a connection without streams is kept.
	multiplexIdle = time.Minute

	// A peer that is gone is found out by a ping when nothing has come for pingAfter.
	pingAfter, pingPatience = 30 * time.Second, 15 * time.Second
)

// multiplexer opens tunnels as streams of HTTP/2 connections to one proxy. A stream that is
// not read keeps nobody but itself: each has a window of its own, and that of the connection
// (1 GiB, of package http) is more than all windows of the streams that proxies allow.
type multiplexer struct {
	mutex       sync.Mutex
	connections []*multiplexed
	dialing     chan struct{} // closed when the connection under way is there, or is not
	never       bool          // the proxy chose HTTP/1.1, or has to be authenticated to by connection
	single      bool          // the latter: HTTP/2 is not offered
	closed      bool
}

// multiplexed is one of them.
type multiplexed struct {
	client *http.ClientConn
	conn   Conn
	idle   *time.Timer
}

// reserve returns a connection with a place for one more stream. If there is none and no
// other flow is opening one, both are nil and it is the caller's to do so, and to call
// settle afterwards.
func (m *multiplexer) reserve(ctx context.Context) (*multiplexed, error) {
	for {
		m.mutex.Lock()
		for _, c := range m.connections {
			if !m.single && c.client.Reserve() == nil {
				m.mutex.Unlock()
				return c, nil
			}
		}
		dialing := m.dialing
		if dialing == nil && !m.never {
			m.dialing = make(chan struct{})
		}
		never := m.never
		m.mutex.Unlock()
		if dialing == nil || never {
			return nil, nil
		}
		select {
		case <-dialing:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for a connection to the proxy: %w", context.Cause(ctx))
		}
	}
}

// settle lets those go on who wait for a connection. never says that the proxy does not
// speak HTTP/2.
func (m *multiplexer) settle(never bool) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.never = never
	if m.dialing != nil {
		close(m.dialing)
		m.dialing = nil
	}
}

// alone has tunnels go on connections of their own.
func (m *multiplexer) alone() {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	m.single = true
}

// offered are the protocols from which the proxy is to choose.
func (m *multiplexer) offered() []string {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.single {
		return []string{"http/1.1"}
	}
	return []string{"h2", "http/1.1"}
}

// add makes a connection, on which HTTP/2 was agreed, one of those for all.
func (m *multiplexer) add(ctx context.Context, conn *secure, address string) (*multiplexed, error) {
	// To package http it is one without TLS, because it would else have to be a *tls.Conn.
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	announced := &announced{Conn: conn, settings: make(chan struct{})}
	transport := &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return announced, nil },
		Protocols:              &protocols,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHead,
		HTTP2: &http.HTTP2Config{
			StrictMaxConcurrentRequests: true,
			MaxReceiveBufferPerStream:   streamWindow,
			SendPingTimeout:             pingAfter,
			PingTimeout:                 pingPatience,
			WriteByteTimeout:            pingAfter,
		},
	}
	client, err := transport.NewClientConn(ctx, "http", address)
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &multiplexed{client: client, conn: conn}
	err = announced.wait(ctx)
	if err == nil {
		err = client.Reserve()
	}
	if err != nil {
		client.Close()
		return nil, &ConnectError{err}
	}
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if m.closed {
		client.Close()
		return nil, net.ErrClosed
	}
	m.connections = append(m.connections, c)
	client.SetStateHook(func(*http.ClientConn) { m.look(c) })
	return c, nil
}

// announced is a connection that tells when the proxy's settings are known, above all how
// many streams it lets be: they are the first that it sends (RFC 9113 section 3.4), and once
// they are read the next read begins.
type announced struct {
	net.Conn
	reads    int
	settings chan struct{}
}

// Read is called by one goroutine.
func (a *announced) Read(p []byte) (int, error) {
	if a.reads++; a.reads == 2 {
		close(a.settings)
	}
	return a.Conn.Read(p)
}

func (a *announced) wait(ctx context.Context) error {
	select {
	case <-a.settings:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the proxy agreed to speak HTTP/2 and says nothing: %w", context.Cause(ctx))
	}
}

// look drops a connection that is of no use any more, and one that has no stream for long.
func (m *multiplexer) look(c *multiplexed) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	switch {
	case c.client.Err() != nil:
		m.drop(c)
	case c.client.InFlight() > 0:
	case c.idle == nil:
		c.idle = time.AfterFunc(multiplexIdle, func() { m.expire(c) })
	default:
		c.idle.Reset(multiplexIdle)
	}
}

// expire closes a connection that has no stream.
func (m *multiplexer) expire(c *multiplexed) {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	if c.client.InFlight() == 0 {
		m.drop(c)
		c.client.Close()
	}
}

// drop takes a connection out. Its streams go on. It is called under the mutex.
func (m *multiplexer) drop(c *multiplexed) {
	for i, other := range m.connections {
		if other == c {
			m.connections = append(m.connections[:i:i], m.connections[i+1:]...)
			break
		}
	}
	if c.idle != nil {
		c.idle.Stop()
	}
}

// clear has new streams go to new connections. Those that are open go on.
func (m *multiplexer) clear() {
	m.mutex.Lock()
	defer m.mutex.Unlock()
	for _, c := range append([]*multiplexed(nil), m.connections...) {
		m.drop(c)
		if c.client.InFlight() == 0 {
			c.client.Close()
		}
	}
	m.never, m.single = false, false // it may be another proxy there
}

// close ends all connections, and those that come later.
func (m *multiplexer) close() {
	m.mutex.Lock()
	m.closed = true
	all := m.connections
	m.connections = nil
	m.mutex.Unlock()
	for _, c := range all {
		if c.idle != nil {
			c.idle.Stop()
		}
		c.client.Close()
	}
}

// multiplexer returns that of a proxy.
func (d *Dialer) multiplexer(proxy *Proxy) *multiplexer {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	m := d.multiplexers[proxy]
	if m == nil {
		if d.multiplexers == nil {
			d.multiplexers = make(map[*Proxy]*multiplexer)
		}
		m = &multiplexer{closed: d.closed}
		d.multiplexers[proxy] = m
	}
	return m
}

// each calls do with every multiplexer.
func (d *Dialer) each(do func(*multiplexer)) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	for _, m := range d.multiplexers {
		do(m)
	}
}

// Close closes the connections that tunnels share, and with them the tunnels.
func (d *Dialer) Close() {
	d.mutex.Lock()
	d.closed = true
	d.mutex.Unlock()
	d.each((*multiplexer).close)
}

// tunnelTLS is Tunnel through a proxy that is talked to by TLS: as a stream where that
// speaks HTTP/2, else on a connection of its own.
func (d *Dialer) tunnelTLS(ctx context.Context, proxy *Proxy, target Target) (conn Conn, rest []byte, err error) {
	m := d.multiplexer(proxy)
	for try := 1; ; try++ {
		c, err := m.reserve(ctx)
		if err != nil {
			return nil, nil, err
		}
		if c == nil {
			var own Conn
			if c, own, err = d.newMultiplexed(ctx, m, proxy); err != nil {
				return nil, nil, err
			}
			if own != nil {
				rest, err = d.shakeOn(ctx, own, proxy, target)
				return own, rest, err
			}
		}
		conn, err := d.stream(ctx, m, c, proxy, target)
		if err == nil || try == streamTries || ctx.Err() != nil || !crowdedOut(err) {
			return conn, nil, err
		}
	}
}

// streamTries bounds the tries of a tunnel: on a connection that others had opened, which
// has just broken or is full, and on one of its own.
const streamTries = 3

// crowdedOut reports whether a stream was not opened, or was lost with its connection,
// before there was an answer (RFC 9113 sections 5.1.2 and 8.7).
func crowdedOut(err error) bool {
	if reset, ok := errors.AsType[http2.StreamError](err); ok { // which that of package http turns into
		return reset.Code == http2.ErrCodeRefusedStream || reset.Code == http2.ErrCodeProtocol
	}
	_, answered := errors.AsType[*RefusedError](err)
	return !answered && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, ErrCredentialRefused) && !errors.Is(err, ErrReconnect)
}

// newMultiplexed opens a connection: one for all, or if the proxy speaks no HTTP/2 one that is
// the caller's own.
func (d *Dialer) newMultiplexed(ctx context.Context, m *multiplexer, proxy *Proxy) (shared *multiplexed, own Conn, err error) {
	never := false
	defer func() { m.settle(never) }()
	conn, err := d.connect(ctx, proxy, m.offered()...)
	if err != nil {
		return nil, nil, err
	}
	encrypted := conn.(*secure)
	if encrypted.ConnectionState().NegotiatedProtocol != "h2" {
		never = true
		return nil, conn, nil
	}
	limited, cancel := context.WithTimeout(ctx, d.ConnectTimeout)
	defer cancel()
	shared, err = m.add(limited, encrypted, joinHostPort(proxy.host, proxy.port))
	return shared, nil, err
}

// stream asks for a tunnel on a connection for all, under a lease.
func (d *Dialer) stream(ctx context.Context, m *multiplexer, c *multiplexed, proxy *Proxy, target Target) (Conn, error) {
	limited, cancel := context.WithTimeout(ctx, d.HandshakeTimeout)
	defer cancel()
	lease, err := proxy.Acquire(limited)
	if err != nil {
		c.client.Release()
		return nil, err
	}
	s, err := c.ask(limited, m, proxy, target, lease)
	lease.Settle(err) // unless the answer has
	switch _, answered := errors.AsType[*RefusedError](err); {
	case err == nil || answered || errors.Is(err, ErrReconnect):
		proxy.Answered()
	case ctx.Err() == nil:
		proxy.Unanswered()
	}
	switch {
	case err == nil:
		return s, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case limited.Err() != nil:
		return nil, fmt.Errorf("no answer within %s: %w", d.HandshakeTimeout, os.ErrDeadlineExceeded)
	}
	return nil, err
}

// ask asks for a tunnel, and once more for each question of the proxy about who asks.
func (c *multiplexed) ask(ctx context.Context, m *multiplexer, proxy *Proxy, target Target, lease *Lease) (*stream, error) {
	authority := target.authority()
	var login Requests
	login.Begin(proxy, lease, c.conn)
	for {
		s, answer, err := openStream(ctx, c.client, c.conn, authority, login.Authorization(http.MethodConnect, []byte(authority)))
		if err != nil {
			return nil, err
		}
		if answer == nil {
			_, err := login.Judge(http.StatusOK, nil, nil)
			return s, err
		}
		again, err := login.Judge(answer.StatusCode, nil, fields(answer.Header["Proxy-Authenticate"]))
		switch {
		case err != nil:
			return nil, err
		case !again:
			return nil, &RefusedError{Code: answer.StatusCode, Reason: http.StatusText(answer.StatusCode), advice: adviceOnStatus(answer.StatusCode)}
		case login.Bound():
			// A connection of many streams is nobody's.
			m.alone()
			return nil, ErrReconnect
		case c.client.Reserve() != nil:
			return nil, ErrReconnect
		}
	}
}

// fields are the values of a header field.
func fields(values []string) (all [][]byte) {
	for _, value := range values {
		all = append(all, []byte(value))
	}
	return all
}
