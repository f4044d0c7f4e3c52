// Package sniff finds the name that a client gives its server in the first bytes
// that it sends: the server name of a TLS ClientHello and the host of an HTTP/1
// request.
//
// [TLS] and [HTTP], and [RequestLine], which is content to know that it is HTTP/1, do
// no I/O. They are shown the flight, which is everything
// received so far, each time it has grown, and say whether they want [More],
// have [Found] a name or know that there is none to be had ([Absent]). The
// verdict depends on the bytes alone and not on how they arrived. The cost of all
// calls together is in proportion to the bytes, so that a client that sends one byte
// a segment is no burden. After a verdict other than More a sniffer is not called
// again.
//
// The flight is hostile input: nothing in it makes a sniffer panic, keep more
// than a few words of state or hand out a name that is not a DNS name (see
// [ValidName]).
package sniff

// Verdict is what a sniffer makes of the flight so far.
type Verdict uint8

const (
	// More says that the name may still come.
	More Verdict = iota
	// Found says that the name is complete.
	Found
	// Absent says that no name will come: the flight is of another protocol, is
	// malformed, has no name, has one that is not a DNS name, or is too long.
	Absent
)

// MaxFlight bounds what is looked at, in bytes. It is the most that a TLS record
// carries (RFC 8446, section 5.1), ten times a ClientHello with a post-quantum key
// share, and more than many servers take for an HTTP head. A flight of this length
// that holds no name yet is Absent.
const MaxFlight = 16 << 10

// bounded cuts a flight to MaxFlight and gives the verdict for one that ends too early.
func bounded(flight []byte) ([]byte, Verdict) {
	if len(flight) >= MaxFlight {
		return flight[:MaxFlight], Absent
	}
	return flight, More
}

// named is the verdict on a name that was found.
func named(name []byte) (string, Verdict) {
	canonical, ok := ValidName(string(name))
	if !ok {
		return "", Absent
	}
	return canonical, Found
}
