package forward

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// tunnel carries a CONNECT of an explicit client whose tunnel is the gateway's to
// open.
func (x *exchange) tunnel(ctx context.Context) ending {
	var conn upstream.Conn
	var rest []byte
	for {
		var err error
		if x.way.absolute() {
			conn, rest, err = x.server.config.Dialer.Tunnel(ctx, x.way.Proxy, x.way.Target)
		} else {
			conn, rest, err = x.dial(ctx, x.way)
		}
		if err == nil {
			return x.established(ctx, conn, rest)
		}
		if !x.elsewhere(ctx, err) {
			return x.fail(err)
		}
	}
}

// established tells the client that its tunnel is open, and carries it.
func (x *exchange) established(ctx context.Context, conn upstream.Conn, rest []byte) ending {
	x.record.Tunnel = true
	x.record.Status, x.record.FirstByte = http.StatusOK, time.Since(x.start)
	if err := x.say([]byte("HTTP/1.1 200 Connection established\r\n\r\n")); err != nil {
		conn.SetLinger(0)
		conn.Close()
		x.end(err)
		return closed
	}
	return x.relay(ctx, conn, rest)
}

// relay carries a tunnel to its end.
func (x *exchange) relay(ctx context.Context, conn upstream.Conn, rest []byte) ending {
	x.unwatch()
	conn.SetLinger(0)
	flight := append([]byte(nil), x.client.buffered()...)
	x.client.skip(len(flight))
	x.client.release()
	var err error
	x.record.Sent, x.record.Received, err = x.server.config.Relay(ctx, x.client.conn, conn, flight, rest)
	x.end(err)
	return closed
}

// switchProtocols goes on after an answer to a request for another protocol, or for
// a tunnel that the client asked of the proxy itself. It is not done if that is an
// ordinary answer, to be passed on as such.
func (x *exchange) switchProtocols(ctx context.Context) (end ending, done bool) {
	status := x.response.status
	switch {
	case x.request.form == authority && status/100 == 2:
		x.record.Tunnel = true
	case status == http.StatusSwitchingProtocols && !x.finishUpload():
		err := malformed{errors.New("it switches protocols before it has the whole request")}
		x.drop(err)
		return x.fail(err), true
	case status == http.StatusSwitchingProtocols:
	case x.request.upgrade && (status >= 400 || x.request.websocket) && x.way.absolute() && x.repeatable:
		return x.upgradeByTunnel(ctx)
	default:
		return again, false
	}
	if _, err := x.client.conn.Write(x.appendResponse(nil, true)); err != nil {
		x.drop(err)
		return x.fail(clientError{err}), true
	}
	h := x.hop
	rest := append([]byte(nil), h.buffered()...)
	h.skip(len(rest))
	h.release()
	x.hop = nil
	x.Session.use(nil)
	return x.relay(ctx, h.conn, rest), true
}

// upgradeByTunnel asks again through a tunnel to the server: proxies answer for
// themselves, or have the server answer, to an upgrade that they do not pass on. If
// there is no tunnel to be had the first answer stands.
func (x *exchange) upgradeByTunnel(ctx context.Context) (end ending, done bool) {
	if x.who.Kind == Passing {
		return again, false // the credential is the client's: so is the CONNECT
	}
	conn, rest, err := x.server.config.Dialer.Tunnel(ctx, x.way.Proxy, x.way.Target)
	if err != nil {
		return again, false
	}
	conn.SetLinger(0)
	x.drop(nil)
	tunnel := &hop{stream: stream{conn: conn, buffers: &x.server.buffers}, sink: sink{conn: conn, buffers: &x.server.buffers}}
	if len(rest) > 0 {
		tunnel.preload(rest)
	}
	x.hop = tunnel
	x.Session.use(tunnel)
	x.record.Reused = false
	x.way = Way{Proxy: nil, Target: x.way.Target, Direct: x.who.Destination} // in origin form from here on
	x.response.status = 0
	x.hop.sink.set(x.appendRequest(x.hop.sink.gather()))
	if err = x.hop.sink.flush(); err == nil {
		err = x.receive()
	}
	if err != nil {
		x.drop(err)
		return x.fail(err), true
	}
	// A connection that is a tunnel serves no other request.
	x.response.close = true
	return x.deliver(ctx), true
}
