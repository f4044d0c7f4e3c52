package forward

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// exchange is one request and its answer.
type exchange struct {
	*Session
	request    request
	response   response
	method     string // outlives the buffer that the request is in
	start      time.Time
	way        Way
	hop        *hop
	lease      *upstream.Lease
	reconnects int     // because the proxy asked for authentication and closed
	body       *upload // nil: the request has no body, or that is sent
	asked      bool    // the request has begun to go out on hop
	// repeatable says that the request can be sent again: doing it twice does no harm, and
	// it has no body that would be gone.
	repeatable bool
	answered   bool // the head of the final answer is with the client
	record     Record
}

// ending is how an exchange leaves the client's connection.
type ending uint8

const (
	again     ending = iota // to the next request
	orderly                 // to be closed
	lingering               // to be closed, but the client may still be sending
	closed                  // to be reset, or closed already by a tunnel
)

// exchange carries one request, whose head was read, to its end.
func (t *Session) exchange(ctx context.Context, head []byte) ending {
	x, ok := t.server.exchanges.Get().(*exchange)
	if !ok {
		x = new(exchange)
	}
	x.Session, x.start = t, time.Now()
	t.watch()
	end := x.run(ctx, head)
	t.unwatch()
	*x = exchange{request: request{fields: x.request.fields}, response: response{fields: x.response.fields}}
	t.server.exchanges.Put(x)
	return end
}

// run answers the request and writes its record.
func (x *exchange) run(ctx context.Context, head []byte) ending {
	x.record.Client = x.who
	err := x.request.parse(head)
	x.client.skip(len(head))
	if err != nil {
		return x.refuse(problem{http.StatusBadRequest, "http_request_error", "the request is malformed, or could be read in two ways", "Nothing of it was sent on. Have the client corrected.", err})
	}
	x.method = string(x.request.method)
	if end, local := x.answerLocally(); local {
		return end
	}
	host, port := x.request.host()
	if !x.who.Kind.explicit() {
		port = x.who.Destination.Port()
	} else if port == 0 {
		port = 80
	}
	x.record.URL = x.url(host, port)
	x.way, err = x.route(host, port)
	if errors.Is(err, upstream.ErrAllDown) {
		return x.refuse(x.diagnose(err))
	}
	if err != nil {
		return x.refuse(problem{http.StatusForbidden, "destination_ip_prohibited", "this destination is not reached through the gateway", "If it should be, have the gateway's administrator look at its settings.", err})
	}
	x.note()
	if x.request.form == authority && !(x.way.absolute() && x.who.Kind == Passing) {
		return x.tunnel(ctx)
	}
	return x.forward(ctx)
}

// route asks where the request goes.
func (x *exchange) route(host string, port uint16) (Way, error) {
	if !x.who.Kind.explicit() {
		if address, err := netip.ParseAddr(host); err == nil && address != x.who.Destination.Addr().Unmap() {
			host = "" // the address that the client dialled says more
		}
	} else if host == "" {
		return Way{}, errors.New("the host is not a name that the DNS could know")
	}
	return x.server.config.Route(x.who, host, port)
}

// note puts the way into the record.
func (x *exchange) note() {
	x.record.Proxy, x.record.Direct = "", x.way.Proxy == nil
	if x.way.Proxy != nil {
		x.record.Proxy = x.way.Proxy.String()
	}
}

// elsewhere goes over to the next proxy if the error of a connect lets hope for more there.
func (x *exchange) elsewhere(ctx context.Context, err error) bool {
	if len(x.way.others) == 0 || ctx.Err() != nil || !upstream.Elsewhere(err) {
		return false
	}
	x.way.Via(x.way.others)
	x.note()
	return true
}

// forward sends the request to the next hop and passes the answer on.
func (x *exchange) forward(ctx context.Context) ending {
	reuse := true
	x.repeatable = x.request.idempotent() && x.request.body == framing{}
	for {
		err := x.send(ctx, reuse)
		if err == nil {
			err = x.converse()
		}
		if err == nil {
			return x.deliver(ctx)
		}
		// A connection that rested may have been closed by the other side when the
		// request was on its way. That is no failure if nobody can have acted on it.
		if !x.asked && x.elsewhere(ctx, err) {
			x.drop(err)
			continue
		}
		if errors.Is(err, upstream.ErrReconnect) && x.reconnects < upstream.MaxReconnects && x.aborted(nil) == nil {
			x.drop(err)
			reuse, x.reconnects = false, x.reconnects+1
			continue
		}
		stale := x.asked && x.hop.used && x.response.status == 0
		if broken := x.body.broken(); broken != nil {
			err = badBody{broken}
		}
		x.drop(err)
		if stale && x.repeatable && reuse && x.aborted(nil) == nil {
			reuse = false
			continue
		}
		return x.fail(err)
	}
}

// send connects to the next hop and sends the request, or begins to send its body.
func (x *exchange) send(ctx context.Context, reuse bool) (err error) {
	x.asked = false
	x.hop, err = x.connect(ctx, x.way, reuse, x.repeatable)
	if err != nil {
		return err
	}
	x.hop.bound = x.hop.bound || x.request.authenticates
	x.use(x.hop)
	x.record.Reused = x.hop.used
	if x.authenticates() {
		if err := x.logIn(ctx); err != nil {
			return err
		}
	}
	x.asked, x.response.status = true, 0
	x.hop.sink.set(x.appendRequest(x.hop.sink.gather()))
	body := x.request.body
	whole := body.kind == sized && int64(len(x.client.buffered())) >= body.length
	if !whole {
		x.body = startUpload(x, body)
		return nil
	}
	x.record.Sent, err = body.transfer(&x.hop.sink, &x.client, true)
	return err
}

// maxInterim bounds the 1xx answers to a request; net/http takes as many bytes of them
// as of a head.
const maxInterim = 16

// receive reads the head of the final answer and passes interim ones on.
func (x *exchange) receive() error {
	for range maxInterim {
		head, err := x.hop.head()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		err = x.response.parse(head, x.method)
		x.hop.skip(len(head))
		if err != nil {
			return malformed{err}
		}
		x.hop.bound = x.hop.bound || x.response.authenticates && !x.isDemand()
		switch {
		case x.response.status == http.StatusSwitchingProtocols && !x.request.upgrade:
			return malformed{errors.New("it switches to a protocol that was not asked for")}
		case !x.response.interim():
			return x.judge()
		case x.request.minor > 0: // RFC 9110 section 15.2: an HTTP/1.0 client knows of none
			if _, err := x.client.conn.Write(x.appendResponse(nil, true)); err != nil {
				return clientError{err}
			}
		}
	}
	return malformed{errManyInterim}
}

// malformed is about an answer that cannot be passed on.
type malformed struct{ error }

func (m malformed) Unwrap() error { return m.error }

// badBody is about a request's body that cannot be sent to its end.
type badBody struct{ error }

func (b badBody) Unwrap() error { return b.error }

// clientError is a failure of the client's connection.
type clientError struct{ error }

func (c clientError) Unwrap() error { return c.error }

// deliver passes the final answer on.
func (x *exchange) deliver(ctx context.Context) ending {
	x.record.Status, x.record.FirstByte = x.response.status, time.Since(x.start)
	if x.request.upgrade || x.request.form == authority {
		if end, done := x.switchProtocols(ctx); done {
			return end
		}
	}
	body := x.response.body
	// To an HTTP/1.0 client chunks mean nothing: it knows the end by the close.
	chunks := x.request.minor > 0
	definite := body.kind == sized || body.kind == chunked && chunks
	uploaded := x.body.done()
	keep := definite && uploaded && !x.request.close && !x.isDraining()
	to := sink{conn: x.client.conn, buffers: &x.server.buffers}
	to.set(x.appendResponse(to.gather(), keep))
	x.answered = true
	received, err := body.transfer(&to, &x.hop.stream, chunks)
	x.record.Received = received
	if err != nil {
		to.release()
		x.drop(err)
		return x.fail(err)
	}
	cut := x.awaitUpload()
	uploaded = x.finishUpload()
	x.Session.use(nil)
	// Aborted meanwhile, the connection has deadlines of the past.
	if uploaded && !x.response.close && x.aborted(nil) == nil {
		x.keep(x.hop, x.way)
		x.hop = nil
	} else {
		x.drop(nil)
	}
	x.end(cut)
	switch {
	case keep && uploaded:
		return again
	case x.request.body == framing{} && len(x.client.buffered()) == 0:
		return orderly
	}
	return lingering
}

// drop closes the connection to the next hop and waits for the end of the upload.
func (x *exchange) drop(err error) {
	if x.hop != nil {
		x.Session.use(nil)
		if err == nil && x.body.done() {
			x.hop.conn.SetLinger(-1)
		}
		x.hop.close()
		x.finishUpload() // until then the sink is in use
		x.hop.sink.release()
		x.hop.release()
		x.hop = nil
	}
	x.lease.Settle(err)
	x.lease = nil
}

// fail ends an exchange that went wrong: with a page, or with a reset if the client
// has seen a part of the answer, which must not look whole.
func (x *exchange) fail(err error) ending {
	err = x.aborted(err)
	slow := errors.Is(err, errIdle) // of the next hop: the client is told
	if x.answered || errors.As(err, new(clientError)) || x.aborted(nil) != nil && !slow {
		x.end(err)
		return closed
	}
	return x.refuse(x.diagnose(err))
}

// refuse answers the request with a page of the gateway's own.
func (x *exchange) refuse(p problem) ending {
	x.record.Status = p.status
	x.limit(time.Now().Add(lingerTime))
	x.client.conn.SetWriteDeadline(time.Now().Add(lingerTime))
	page := p.page(x.method)
	x.client.conn.Write(page)
	if x.record.FirstByte == 0 {
		x.record.FirstByte = time.Since(x.start)
	}
	if p.err == nil {
		p.err = errors.New(p.what)
	}
	x.end(p.err)
	return lingering
}

// end writes the record.
func (x *exchange) end(err error) {
	x.record.Method = x.method
	x.record.Duration, x.record.Err = time.Since(x.start), err
	x.server.config.Record(x.record)
}

// diagnose says what a failure of the next hop means (RFC 9209 section 2.3).
func (x *exchange) diagnose(err error) problem {
	next := "the server"
	if x.way.Proxy != nil {
		next = "the proxy " + x.way.Proxy.String()
	}
	const retry = "Try again in a moment."
	const tell = "If it stays like this, tell the gateway's administrator."
	var lookup *net.DNSError
	refused, isRefused := errors.AsType[*upstream.RefusedError](err)
	switch {
	case errors.Is(err, errBodySent):
		return problem{503, "proxy_configuration_error", next + " asked the gateway to authenticate anew", retry, err}
	case errors.Is(err, upstream.ErrCredentialRefused), isRefused && refused.Code == http.StatusProxyAuthRequired, upstream.Denied(err):
		return problem{502, "proxy_configuration_error", next + " does not accept the gateway", "The gateway's administrator has to correct its user name and password.", err}
	case isRefused:
		status := http.StatusBadGateway
		if refused.Code >= 400 && refused.Code < 600 && x.way.absolute() {
			status = refused.Code
		}
		return problem{status, "http_request_denied", next + " refuses the destination", tell, err}
	case errors.Is(err, upstream.ErrAllDown):
		return problem{503, "proxy_internal_error", "no proxy is there", retry + " " + tell, err}
	case errors.As(err, new(refusal)):
		return problem{403, "destination_ip_prohibited", "this destination is not reached through the gateway", tell, err}
	case errors.As(err, new(malformed)):
		return problem{502, "http_protocol_error", "the answer of " + next + " is malformed", tell, err}
	case errors.Is(err, errHeadTooLong):
		return problem{502, "http_response_header_section_size", "the answer of " + next + " cannot be read", tell, err}
	case errors.As(err, new(badBody)):
		return problem{400, "http_request_error", "the body of the request is malformed or incomplete", "Have the client corrected.", err}
	case errors.As(err, &lookup):
		return problem{502, "dns_error", "the name of " + next + " cannot be resolved", retry, err}
	case errors.Is(err, unix.ECONNREFUSED):
		return problem{502, "connection_refused", next + " refuses connections", retry + " " + tell, err}
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return problem{502, "destination_ip_unroutable", "there is no way to " + next, tell, err}
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, errIdle), errors.Is(err, unix.ETIMEDOUT):
		return problem{504, "connection_timeout", next + " does not answer", retry + " " + tell, err}
	}
	return problem{502, "connection_terminated", next + " has closed the connection without an answer", retry, err}
}

// maxPath bounds the path in records: nobody reads more, and a log is to be no burden.
const maxPath = 2 << 10 // bytes

// url is what records call the resource.
func (x *exchange) url(host string, port uint16) string {
	if host == "" {
		host = x.who.Destination.Addr().Unmap().String()
	}
	place := host
	if port != 80 || x.request.form == authority {
		place = net.JoinHostPort(host, strconv.Itoa(int(port)))
	} else if address, err := netip.ParseAddr(host); err == nil && address.Is6() {
		place = "[" + host + "]"
	}
	if x.request.form == authority {
		return place
	}
	return "http://" + place + x.path()
}

// path is that of the resource, as records have it.
func (x *exchange) path() string {
	path := x.request.path
	if !x.server.config.Query {
		path, _, _ = bytes.Cut(path, []byte{'?'})
	}
	return string(path[:min(len(path), maxPath)])
}
