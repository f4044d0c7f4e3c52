package forward

import "bytes"

// hopByHop are the fields that end at the next hop whatever Connection says (RFC 9110
// section 7.6.1), and those that this gateway writes itself.
var hopByHop = []string{
	"Connection", "Proxy-Connection", "Keep-Alive", "TE", "Transfer-Encoding", "Upgrade", "HTTP2-Settings",
	"Proxy-Authorization", "Proxy-Authenticate", "Proxy-Authentication-Info",
}

// framing and routing fields: an intermediary needs them to understand the message,
// so that no Connection option takes them away, and no trailer section brings them.
var framesOrRoutes = []string{"Content-Length", "Transfer-Encoding", "Host"}

func (f field) isHopByHop() bool { return f.isOneOf(hopByHop) }

func (f field) framesOrRoutes() bool { return f.isOneOf(framesOrRoutes) }

func (f field) isOneOf(names []string) bool {
	for _, name := range names {
		if f.is(name) {
			return true
		}
	}
	return false
}

// append appends the field as a line.
func (f field) append(to []byte) []byte {
	to = append(to, f.name...)
	to = append(to, ": "...)
	to = append(to, f.value...)
	return append(to, "\r\n"...)
}

// appendField appends a line of its own making.
func appendField(to []byte, name, value string) []byte {
	to = append(to, name...)
	to = append(to, ": "...)
	to = append(to, value...)
	return append(to, "\r\n"...)
}

// appendEndToEnd appends the fields that are for the far end, in their order, but for
// those that skip names.
func appendEndToEnd(to []byte, fields []field, skip func(field) bool) []byte {
	connection := false
	for _, f := range fields {
		connection = connection || f.is("Connection")
	}
	for _, f := range fields {
		if f.isHopByHop() || skip(f) || connection && isOption(fields, f) {
			continue
		}
		to = f.append(to)
	}
	return to
}

// isOption reports whether a Connection field names f as one that ends here.
func isOption(fields []field, f field) (named bool) {
	if f.framesOrRoutes() {
		return false
	}
	for _, connection := range fields {
		if !connection.is("Connection") {
			continue
		}
		eachElement(connection.value, func(option []byte) bool {
			named = named || f.is(string(option))
			return !named
		})
	}
	return named
}

// ofConnection reports whether the first word of a credential or a challenge is a scheme
// that makes a client known for as long as its connection lasts (RFC 4559 section 6 for
// Negotiate; NTLM likewise). Another client must never be given that connection.
func (f field) ofConnection() bool {
	scheme, _, _ := bytes.Cut(f.value, []byte{' '})
	return len(scheme) == len("NTLM") && equalFold(scheme, "NTLM") ||
		len(scheme) == len("Negotiate") && equalFold(scheme, "Negotiate")
}

// find returns the value of the first field of a name, nil if there is none.
func find(fields []field, name string) []byte {
	for _, f := range fields {
		if f.is(name) {
			return f.value
		}
	}
	return nil
}
