package forward

import (
	"net/netip"
	"strconv"
)

// appendRequest appends the request's head as the next hop is to see it: the request
// line and Host of this gateway's own making (RFC 9112 section 3.2.2), the other
// fields as they came, less those that end here.
func (x *exchange) appendRequest(to []byte) []byte {
	r := &x.request
	to = append(to, r.method...)
	to = append(to, ' ')
	start := len(to)
	switch {
	case r.form == authority:
		to = x.appendAuthority(to)
	case x.way.absolute():
		to = append(to, "http://"...)
		to = x.appendAuthority(to)
		if r.form != asterisk { // RFC 9112 section 3.2.4: it is the path that is left out
			to = appendPath(to, r.path)
		}
	default:
		to = appendPath(to, r.path)
	}
	end := len(to)
	to = append(to, " HTTP/1.1\r\nHost: "...)
	if !x.way.absolute() && r.form == origin && len(r.authority) > 0 {
		to = append(to, r.authority...) // the server knows what it is called
	} else {
		to = x.appendAuthority(to)
	}
	to = append(to, "\r\n"...)
	to = appendEndToEnd(to, r.fields, func(f field) bool {
		return f.is("Host") || f.is("Max-Forwards") || f.is("Via") && x.server.config.Via ||
			f.is("X-Forwarded-For") && x.server.config.ForwardedFor
	})
	return append(x.appendOwn(to, to[start:end]), "\r\n"...)
}

// appendPath appends path and query; an empty path is "/" (RFC 9112 section 3.2.1).
func appendPath(to, path []byte) []byte {
	if len(path) == 0 || path[0] == '?' {
		to = append(to, '/')
	}
	return append(to, path...)
}

// appendAuthority appends the host that the request goes to, with the port unless that
// is 80. For a captured request without a name that is the original destination.
func (x *exchange) appendAuthority(to []byte) []byte {
	target := x.way.Target
	if address, err := netip.ParseAddr(target.Host); err == nil && address.Is6() {
		to = append(append(append(to, '['), target.Host...), ']')
	} else {
		to = append(to, target.Host...)
	}
	if target.Port != 80 || x.request.form == authority {
		to = append(to, ':')
		to = strconv.AppendUint(to, uint64(target.Port), 10)
	}
	return to
}

// appendOwn appends the fields that concern the next hop, or that this one adds; target is
// the request's as it is sent.
func (x *exchange) appendOwn(to, target []byte) []byte {
	r := &x.request
	switch {
	case r.upgrade:
		to = appendField(to, "Connection", "Upgrade")
		to = appendProtocols(to, r.fields)
	case acceptsTrailers(r.fields):
		to = appendField(to, "Connection", "TE")
		to = appendField(to, "TE", "trailers") // RFC 9110 section 10.1.4
	}
	if r.body.kind == chunked {
		to = appendField(to, "Transfer-Encoding", "chunked")
	}
	if x.who.Kind == Passing {
		for _, f := range r.fields {
			if f.is("Proxy-Authorization") && x.way.absolute() {
				to = f.append(to)
			}
		}
	} else if x.authenticates() {
		to = x.appendLogin(to, x.method, target)
	}
	if left := find(r.fields, "Max-Forwards"); left != nil {
		to = appendField(to, "Max-Forwards", x.maxForwards(string(left)))
	}
	if x.server.config.Via {
		to = appendList(to, "Via", r.fields, "1."+string('0'+r.minor)+" "+self)
	}
	if x.server.config.ForwardedFor {
		to = appendList(to, "X-Forwarded-For", r.fields, x.who.Address.Addr().Unmap().WithZone("").String())
	}
	return to
}

// appendProtocols appends the Upgrade field: what was judged, and nothing else.
func appendProtocols(to []byte, fields []field) []byte {
	to = append(to, "Upgrade: "...)
	first := true
	for _, f := range fields {
		if !f.is("Upgrade") {
			continue
		}
		eachProtocol(f.value, func(protocol []byte) {
			if !first {
				to = append(to, ", "...)
			}
			to, first = append(to, protocol...), false
		})
	}
	return append(to, "\r\n"...)
}

// maxForwards counts down for the methods that it has a meaning for (RFC 9110 section
// 7.6.2); answerLocally has seen to it that it is not 0.
func (x *exchange) maxForwards(left string) string {
	if number, err := strconv.Atoi(left); err == nil && number > 0 && (x.method == "TRACE" || x.method == "OPTIONS") {
		return strconv.Itoa(number - 1)
	}
	return left
}

// appendList appends a list field with one more element at its end.
func appendList(to []byte, name string, fields []field, last string) []byte {
	to = append(append(to, name...), ": "...)
	for _, f := range fields {
		if f.is(name) {
			to = append(append(to, f.value...), ", "...)
		}
	}
	return append(append(to, last...), "\r\n"...)
}

// acceptsTrailers reports whether the client said that it does.
func acceptsTrailers(fields []field) (accepts bool) {
	for _, f := range fields {
		if f.is("TE") {
			eachElement(f.value, func(element []byte) bool {
				accepts = accepts || len(element) == len("trailers") && equalFold(element, "trailers")
				return !accepts
			})
		}
	}
	return accepts
}

// appendResponse appends the head of the latest answer as the client is to see it.
// keep says whether the connection stays for another request.
func (x *exchange) appendResponse(to []byte, keep bool) []byte {
	r := &x.response
	to = append(to, "HTTP/1.1 "...)
	to = strconv.AppendInt(to, int64(r.status), 10)
	to = append(append(append(to, ' '), r.reason...), "\r\n"...)
	tunnel := x.request.form == authority && r.status/100 == 2
	to = appendEndToEnd(to, r.fields, func(f field) bool {
		return f.is("Via") && x.server.config.Via || tunnel && f.framesOrRoutes()
	})
	if x.who.Kind == Passing && x.way.absolute() {
		for _, f := range r.fields {
			if f.is("Proxy-Authenticate") || f.is("Proxy-Authentication-Info") {
				to = f.append(to)
			}
		}
	}
	if r.body.kind == chunked && x.request.minor > 0 {
		to = appendField(to, "Transfer-Encoding", "chunked")
	}
	if x.server.config.Via {
		to = appendList(to, "Via", r.fields, "1."+string('0'+r.minor)+" "+self)
	}
	upgrade := find(r.fields, "Upgrade")
	switch {
	case upgrade != nil && (r.status == 101 || r.status == 426):
		to = appendField(to, "Connection", "Upgrade")
		to = field{[]byte("Upgrade"), upgrade}.append(to)
	case r.interim() || tunnel:
	case !keep:
		to = appendField(to, "Connection", "close")
	case x.request.minor == 0:
		to = appendField(to, "Connection", "keep-alive")
	}
	return append(to, "\r\n"...)
}
