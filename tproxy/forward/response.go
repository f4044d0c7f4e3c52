package forward

import (
	"bytes"
	"errors"
)

// response is the head of a response. Its slices are parts of a buffer, as those of
// request.
type response struct {
	status int
	reason []byte
	minor  byte
	fields []field
	body   framing
	close  bool // the sender will close the connection
	// authenticates says that the sender wants the client to make itself known for the
	// connection, or has begun to.
	authenticates bool
}

// Why a response cannot be passed on.
var (
	errStatusLine  = errors.New("the answer is not HTTP/1: is the next hop an HTTP server?")
	errManyInterim = errors.New("too many interim (1xx) answers")
)

// parse reads a head with its empty line into r, which keeps its memory; method is
// that of the request (RFC 9112 section 6.3).
func (r *response) parse(head []byte, method string) error {
	*r = response{fields: r.fields[:0]}
	line, rest, err := cutLine(head)
	if err == nil {
		if err := r.parseLine(line); err != nil {
			return err
		}
		r.fields, err = parseFields(rest, r.fields)
	}
	if err != nil {
		head = tolerate(head)
		if line, rest, err = cutLine(head); err != nil {
			return err
		}
		if err := r.parseLine(line); err != nil {
			return err
		}
		if r.fields, err = parseFields(rest, r.fields[:0]); err != nil {
			return err
		}
	}
	keep := false
	for _, f := range r.fields {
		switch {
		case f.is("Connection"), f.is("Proxy-Connection"):
			eachElement(f.value, func(option []byte) bool {
				r.close = r.close || len(option) == len("close") && equalFold(option, "close")
				keep = keep || len(option) == len("keep-alive") && equalFold(option, "keep-alive")
				return true
			})
		case f.is("WWW-Authenticate"), f.is("Proxy-Authenticate"):
			r.authenticates = r.authenticates || f.ofConnection()
		}
	}
	if r.minor == 0 && !keep {
		r.close = true
	}
	r.body, err = r.framing(method)
	if r.body.kind == untilClose {
		r.close = true
	}
	return err
}

// parseLine reads the status line; some leave the reason out, and the space before it.
func (r *response) parseLine(line []byte) error {
	version, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok || len(version) != len("HTTP/1.1") || string(version[:7]) != "HTTP/1." || version[7] < '0' || version[7] > '9' {
		return errStatusLine
	}
	if len(rest) < 3 || len(rest) > 3 && rest[3] != ' ' {
		return errStatusLine
	}
	r.status = 0
	for _, c := range rest[:3] {
		if c < '0' || c > '9' {
			return errStatusLine
		}
		r.status = 10*r.status + int(c-'0')
	}
	if r.status < 100 {
		return errStatusLine
	}
	for _, c := range rest[3:] {
		if c < ' ' && c != '\t' || c == 0x7f {
			return errStatusLine
		}
	}
	r.minor = min(version[7]-'0', 1)
	r.reason = trim(rest[3:])
	return nil
}

// interim reports whether another head follows for the same request.
func (r *response) interim() bool { return r.status < 200 && r.status != 101 }

// framing says how the body ends.
func (r *response) framing(method string) (framing, error) {
	tunnel := r.status == 101 || method == "CONNECT" && r.status/100 == 2
	if r.status < 200 || r.status == 204 || r.status == 304 || method == "HEAD" || tunnel {
		return framing{}, nil
	}
	return responseBody(r.fields)
}
