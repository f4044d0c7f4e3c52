package tproxy

import (
	"errors"
	"net/netip"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/sniff"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Policy says which way flows leave. It is read by all flows at once and never
// changes.
type Policy struct {
	// Bypass holds the destinations that are reached directly. Nil exempts nothing.
	Bypass *bypass.List
	// Upstream carries everything that is not exempt.
	Upstream *upstream.Proxy
	// HTTP carries port 80 in place of Upstream; nil for no difference.
	HTTP *upstream.Proxy
	// Local reports whether an address is the gateway's own; such a destination
	// is refused. It must be safe for concurrent use.
	Local func(netip.Addr) bool
}

// The two ways out, as the access log names them.
const (
	wayDirect   = "direct"
	wayUpstream = "upstream"
)

// Ports whose client speaks first and says a name; all other ports are dialled
// at once, because their server may be the one that speaks first.
const (
	portHTTP  = 80
	portHTTPS = 443
)

// sniffer finds the name in what a client sent first. flight is all of it and
// grows from call to call.
type sniffer interface {
	Next(flight []byte) (name string, verdict sniff.Verdict)
}

// snifferFor returns the parser for a destination port and what the access log
// calls a name that it found, or nil for a port that is not peeked.
func snifferFor(port uint16) (sniffer, string) {
	switch port {
	case portHTTP:
		return new(sniff.HTTP), "host"
	case portHTTPS:
		return new(sniff.TLS), "sni"
	}
	return nil, ""
}

// proxy returns the upstream that carries a flow to destination, or nil when the
// flow goes directly to it. A name decides before the address does, for an
// exemption as for the upstream: that is what makes `no_proxy=example.org` work
// for clients that resolved the name themselves.
func (p *Policy) proxy(destination netip.AddrPort, name string) *upstream.Proxy {
	if p.Bypass.MatchAddr(destination) || name != "" && p.Bypass.MatchName(name, destination.Port()) {
		return nil
	}
	if destination.Port() == portHTTP && p.HTTP != nil {
		return p.HTTP
	}
	return p.Upstream
}

var errRefused = errors.New("destination refused: an address of the gateway itself, or one that is never routed")

// nat64 is the well-known prefix whose last four bytes are an IPv4 address (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// refuses reports whether a destination must not be reached through the gateway
// in either way: its own addresses, and those that mean "this host" or "this
// link" and so would be the gateway's or the proxy's own services (among them the
// metadata service of clouds). The rules of the kernel leave such packets alone;
// this holds as well when they came some other way.
func (p *Policy) refuses(destination netip.Addr) bool {
	address := destination.Unmap()
	if nat64.Contains(address) {
		bytes := address.As16()
		address = netip.AddrFrom4([4]byte(bytes[12:]))
	}
	return address.IsLoopback() || address.IsUnspecified() || address.IsMulticast() ||
		address.IsLinkLocalUnicast() || p.Local != nil && p.Local(address)
}
