package upstream

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
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

// connect is the Handshake of HTTP CONNECT: one request, one reply.
//
// The reply is read a line at a time. Only the last, unfinished line is kept from
// one Feed to the next, so that a reply that arrives whole is not copied.
type connect struct {
	authority string
	lease     *Lease // nil: no credential is sent

	line     []byte // the beginning of a line whose end has not arrived
	withheld bool   // the credential was refused meanwhile: it was not sent
	received int    // bytes of all heads so far
	interim  int    // 1xx replies so far
	status   int    // 0: the next line is a status line
	refused  *RefusedError
}

func newConnect(t Target, lease *Lease) *connect {
	return &connect{authority: t.authority(), lease: lease}
}

// Hello returns the request (RFC 9112 section 3.2.3). It has the fields that a
// CONNECT needs and no other: what more it said would tell the proxy's operator,
// and the filters in between, what software this is.
func (c *connect) Hello() []byte {
	if c.lease.stale() {
		c.lease, c.withheld = nil, true
	}
	const version, authorization, end = " HTTP/1.1\r\nHost: ", "\r\nProxy-Authorization: ", "\r\n\r\n"
	size := len("CONNECT ") + 2*len(c.authority) + len(version) + len(end)
	if c.lease != nil {
		size += len(authorization) + len(c.lease.credential.basic)
	}
	request := make([]byte, 0, size)
	request = append(request, "CONNECT "...)
	request = append(request, c.authority...)
	request = append(request, version...)
	request = append(request, c.authority...)
	if c.lease != nil {
		request = append(request, authorization...)
		request = append(request, c.lease.credential.basic...)
	}
	return append(request, end...)
}

// Feed reads the reply. Any 2xx opens the tunnel, which starts right after the
// empty line whatever Content-Length or Transfer-Encoding say (RFC 9110 section
// 9.3.6). Any other final status is a *RefusedError.
func (c *connect) Feed(in []byte) (out, rest []byte, done bool, err error) {
	rest, done, err = c.take(in)
	switch {
	case err != nil && c.withheld && c.status == http.StatusProxyAuthRequired:
		err = ErrCredentialRefused
	case c.refused != nil && c.refused.Denied:
		// That is enough, whether the rest of the answer comes or not: the next flow
		// must not send the same.
		c.lease.Settle(c.refused)
	case done || err != nil:
		c.lease.Settle(err)
	}
	return nil, rest, done, err
}

// take reads the lines that are complete and keeps the beginning of the next one.
func (c *connect) take(in []byte) (rest []byte, done bool, err error) {
	for len(in) > 0 {
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
		if c.refused != nil {
			c.refused.readField(line)
		}
		return false, nil
	case c.refused != nil:
		c.refused.advice = adviceOnStatus(c.refused, c.lease != nil)
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
		c.refused = &RefusedError{
			Code: c.status, Reason: sanitize(reason),
			Denied: c.status == http.StatusProxyAuthRequired && c.lease != nil,
		}
	}
	return nil
}

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

// basic is the value of the Proxy-Authorization field (RFC 7617 section 2). The
// user name and the password go out as the bytes that they are.
func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// adviceOnStatus says what a refusal means and what to do about it.
func adviceOnStatus(e *RefusedError, authenticated bool) string {
	switch e.Code {
	case 407:
		return adviceOnChallenge(e.Schemes, authenticated)
	case 400, 405, 501:
		return "it does not take CONNECT requests like this one: is the address that of an HTTP proxy?"
	case 401, 403, 451:
		return "it forbids this destination or port: have it allowed there, or exempt it from the proxy (no_proxy)"
	case 404, 410, 502, 503, 504:
		return "it cannot reach the destination: if others work, look at the destination's name, port and state"
	case 429:
		return "it limits the number of requests: wait, or have the limit raised there"
	}
	if 300 <= e.Code && e.Code < 400 {
		return "it redirects, as log-in pages do: log in there, or look at the proxy's address"
	}
	return "no tunnel was opened: the proxy's own log tells more"
}

func adviceOnChallenge(schemes []string, authenticated bool) string {
	offers := func(scheme string) bool { return strings.EqualFold(scheme, "Basic") }
	switch {
	case len(schemes) > 0 && !slices.ContainsFunc(schemes, offers):
		return fmt.Sprintf("it wants to authenticate by %s, and only Basic is supported: have Basic enabled there", strings.Join(schemes, ", "))
	case authenticated:
		return "it refuses the user name or the password: correct them in http://user:password@host:port (special characters percent-encoded)"
	}
	return "it wants a user name and a password: give them as http://user:password@host:port (special characters percent-encoded)"
}

// maxSchemes bounds the schemes that are kept; 13 are registered with IANA, of
// which a proxy offers up to four.
const maxSchemes = 8

// maxScheme bounds one of them in bytes; the longest that is registered,
// "SCRAM-SHA-256", has 13.
const maxScheme = 32

// readField takes note of a header field if it is a Proxy-Authenticate. It may
// come several times, and each may hold several challenges.
func (e *RefusedError) readField(line []byte) {
	name, value, found := bytes.Cut(line, []byte{':'})
	if found && bytes.EqualFold(name, []byte("Proxy-Authenticate")) {
		e.addChallenges(value)
	}
}

// addChallenges takes note of the schemes in the value of a Proxy-Authenticate field.
func (e *RefusedError) addChallenges(value []byte) {
	for len(value) > 0 {
		var element []byte
		element, value = cutElement(value)
		scheme := challengeScheme(element)
		known := func(other string) bool { return strings.EqualFold(other, scheme) }
		if scheme != "" && len(e.Schemes) < maxSchemes && !slices.ContainsFunc(e.Schemes, known) {
			e.Schemes = append(e.Schemes, scheme)
		}
	}
}

// cutElement splits a comma-separated list after its first element. A comma in a
// quoted string separates nothing (RFC 9110 sections 5.6.1 and 5.6.4).
func cutElement(list []byte) (element, rest []byte) {
	quoted := false
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '"':
			quoted = !quoted
		case quoted && list[i] == '\\':
			i++
		case !quoted && list[i] == ',':
			return list[:i], list[i+1:]
		}
	}
	return list, nil
}

// challengeScheme returns the scheme if a list element starts a challenge, or ""
// if it is a further parameter of the one before (RFC 9110 section 11.3: both
// lists use the comma; a parameter is a token that an equals sign follows).
func challengeScheme(element []byte) string {
	element = bytes.Trim(element, " \t")
	end := 0
	for end < len(element) && isToken(element[end]) {
		end++
	}
	after := bytes.TrimLeft(element[end:], " \t")
	parameter := len(after) > 0 && after[0] == '='
	glued := len(after) > 0 && len(after) == len(element)-end // to something that is no token
	if parameter || glued || end > maxScheme {
		return ""
	}
	return string(element[:end])
}

// isToken reports whether c may stand in a token (RFC 9110 section 5.6.2).
func isToken(c byte) bool {
	return isAlphanumeric(c) || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}
