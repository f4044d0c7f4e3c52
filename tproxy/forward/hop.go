package forward

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// hop is a connection to the next hop: to a proxy, or to the server through a tunnel
// or directly.
type hop struct {
	stream
	sink   sink
	key    hopKey
	login  upstream.Requests // to a proxy that takes requests for everybody
	bound  bool              // its client has made itself known on it, or has begun to
	used   bool              // for an earlier request
	since  time.Time         // the end of that
	expiry *time.Timer       // of one that waits in the pool
}

// hopKey says which requests may share a connection.
type hopKey struct {
	proxy  *upstream.Proxy // that takes requests for everybody in absolute form
	target upstream.Target
	direct netip.AddrPort
}

func (w Way) key() hopKey {
	switch {
	case w.Proxy == nil && w.Direct.IsValid():
		return hopKey{direct: w.Direct}
	case w.Proxy == nil:
		return hopKey{target: w.Target}
	case w.Proxy.PlainHTTP():
		return hopKey{proxy: w.Proxy}
	}
	return hopKey{target: w.Target, proxy: w.Proxy}
}

// absolute reports whether requests go this way in absolute form.
func (w Way) absolute() bool { return w.Proxy != nil && w.Proxy.PlainHTTP() }

func (h *hop) close() { h.conn.Close() }

// staleAfter is how long a connection may have rested that a request is sent on which
// must not be sent twice: no server in use closes one that early, so that the request
// does not cross its FIN.
const staleAfter = 2 * time.Second

// forever is longer than any connection rests.
const forever = time.Hour

// connect returns a connection for a request. One that rested is taken for the request
// if that is reuse.
func (t *Session) connect(ctx context.Context, way Way, reuse, repeatable bool) (*hop, error) {
	key := way.key()
	patience := forever
	if !repeatable {
		patience = staleAfter
	}
	if kept := t.kept; kept != nil {
		t.kept = nil
		// Of one that is bound the client expects that it is the same still.
		young := kept.bound || time.Since(kept.since) <= patience
		if reuse && kept.key == key && young && kept.quiet() {
			return kept, nil
		}
		kept.close()
	}
	if reuse && t.shares(way) {
		if h := t.server.pool.get(way.Proxy, patience); h != nil {
			return h, nil
		}
	}
	conn, rest, err := t.dial(ctx, way)
	if err != nil {
		return nil, err
	}
	h := &hop{stream: stream{conn: conn, buffers: &t.server.buffers}, sink: sink{conn: conn, buffers: &t.server.buffers}, key: key}
	if len(rest) > 0 {
		h.preload(rest)
	}
	return h, nil
}

// shares reports whether connections of a way are there for all clients. Those on
// which clients authenticate themselves are not: NTLM holds for the connection.
func (t *Session) shares(way Way) bool { return way.absolute() && t.who.Kind != Passing }

// keep lets the next request have the connection.
func (t *Session) keep(h *hop, way Way) {
	h.used = true
	h.release()
	if t.shares(way) && !h.bound {
		t.server.pool.put(h)
		return
	}
	h.since = time.Now()
	t.kept = h
}

// dial opens a connection. rest is what it brought already.
func (t *Session) dial(ctx context.Context, way Way) (conn upstream.Conn, rest []byte, err error) {
	dialer := t.server.config.Dialer
	switch {
	case way.absolute():
		conn, err = dialer.Connect(ctx, way.Proxy)
	case way.Proxy != nil:
		proxy := way.Proxy
		if t.who.Kind == Passing {
			proxy = proxy.Anonymous()
		}
		conn, rest, err = dialer.Tunnel(ctx, proxy, way.Target)
	case way.Direct.IsValid():
		conn, err = dialer.Direct(ctx, way.Direct)
	default:
		conn, err = t.dialName(ctx, way.Target)
	}
	if err == nil {
		conn.SetLinger(0) // until an orderly end
	}
	return conn, rest, err
}

// dialName connects to the first address of a name that answers. Each is checked: a
// name that anybody can have must not lead to what is the gateway's own.
func (t *Session) dialName(ctx context.Context, target upstream.Target) (upstream.Conn, error) {
	addresses, err := t.server.config.Dialer.Lookup(ctx, target.Host)
	if err != nil {
		return nil, err
	}
	// All of them in the time that one has: of a name with many that are silent, none is worth
	// more.
	ctx, cancel := context.WithTimeout(ctx, t.server.config.Dialer.ConnectTimeout)
	defer cancel()
	err = fmt.Errorf("%s has no address", target.Host)
	for _, address := range addresses {
		if err = t.server.config.Check(address.Unmap()); err != nil {
			return nil, refusal{err}
		}
	}
	for _, address := range addresses {
		var conn *net.TCPConn
		conn, err = t.server.config.Dialer.Direct(ctx, netip.AddrPortFrom(address, target.Port))
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// refusal is the word of Route or Check that a request is not carried.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }
