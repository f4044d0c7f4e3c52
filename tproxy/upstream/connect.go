package upstream

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

const (
	// maxHead bounds all that a proxy says before the tunnel starts, interim
	// replies included. Squid itself takes reply heads of 64 KiB, curl 300 KiB; the
	// reply to a CONNECT has less than 1 KiB, and thousands are read at once.
	maxHead = 16 << 10 // bytes

	// maxInterim bounds the 1xx replies before the final one. None is expected; the
	// figure is that of net/http.
	maxInterim = 5
)

// What makes a reply unusable.
var (
	errNotHTTP     = errors.New("the answer is not HTTP/1: is the address that of an HTTP proxy?")
	errStatusLine  = errors.New("the answer has a malformed status line: is the address that of an HTTP proxy?")
	errHeadTooLong = fmt.Errorf("the answer is longer than %d bytes", maxHead)
	errInterim     = fmt.Errorf("more than %d interim (1xx) answers", maxInterim)
)

// connect is the Handshake of HTTP CONNECT: a request and its reply, and once more where
// the reply is a 407 (Proxy Authentication Required) that can be answered.
//
// The reply is read a line at a time. Only the last, unfinished line is kept from
// one Feed to the next, so that a reply that arrives whole is not copied.
type connect struct {
	proxy     *Proxy
	authority string
	lease     *Lease        // nil: no credential is sent
	binding   []byte        // of the connection, if that is one of TLS
	login     auth.Exchange // under the lease

	line     []byte // the beginning of a line whose end has not arrived
	withheld bool   // the credential was refused meanwhile: it was not sent
	received int    // bytes of the heads since the latest request
	interim  int    // 1xx replies so far
	status   int    // 0: the next line is a status line
	refused  *RefusedError
	demand   *challenged // of a 407
	asked    bool        // the request was sent again
	out      []byte      // the request that is to be sent next
}

// challenged is what a 407 says.
type challenged struct {
	challenges []auth.Challenge
	framing    replyFraming
	again      bool // it is answered by another request, once its body is read
}

func newConnect(p *Proxy, t Target, lease *Lease) *connect {
	return &connect{proxy: p, authority: t.authority(), lease: lease}
}

// Hello returns the request (RFC 9112 section 3.2.3). It has the fields that a
// CONNECT needs and no other: what more it said would tell the proxy's operator,
// and the filters in between, what software this is.
func (c *connect) Hello() []byte {
	if c.lease.stale() {
		c.lease, c.withheld = nil, true
	}
	c.login = c.proxy.login(c.lease, c.binding)
	return c.request()
}

// request is the CONNECT with what authenticates it now.
func (c *connect) request() []byte {
	const version, authorization, end = " HTTP/1.1\r\nHost: ", "\r\nProxy-Authorization: ", "\r\n\r\n"
	proof := c.login.Authorization(http.MethodConnect, c.authority)
	size := len("CONNECT ") + 2*len(c.authority) + len(version) + len(end)
	if proof != "" {
		size += len(authorization) + len(proof)
	}
	request := make([]byte, 0, size)
	request = append(request, "CONNECT "...)
	request = append(request, c.authority...)
	request = append(request, version...)
	request = append(request, c.authority...)
	if proof != "" {
		request = append(request, authorization...)
		request = append(request, proof...)
	}
	return append(request, end...)
}

// Feed reads the reply. Any 2xx opens the tunnel, which starts right after the
// empty line whatever Content-Length or Transfer-Encoding say (RFC 9110 section
// 9.3.6). Any other final status is a *RefusedError, but for a 407 that can be answered
// here, or on another connection: that is ErrReconnect.
func (c *connect) Feed(in []byte) (out, rest []byte, done bool, err error) {
	c.out = nil
	rest, done, err = c.take(in)
	switch {
	case err != nil && c.withheld && c.status == http.StatusProxyAuthRequired:
		err = ErrCredentialRefused
	case c.refused != nil && c.refused.Denied:
		// That is enough, whether the rest of the answer comes or not: the next flow
		// must not send the same.
		c.lease.Settle(c.refused)
	case done:
		c.opened()
	case err != nil:
		c.lease.Settle(err)
	}
	return c.out, rest, done, err
}

// opened settles the lease after a tunnel was opened.
func (c *connect) opened() {
	c.login.Accepted()
	if c.lease != nil && !c.login.Proven() {
		// It did not look at the credential, which was not sent: whoever waits for
		// that may go.
		c.proxy.demand.doubt()
		c.lease.settle(notJudged)
		return
	}
	c.lease.Settle(nil)
}

// take reads the lines that are complete and keeps the beginning of the next one.
func (c *connect) take(in []byte) (rest []byte, done bool, err error) {
	for len(in) > 0 {
		if c.demand != nil && c.demand.again {
			if in, err = c.skip(in); err != nil {
				return nil, false, err
			}
			continue
		}
		end := bytes.IndexByte(in, '\n') + 1
		piece := in
		if end > 0 {
			piece = in[:end]
		}
		in = in[len(piece):]

		c.received += len(piece)
		line := piece
		if len(c.line) > 0 || end == 0 {
			c.line = append(c.line, piece...)
			line = c.line
		}
		if c.status == 0 && !plausible(line) {
			return nil, false, errNotHTTP
		}
		if c.received > maxHead {
			return nil, false, errHeadTooLong
		}
		if end == 0 {
			break
		}
		// A bare LF ends a line as well (RFC 9112 section 2.2).
		text := bytes.TrimSuffix(line[:len(line)-1], []byte{'\r'})
		done, err = c.read(text)
		if err != nil {
			return nil, false, err
		}
		if done {
			c.line = nil
			return in, true, nil
		}
		c.line = c.line[:0]
	}
	return nil, false, nil
}

// skip reads on in the body of a 407, and after its end asks again.
func (c *connect) skip(in []byte) (rest []byte, err error) {
	rest, done, err := c.demand.framing.skip(in)
	if err != nil {
		return nil, c.reconnect()
	}
	if done {
		c.again()
	}
	return rest, nil
}

// again asks once more on the same connection.
func (c *connect) again() {
	c.out = append(c.out, c.request()...)
	c.asked = true
	c.status, c.received, c.interim, c.refused, c.demand = 0, 0, 0, nil, nil
}

// plausible reports whether line, perhaps not whole, begins like a status line of
// HTTP/1.
func plausible(line []byte) bool {
	const protocol = "HTTP/1."
	n := min(len(line), len(protocol))
	return string(line[:n]) == protocol[:n]
}

// read takes one line, without its end.
func (c *connect) read(line []byte) (done bool, err error) {
	switch {
	case c.status == 0:
		return false, c.readStatus(line)
	case len(line) > 0:
		if c.demand != nil {
			c.demand.readField(line)
		}
		return false, nil
	case c.demand != nil:
		return false, c.answer()
	case c.refused != nil:
		c.refused.advice = adviceOnStatus(c.refused.Code)
		return false, c.refused
	case c.status >= 200:
		return true, nil
	}
	// An interim reply (RFC 9110 section 15.2); the next one follows it.
	c.status = 0
	if c.interim++; c.interim > maxInterim {
		return false, errInterim
	}
	return false, nil
}

// readStatus reads a status line: HTTP/1.x NNN, then a space and a reason, which
// some leave out (RFC 9112 section 4).
func (c *connect) readStatus(line []byte) error {
	version, after, found := bytes.Cut(line, []byte{' '})
	after = bytes.TrimLeft(after, " ")
	if !found || len(version) != len("HTTP/1.x") || !isDigit(version[len(version)-1]) {
		return errStatusLine
	}
	code, reason, _ := bytes.Cut(after, []byte{' '})
	if len(code) != 3 || !isDigit(code[0]) || !isDigit(code[1]) || !isDigit(code[2]) || code[0] == '0' {
		return errStatusLine
	}
	c.status = int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0')
	// 101 would change the protocol, which was not asked for: nothing follows it.
	if c.status >= 300 || c.status == 101 {
		c.refused = &RefusedError{Code: c.status, Reason: sanitize(reason)}
	}
	if c.status == http.StatusProxyAuthRequired {
		c.demand = &challenged{framing: replyFraming{minor: version[len(version)-1] - '0'}}
		// With Basic that is a refusal, whether the rest comes or not. Elsewhere the
		// rest may show that it is none: a stale nonce, NTLM's challenge.
		c.refused.Denied = c.login.Proven() && c.login.Method() == auth.Basic
	}
	return nil
}

// readField takes note of a header field of a 407.
func (d *challenged) readField(line []byte) {
	name, value, found := bytes.Cut(line, []byte{':'})
	switch {
	case !found:
	case bytes.EqualFold(name, []byte("Proxy-Authenticate")):
		d.challenges = auth.AppendChallenges(d.challenges, value)
	default:
		d.framing.readField(name, value)
	}
}

// answer goes on after the head of a 407.
func (c *connect) answer() error {
	if err := c.proxy.challenged(c.lease, &c.login, c.refused, c.demand.challenges); err != nil {
		return err
	}
	if c.demand.framing.begin() != nil {
		return c.reconnect()
	}
	c.demand.again = true
	if c.demand.framing.empty() {
		c.again()
	}
	return nil
}

// ended makes what a connection's end means of the error of a driver.
func (c *connect) ended(err error) error {
	switch {
	case !lost(err):
		return err
	case c.demand != nil && !c.demand.again && c.login.Proven():
		// It began to refuse. That is not to be tried again and again.
		c.refused.Denied = true
		c.refused.advice = "and did not say more: look at the user name and the password in " + accountUsage
		return c.refused
	case c.demand != nil && c.demand.again, c.asked && c.status == 0 && len(c.line) == 0:
		return c.reconnect()
	}
	return err
}

// reconnect is the end of a connection on which the proxy takes no other request.
func (c *connect) reconnect() error {
	if c.login.Pending() {
		return errCloses
	}
	return ErrReconnect
}

// errCloses is about a proxy that cannot do what it offers.
var errCloses = errors.New("the proxy closes the connection in the middle of NTLM, which authenticates a connection: have it keep connections open (keep-alive)")

// maxReason bounds the reason that is kept for logs; the longest that is
// registered, "Network Authentication Required", has 31.
const maxReason = 80 // bytes

// sanitize makes a reason fit for a log: printable ASCII, bounded.
func sanitize(reason []byte) string {
	reason = reason[:min(len(reason), maxReason)]
	return strings.TrimSpace(string(bytes.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, reason)))
}

// adviceOnStatus says what a refusal means and what to do about it.
func adviceOnStatus(code int) string {
	switch code {
	case 400, 405, 501:
		return "it does not take CONNECT requests like this one: is the address that of an HTTP proxy?"
	case 401, 403, 451:
		return "it forbids this destination or port: have it allowed there, or exempt it from the proxy (no_proxy)"
	case 404, 410, 502, 503, 504:
		return "it cannot reach the destination: if others work, look at the destination's name, port and state"
	case 429:
		return "it limits the number of requests: wait, or have the limit raised there"
	}
	if 300 <= code && code < 400 {
		return "it redirects, as log-in pages do: log in there, or look at the proxy's address"
	}
	return "no tunnel was opened: the proxy's own log tells more"
}
