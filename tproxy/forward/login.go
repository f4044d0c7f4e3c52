package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// How the gateway authenticates its clients' requests to a proxy. A request without a body
// is sent again when the proxy asks for it, whatever its method: a 407 says that nobody has
// acted on it. One with a body, which is streamed and then gone, is sent only when the proxy
// can do nothing but take or refuse what it carries. Until then empty ones go ahead of it:
// OPTIONS of the same host, which are safe (RFC 9110 section 9.2.1) and which the proxy
// answers with a 407 itself. Only of a proxy that does not ask after all does the origin get
// one. (Max-Forwards: 0 would keep it from that, but squid 5 answers 501 to it before it asks.)

// Why a request is not carried on.
var (
	errAsked      = errors.New("the proxy asks for authentication")
	errBodySent   = errors.New("the proxy asks for authentication when the body of the request is sent already")
	errLongDemand = fmt.Errorf("the page with which the proxy asks for authentication is longer than %d bytes", maxDiscard)
	errCloses     = errors.New("the proxy closes the connection in the middle of NTLM: have it keep connections open (keep-alive)")
)

// authenticates reports whether requests go to a proxy that is told who the gateway is.
func (x *exchange) authenticates() bool { return x.way.absolute() && x.who.Kind != Passing }

// isDemand reports whether the latest answer is about the gateway and not about the client.
func (x *exchange) isDemand() bool {
	return x.authenticates() && x.response.status == http.StatusProxyAuthRequired
}

// logIn takes the permission to send the credential, and for a request with a body has the
// proxy asked what it wants to have with it.
func (x *exchange) logIn(ctx context.Context) (err error) {
	proxy := x.way.Proxy
	var standing bool
	if x.lease, standing = proxy.Standing(); !standing {
		limited, cancel := context.WithTimeout(ctx, x.server.config.HandshakeTimeout)
		defer cancel()
		if x.lease, err = proxy.Acquire(limited); err != nil {
			return err
		}
	}
	x.hop.login.Begin(proxy, x.lease, x.hop.conn)
	if x.request.body == (framing{}) || x.reconnects > 0 && x.hop.login.ForRequest() {
		// A proxy that closes after each of its questions has no nonce for this request
		// alone: that of all is most likely good.
		return nil
	}
	return x.goAhead()
}

// maxAhead bounds the requests that go ahead: a bare one, the first message of NTLM, and
// one to spare.
const maxAhead = 3

// goAhead sends requests without a body until the next one can be sent with it.
func (x *exchange) goAhead() error {
	login := &x.hop.login
	for range maxAhead {
		if login.Decisive() {
			return nil
		}
		login.Alone()
		x.hop.sink.set(x.appendAhead(x.hop.sink.gather()))
		err := x.hop.sink.flush()
		if err == nil {
			err = x.readAhead()
		}
		if err != nil {
			return x.cut(err)
		}
		switch err = x.judge(); {
		case err == nil: // it lets it through, so that it asks for nothing more
			return x.discard()
		case !errors.Is(err, errAsked):
			return err
		}
		if err := x.discard(); err != nil {
			return err
		}
	}
	return nil
}

// appendAhead appends a request for the options of the host that the client's request is for.
func (x *exchange) appendAhead(to []byte) []byte {
	start := len(to) + len("OPTIONS ")
	to = append(to, "OPTIONS http://"...)
	to = x.appendAuthority(to)
	end := len(to)
	to = append(to, " HTTP/1.1\r\nHost: "...)
	to = x.appendAuthority(to)
	to = append(to, "\r\n"...)
	return append(x.appendLogin(to, http.MethodOptions, to[start:end]), "\r\n"...)
}

// appendLogin appends what authenticates a request, if anything does.
func (x *exchange) appendLogin(to []byte, method string, target []byte) []byte {
	if authorization := x.hop.login.Authorization(method, target); authorization != "" {
		to = appendField(to, "Proxy-Authorization", authorization)
	}
	return to
}

// readAhead reads the head of the final answer to a request that went ahead.
func (x *exchange) readAhead() error {
	for range maxInterim {
		head, err := x.hop.head()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		err = x.response.parse(head, http.MethodOptions)
		x.hop.skip(len(head))
		if err != nil {
			return malformed{err}
		}
		if !x.response.interim() {
			return nil
		}
	}
	return malformed{errManyInterim}
}

// converse reads the answer to the request, and sends that again as long as the proxy wants
// to have it with another authentication.
func (x *exchange) converse() error {
	err := x.receive()
	for errors.Is(err, errAsked) {
		if x.request.body != (framing{}) {
			return errBodySent
		}
		if err := x.discard(); err != nil {
			return err
		}
		x.response.status = 0
		x.hop.sink.set(x.appendRequest(x.hop.sink.gather()))
		if err = x.hop.sink.flush(); err == nil {
			err = x.receive()
		}
		if x.response.status == 0 {
			err = x.cut(err)
		}
	}
	return err
}

// cut makes what it is of the end of a connection on which the proxy had asked: some close
// it then and do not say so.
func (x *exchange) cut(err error) error {
	gone := errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
	if gone && x.aborted(nil) == nil {
		return x.reconnect()
	}
	return err
}

// reconnect is the end of a connection that is of no more use.
func (x *exchange) reconnect() error {
	if x.hop.login.Pending() {
		return errCloses
	}
	x.hop.login.Share()
	return upstream.ErrReconnect
}

// judge tells the credential's breaker of the answer. The error is errAsked if the request is
// to be sent again on this connection.
func (x *exchange) judge() error {
	if !x.authenticates() {
		return nil
	}
	var challenges [][]byte
	if x.response.status == http.StatusProxyAuthRequired {
		for _, f := range x.response.fields {
			if f.is("Proxy-Authenticate") {
				challenges = append(challenges, f.value)
			}
		}
	}
	again, err := x.hop.login.Judge(x.response.status, x.response.reason, challenges)
	if again {
		return errAsked
	}
	return err
}

// maxDiscard bounds the body of an answer that is thrown away so that its connection can be
// used again; squid's page about a 407 has 4 KiB.
const maxDiscard = 64 << 10 // bytes

// discard reads the body of an answer that nobody is to see. A connection that is of no use
// after that is upstream.ErrReconnect.
func (x *exchange) discard() error {
	body := x.response.body
	var err error
	switch {
	case !x.response.close && body.kind == sized && body.length <= maxDiscard:
		err = x.discardBytes(body.length)
	case !x.response.close && body.kind == chunked:
		err = x.discardChunks()
	default:
		return x.reconnect()
	}
	if err == nil && !x.hop.quiet() {
		return x.reconnect()
	}
	return err
}

func (x *exchange) discardBytes(n int64) (err error) {
	for n > 0 {
		ready := x.hop.buffered()
		if len(ready) == 0 {
			if ready, err = x.hop.more(&x.hop.sink); err != nil {
				return err
			}
		}
		read := min(n, int64(len(ready)))
		x.hop.skip(int(read))
		n -= read
	}
	return nil
}

func (x *exchange) discardChunks() error {
	for left := int64(maxDiscard); ; {
		line, err := x.hop.line(&x.hop.sink, maxChunkLine)
		if err != nil {
			return err
		}
		size, err := chunkSize(line)
		x.hop.skip(len(line) + len("\r\n"))
		switch {
		case err != nil:
			return err
		case size == 0:
			return transferTrailer(&x.hop.sink, &x.hop.stream, false)
		case size > left:
			return malformed{errLongDemand}
		}
		left -= size + int64(len(line))
		if err := x.discardBytes(size); err != nil {
			return err
		}
		if line, err = x.hop.line(&x.hop.sink, maxChunkLine); err != nil {
			return err
		}
		if len(line) > 0 {
			return sourceError{errChunk}
		}
		x.hop.skip(len("\r\n"))
	}
}
