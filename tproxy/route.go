package tproxy

import (
	"context"
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
	Upstream *upstream.Group
	// HTTP carries port 80 in place of Upstream; nil for no difference.
	HTTP *upstream.Group
	// Script says what carries a flow in place of both; nil for none.
	Script Script
	// Plain reports whether the HTTP/1 requests that come to a port are carried one by
	// one (package forward) and not through a tunnel. Nil for no port.
	Plain func(port uint16) bool
	// Local reports whether an address is the gateway's own; such a destination
	// is refused. It must be safe for concurrent use.
	Local func(netip.Addr) bool
	// Name returns what a client means by an address that it does not name itself:
	// the name for which it was told this address, and where that is known from;
	// both empty if it is not known. It is called on event loops by many flows at
	// once: it must not wait for anything. May be nil.
	Name func(client, destination netip.Addr) (name, source string)
	// Placeholder reports whether an address only stands for a name, which Name
	// returns, and leads nowhere by itself. Like Name; may be nil.
	Placeholder func(netip.Addr) bool
}

// Script says which proxies carry a flow to a host, a name or an address, in the order in
// which to try them; direct:// is the way without one. It is called by many flows at once.
type Script interface {
	// Cached answers at once; ok is false if it would have to wait.
	Cached(host string, port uint16) (proxies []*upstream.Proxy, ok bool)
	// Find waits, for some seconds at most. Without an error there is a proxy.
	Find(ctx context.Context, host string, port uint16) ([]*upstream.Proxy, error)
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

// What a flow is once its sniffer has found something, as the access log calls the
// source of its name.
const (
	fromTLS  = "sni"
	fromHTTP = "host"
	requests = "" // no name: each request has its own
)

// snifferFor returns the parser for a destination port and what it finds, or nil for a
// port that is not peeked.
func (p *Policy) snifferFor(port uint16) (sniffer, string) {
	switch {
	case p.Plain != nil && p.Plain(port):
		return new(sniff.RequestLine), requests
	case port == portHTTP:
		return new(sniff.HTTP), fromHTTP
	case port == portHTTPS:
		return new(sniff.TLS), fromTLS
	}
	return nil, ""
}

// exempt reports whether a flow to destination goes directly. A name decides before the
// address does, for an exemption as for the upstream: that is what makes
// `no_proxy=example.org` work for clients that resolved the name themselves.
func (p *Policy) exempt(destination netip.AddrPort, name string) bool {
	return p.Bypass.MatchAddr(destination) || name != "" && p.Bypass.MatchName(name, destination.Port())
}

// proxies returns those that carry a client's flow, in the order in which to try them; none
// if all are down. ok is false if only the script knows, which has to be waited for.
func (p *Policy) proxies(client netip.Addr, host string, port uint16) (proxies []*upstream.Proxy, ok bool) {
	switch {
	case p.Script != nil:
		return p.Script.Cached(host, port)
	case port == portHTTP && p.HTTP != nil:
		return p.HTTP.Candidates(client), true
	}
	return p.Upstream.Candidates(client), true
}

func (p *Policy) placeholder(address netip.Addr) bool {
	return p.Placeholder != nil && p.Placeholder(address)
}

// errForgotten is about an address of --fake-ip whose name is not known any more,
// or was exempted since.
var errForgotten = errors.New("the address stands for a name that is not held any more: the client has to resolve it again")

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
