package sniff

import (
	"bytes"
	"strings"
)

// HTTP finds the host of an HTTP/1 request (RFC 9112): that of a request target
// in absolute form, else that of the first Host field. The zero value is ready.
//
// A request for a tunnel (CONNECT) is Absent: it is meant for a proxy, and the
// host in it is not the one that the client connected to.
type HTTP struct {
	part  part
	start int // where the part, among the fields the line, starts in the flight
	at    int // the first byte that has not been gone through
}

// part is a part of a request's head. The first three are in the request line.
type part uint8

const (
	method part = iota
	target
	version
	fields
)

// versionPrefix is what all versions of HTTP/1 have in common.
const versionPrefix = "HTTP/1."

// Next looks at the flight: everything received so far, from the first byte of
// the connection on. It keeps no reference to it. The host, in the form that
// [ValidName] gives it and without its port, comes with [Found] only. It does as
// soon as its line has ended; for a Host field the byte after the line break shows
// that, because a line that begins with white space goes on with the one before.
func (s *HTTP) Next(flight []byte) (host string, verdict Verdict) {
	flight, short := bounded(flight)
	for s.part != fields {
		if s.at == len(flight) {
			return "", short
		}
		if !s.request(flight[s.at]) {
			return "", Absent
		}
		if s.part == fields {
			if host, verdict = requestLine(flight[:s.at]); verdict != More {
				return host, verdict
			}
		}
	}
	for {
		line, ok := s.line(flight)
		if !ok {
			return "", short
		}
		if host, verdict = field(line); verdict != More {
			return host, verdict
		}
	}
}

// request goes through one byte of the request line and reports whether the line
// can still be one of HTTP/1: a token, a target and a version with one space
// between them (RFC 9112, section 3).
func (s *HTTP) request(c byte) bool {
	length := s.at - s.start
	s.at++
	switch s.part {
	case method, target:
		if c == ' ' {
			s.part++
			s.start = s.at
			return length > 0
		}
		return tokenByte(c) || s.part == target && ' ' < c && c != 0x7f
	default:
		switch {
		case length < len(versionPrefix):
			return c == versionPrefix[length]
		case length == len(versionPrefix):
			return '0' <= c && c <= '9'
		case c == '\n':
			s.part, s.start = fields, s.at
			return true
		}
		return c == '\r' && length == len(versionPrefix)+1
	}
}

// RequestLine finds out whether a flight is of HTTP/1 at all, by its first line. The
// zero value is ready.
//
// A request for a tunnel (CONNECT) is Absent, as it is for [HTTP].
type RequestLine struct{ http HTTP }

// Next looks at the flight as that of HTTP does. It is Found when the flight begins
// with a whole request line; the name is always empty.
func (s *RequestLine) Next(flight []byte) (name string, verdict Verdict) {
	flight, short := bounded(flight)
	for s.http.part != fields {
		if s.http.at == len(flight) {
			return "", short
		}
		if !s.http.request(flight[s.http.at]) {
			return "", Absent
		}
	}
	if method, _, _ := bytes.Cut(flight, []byte{' '}); string(method) == "CONNECT" {
		return "", Absent
	}
	return "", Found
}

// requestLine is the verdict on a request line that is complete: More unless its
// target is in absolute form, which wins over the Host field, or of no form that an
// origin server is sent, such as that of CONNECT (RFC 9112, section 3.2).
func requestLine(line []byte) (host string, verdict Verdict) {
	_, rest, _ := bytes.Cut(line, []byte{' '})
	target, _, _ := bytes.Cut(rest, []byte{' '})
	switch scheme, after, absolute := bytes.Cut(target, []byte("://")); {
	case target[0] == '/' || string(target) == "*":
		return "", More
	case absolute && (bytes.EqualFold(scheme, []byte("http")) || bytes.EqualFold(scheme, []byte("https"))):
		if end := bytes.IndexAny(after, "/?"); end >= 0 {
			after = after[:end]
		}
		return authority(after)
	}
	return "", Absent
}

// line returns the next field line without its line break once it is known to have
// ended: LF alone is a line break too (RFC 9112, section 2.2), but none ends a line
// when white space follows (obsolete line folding, section 5.2). The empty line at
// the end of the head is waited for no further.
func (s *HTTP) line(flight []byte) (line []byte, ok bool) {
	for {
		newline := bytes.IndexByte(flight[s.at:], '\n')
		if newline < 0 {
			s.at = len(flight)
			return nil, false
		}
		s.at += newline
		line = bytes.TrimSuffix(flight[s.start:s.at], []byte{'\r'})
		if len(line) > 0 && s.at+1 == len(flight) {
			return nil, false
		}
		s.at++
		if len(line) == 0 || flight[s.at] != ' ' && flight[s.at] != '\t' {
			s.start = s.at
			return line, true
		}
	}
}

// field is the verdict on a field line: More unless it is the Host field, the empty
// line at the end of the head, or no field line. A value with a line break in it
// fails as a name.
func field(line []byte) (host string, verdict Verdict) {
	name, value, ok := bytes.Cut(line, []byte{':'})
	if !ok || len(name) == 0 {
		return "", Absent
	}
	for _, c := range name {
		if !tokenByte(c) { // white space before the colon included: RFC 9112, section 5.1
			return "", Absent
		}
	}
	if !bytes.EqualFold(name, []byte("Host")) {
		return "", More
	}
	return authority(bytes.Trim(value, " \t"))
}

// authority is the verdict on a host with an optional port, which may be empty
// (RFC 3986, section 3.2). User information is an error in HTTP (RFC 9110,
// section 4.2.4) and fails as a name.
func authority(text []byte) (host string, verdict Verdict) {
	name, port, _ := bytes.Cut(text, []byte{':'})
	for _, c := range port {
		if c < '0' || '9' < c {
			return "", Absent
		}
	}
	return named(name)
}

// tokenByte reports whether a byte may be part of a token, such as a method or the
// name of a field (RFC 9110, section 5.6.2).
func tokenByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}
