package forward

import (
	"bytes"
	"errors"
	"net/netip"
	"strconv"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/sniff"
)

// request is the head of a request. Its slices are parts of the buffer that was
// parsed: they are valid until more is read into that.
type request struct {
	method []byte
	target []byte // as received
	minor  byte   // of the version: HTTP/1.minor, 0 or 1

	// Of the target's four forms (RFC 9112 section 3.2).
	form      form
	authority []byte // absolute and authority form: the target's; else that of Host; may be empty
	path      []byte // absolute and origin form: path and query, "/" if there is none; "*" in asterisk form

	fields  []field
	body    framing
	upgrade bool // asks for another protocol on this connection, one that is passed on
	// websocket says that the other protocol is WebSocket: no answer but 101 is of use then
	// (RFC 6455 section 4.1).
	websocket bool
	close     bool // the client will send no other request
	// authenticates says that the client makes itself known by a scheme that holds for the
	// connection and not for a request.
	authenticates bool
}

// form is one of the four forms of a request target.
type form uint8

const (
	origin    form = iota // /path?query
	absolute              // http://host/path?query
	authority             // host:port, of CONNECT
	asterisk              // *, of OPTIONS
)

// Why a request is refused. Each could be read in two ways, or in none.
var (
	errRequestLine = errors.New("the first line is not `method target HTTP/1.x` (RFC 9112 section 3)")
	errVersion     = errors.New("this is not HTTP/1")
	errTarget      = errors.New("the request target has none of the forms of RFC 9112 section 3.2")
	errScheme      = errors.New("only http:// is taken in absolute form: for https use CONNECT")
	errNoHost      = errors.New("an HTTP/1.1 request has exactly one Host (RFC 9112 section 3.2)")
	errTunnelBody  = errors.New("a CONNECT has no body (RFC 9110 section 9.3.6)")
	errHost        = errors.New("the Host is not a host (RFC 3986 section 3.2.2)")
)

// parse reads a head with its empty line into r, which keeps its memory.
func (r *request) parse(head []byte) error {
	*r = request{fields: r.fields[:0]}
	line, rest, err := cutLine(head)
	if err != nil {
		return err
	}
	if err := r.parseLine(line); err != nil {
		return err
	}
	if r.fields, err = parseFields(rest, r.fields); err != nil {
		return err
	}
	if err := r.parseHost(); err != nil {
		return err
	}
	if r.body, err = requestBody(r.fields, r.minor); err != nil {
		return err
	}
	if r.form == authority && r.body != (framing{}) {
		return errTunnelBody
	}
	r.parseConnection()
	return nil
}

// maxMethod bounds a method; the longest that is registered, UPDATEREDIRECTREF, has 17.
const maxMethod = 64 // bytes

// parseLine reads the request line.
func (r *request) parseLine(line []byte) error {
	method, rest, ok := bytes.Cut(line, []byte{' '})
	target, version, ok2 := bytes.Cut(rest, []byte{' '})
	if !ok || !ok2 || !isToken(method) || len(method) > maxMethod || len(target) == 0 {
		return errRequestLine
	}
	if len(version) != len("HTTP/1.1") || string(version[:7]) != "HTTP/1." || version[7] < '0' || version[7] > '9' {
		if bytes.HasPrefix(version, []byte("HTTP/")) {
			return errVersion
		}
		return errRequestLine
	}
	for _, c := range target {
		if c <= ' ' || c == 0x7f || c == '#' {
			return errRequestLine
		}
	}
	r.method, r.target, r.minor = method, target, min(version[7]-'0', 1)
	return r.parseTarget()
}

// parseTarget reads the request target.
func (r *request) parseTarget() error {
	const scheme = "http://"
	switch {
	case string(r.method) == "CONNECT":
		r.form, r.authority = authority, r.target
	case r.target[0] == '/':
		r.form, r.path = origin, r.target
	case string(r.target) == "*" && string(r.method) == "OPTIONS":
		r.form, r.path = asterisk, r.target
	case len(r.target) > len(scheme) && equalFold(r.target[:len(scheme)], scheme):
		r.form = absolute
		after := r.target[len(scheme):]
		r.authority, r.path = after, nil
		if end := bytes.IndexAny(after, "/?"); end >= 0 {
			r.authority, r.path = after[:end], after[end:]
		}
		if len(r.authority) == 0 {
			return errHost
		}
	case bytes.Contains(r.target, []byte("://")):
		return errScheme
	default:
		return errTarget
	}
	return nil
}

// parseHost finds the authority. A target in absolute form wins over Host (RFC 9112
// section 3.2.2), which has to be valid all the same.
func (r *request) parseHost() error {
	var host []byte
	hosts := 0
	for _, f := range r.fields {
		if f.is("Host") {
			host = f.value
			hosts++
		}
	}
	if hosts > 1 || hosts == 0 && r.minor > 0 {
		return errNoHost
	}
	if _, _, ok := splitAuthority(host); !ok && len(host) > 0 {
		return errHost
	}
	if r.form == absolute || r.form == authority {
		if _, port, ok := splitAuthority(r.authority); !ok || r.form == authority && port == 0 {
			return errHost
		}
		return nil
	}
	r.authority = host
	return nil
}

// parseConnection reads what concerns the connection and not the resource.
func (r *request) parseConnection() {
	keep, asked, protocols := false, false, false
	for _, f := range r.fields {
		switch {
		case f.is("Connection"), f.is("Proxy-Connection"):
			eachElement(f.value, func(option []byte) bool {
				switch {
				case len(option) == len("close") && equalFold(option, "close"):
					r.close = true
				case len(option) == len("keep-alive") && equalFold(option, "keep-alive"):
					keep = true
				case len(option) == len("upgrade") && equalFold(option, "upgrade"):
					asked = true
				}
				return true
			})
		case f.is("Upgrade"):
			eachProtocol(f.value, func(protocol []byte) {
				protocols = true
				r.websocket = r.websocket || len(protocol) == len("websocket") && equalFold(protocol, "websocket")
			})
		case f.is("Authorization"), f.is("Proxy-Authorization"):
			r.authenticates = r.authenticates || f.ofConnection()
		}
	}
	if r.minor == 0 && !keep {
		r.close = true
	}
	r.upgrade = r.minor > 0 && asked && protocols
}

// eachProtocol calls visit for each protocol of an Upgrade field (RFC 9110 section 7.8) that
// is passed on. h2c is not: none but the two ends of a connection could speak it, and RFC
// 9113 section 3.1 has given it up, so that a request for it alone is one of HTTP/1.
func eachProtocol(value []byte, visit func(protocol []byte)) {
	eachElement(value, func(protocol []byte) bool {
		if len(protocol) > 0 && (len(protocol) < len("h2c") || !equalFold(protocol[:len("h2c")], "h2c")) {
			visit(protocol)
		}
		return true
	})
}

// host returns the name or the address that the request is for, and the port, 0 if it
// does not say. The name is in lower case; it is empty if there is none, or none that
// the DNS could know: then only the original destination says where to go.
func (r *request) host() (name string, port uint16) {
	host, port, ok := splitAuthority(r.authority)
	if !ok {
		return "", 0
	}
	if address, err := netip.ParseAddr(string(host)); err == nil {
		return address.Unmap().String(), port
	}
	name, _ = sniff.ValidName(string(host))
	return name, port
}

// splitAuthority splits a host with an optional port (RFC 3986 section 3.2, without
// user information: RFC 9110 section 4.2.4). An address is returned without
// brackets; port is 0 if there is none.
func splitAuthority(text []byte) (host []byte, port uint16, ok bool) {
	digits := []byte(nil)
	if len(text) > 0 && text[0] == '[' {
		end := bytes.IndexByte(text, ']')
		if end < 0 {
			return nil, 0, false
		}
		address, err := netip.ParseAddr(string(text[1:end]))
		if err != nil || !address.Is6() || address.Zone() != "" {
			return nil, 0, false
		}
		host, digits = text[1:end], text[end+1:]
		if len(digits) > 0 && digits[0] != ':' {
			return nil, 0, false
		}
	} else {
		host = text
		if colon := bytes.IndexByte(text, ':'); colon >= 0 {
			host, digits = text[:colon], text[colon:]
		}
		for _, c := range host {
			if !hostBytes[c] {
				return nil, 0, false
			}
		}
	}
	if len(digits) > 1 {
		number, err := strconv.ParseUint(string(digits[1:]), 10, 16)
		if err != nil || number == 0 || digits[1] == '+' {
			return nil, 0, false
		}
		port = uint16(number)
	}
	return host, port, len(host) > 0
}

// hostBytes are the bytes of a registered name (RFC 3986 section 3.2.2) less the
// sub-delimiters, which are in no name that is in use and have a meaning to parsers
// of URLs.
var hostBytes = func() (set [256]bool) {
	for _, c := range []byte("-._~%0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		set[c] = true
	}
	return set
}()

// idempotent reports whether a request may be sent again without harm when it is not
// known what became of it (RFC 9110 section 9.2.2).
func (r *request) idempotent() bool {
	switch string(r.method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}
