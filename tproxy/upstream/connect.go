package upstream

import (
	"bytes"
	"errors"
	"fmt"
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
	authority  string
	credential *credential // nil: none is sent

	line     []byte // the beginning of a line whose end has not arrived
	received int    // bytes of all heads so far
	interim  int    // 1xx replies so far
	status   int    // 0: the next line is a status line
	refused  *RefusedError
}

// Hello returns the request (RFC 9112 section 3.2.3). It has the fields that a
// CONNECT needs and no other: what more it said would tell the proxy's operator,
// and the filters in between, what software this is.
func (c *connect) Hello() []byte {
	const version, authorization, end = " HTTP/1.1\r\nHost: ", "\r\nProxy-Authorization: ", "\r\n\r\n"
	size := len("CONNECT ") + 2*len(c.authority) + len(version) + len(end)
	if c.credential != nil {
		size += len(authorization) + len(c.credential.authorization)
	}
	request := make([]byte, 0, size)
	request = append(request, "CONNECT "...)
	request = append(request, c.authority...)
	request = append(request, version...)
	request = append(request, c.authority...)
	if c.credential != nil {
		request = append(request, authorization...)
		request = append(request, c.credential.authorization...)
	}
	return append(request, end...)
}

// Feed reads the reply. Any 2xx opens the tunnel, which starts right after the
// empty line whatever Content-Length or Transfer-Encoding say (RFC 9110 section
// 9.3.6). Any other final status is a *RefusedError.
func (c *connect) Feed(in []byte) (out, rest []byte, done bool, err error) {
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
			return nil, nil, false, errNotHTTP
		}
		if c.received > maxHead {
			return nil, nil, false, errHeadTooLong
		}
		if end == 0 {
			break
		}
		// A bare LF ends a line as well (RFC 9112 section 2.2).
		text := bytes.TrimSuffix(line[:len(line)-1], []byte{'\r'})
		done, err = c.read(text)
		if err != nil {
			return nil, nil, false, err
		}
		if done {
			c.line = nil
			return nil, in, true, nil
		}
		c.line = c.line[:0]
	}
	return nil, nil, false, nil
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
		c.refused = &RefusedError{Status: c.status, Reason: sanitize(reason), authenticated: c.credential != nil}
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
