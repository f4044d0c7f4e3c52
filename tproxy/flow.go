package tproxy

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/sniff"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Record is what is known of one flow at its end.
type Record struct {
	Duration    time.Duration
	Client      netip.AddrPort
	Destination netip.AddrPort // the original destination: the address that the client dialled
	Name        string         // what the client called it; empty if that is not known
	NameFrom    string         // where Name came from: "sni", "host", or what Policy.Name says
	Way         string         // "upstream", "direct"; empty if the flow ended before that was decided
	Upstream    string         // the proxy, without credentials; empty for the direct way
	Sent        int64          // bytes from the client to the destination
	Received    int64          // bytes from the destination to the client
	Err         error          // why it ended; nil when both sides closed
}

// flow is one captured connection as the engine's session. Its methods are called
// on the flow's loop.
type flow struct {
	server     *Server
	sniffer    sniffer           // nil once it has answered, and for ports that are not peeked
	source     string            // what the sniffer finds
	plain      bool              // it is one of HTTP/1 requests, each of which is carried for itself
	proxy      *upstream.Proxy   // nil for the direct way, and before that is decided
	others     []*upstream.Proxy // to be tried next, should that one fail
	addresses  []netip.AddrPort  // of a proxy that has several, until one is connected to
	reconnects uint8             // how often the proxy was asked again on another connection
	record     Record
}

func (s *Server) newFlow(client, destination netip.AddrPort) *flow {
	f := &flow{server: s, record: Record{Client: client, Destination: destination}}
	f.sniffer, f.source = s.policy.snifferFor(destination.Port())
	if f.source != requests && s.policy.placeholder(destination.Addr()) {
		f.sniffer = nil // the address stands for a name, and so says all that a first flight could
	}
	return f
}

// Peek looks for the name in what the client said. A client that stays silent or
// says something else is no error: the flow goes on by its address.
func (f *flow) Peek(flight []byte, last bool) (more bool) {
	if f.sniffer == nil {
		return false
	}
	name, verdict := f.sniffer.Next(flight)
	if verdict == sniff.More && !last {
		return true
	}
	switch {
	case verdict == sniff.Found && f.source == requests:
		f.plain = true
	case verdict == sniff.Found:
		f.record.Name, f.record.NameFrom = name, f.source
	}
	f.sniffer = nil
	return false
}

// Route decides where the flow goes.
func (f *flow) Route() (relay.Hop, error) {
	s := f.server
	destination := f.record.Destination.Addr()
	if s.policy.refuses(destination) {
		return relay.Hop{}, errRefused
	}
	if f.plain {
		return relay.Hop{Detach: f.forward}, nil
	}
	if f.record.Name == "" && s.policy.Name != nil {
		f.record.Name, f.record.NameFrom = s.policy.Name(f.record.Client.Addr(), destination)
	}
	placeholder := s.policy.placeholder(destination)
	if placeholder && f.record.Name == "" {
		return relay.Hop{}, errForgotten
	}
	if s.policy.exempt(f.record.Destination, f.record.Name) {
		return f.direct()
	}
	f.record.Way = wayUpstream
	target := f.target()
	var known bool
	f.others, known = s.policy.proxies(f.record.Client.Addr(), target.Host, target.Port)
	switch {
	case !known:
		return relay.Hop{Detach: f.detach}, nil
	case len(f.others) == 0:
		return relay.Hop{}, upstream.ErrAllDown
	}
	return f.next()
}

// direct is the way to the destination itself.
func (f *flow) direct() (relay.Hop, error) {
	f.proxy, f.record.Way, f.record.Upstream = nil, wayDirect, ""
	if f.server.policy.placeholder(f.record.Destination.Addr()) {
		return relay.Hop{}, errForgotten
	}
	// To the address that the client chose, never to one resolved anew.
	return relay.Hop{Addrs: []netip.AddrPort{f.record.Destination}}, nil
}

// next is the way through the next of the proxies, of which there is one.
func (f *flow) next() (relay.Hop, error) {
	f.proxy, f.others = f.others[0], f.others[1:]
	if f.proxy.Direct() {
		return f.direct()
	}
	return f.through()
}

// through is the way through the proxy that was chosen.
func (f *flow) through() (relay.Hop, error) {
	s := f.server
	f.record.Way, f.record.Upstream = wayUpstream, f.proxy.String()
	addresses, known := s.config.Dialer.Known(f.proxy)
	lease, standing := f.proxy.Standing()
	if !known || !standing {
		return relay.Hop{Detach: f.detach}, nil
	}
	handshake, err := f.proxy.Handshake(f.target(), lease)
	if err != nil {
		return relay.Hop{}, err
	}
	if len(addresses) > 1 {
		f.addresses = addresses
	}
	return relay.Hop{Addrs: addresses, Handshake: handshake, Source: s.source, Warm: true}, nil
}

// Connected takes note that the proxy can be reached, and where.
func (f *flow) Connected(address netip.AddrPort, took time.Duration) {
	if f.proxy == nil {
		return
	}
	f.proxy.Connected(took)
	if f.addresses != nil && address != f.addresses[0] {
		f.server.config.Dialer.Worked(f.proxy, address.Addr())
	}
	f.addresses = nil
}

// Retry goes on to the next proxy if the last one could not be connected to, or closed the
// connection without an answer. One that asks for authentication is asked again.
func (f *flow) Retry(how relay.End, err error) (relay.Hop, bool) {
	if f.proxy == nil {
		return relay.Hop{}, false
	}
	switch {
	case errors.Is(err, upstream.ErrReconnect):
		f.proxy.Answered()
		if f.reconnects++; f.reconnects > upstream.MaxReconnects {
			return relay.Hop{}, false
		}
		hop, err := f.through()
		return hop, err == nil
	case how == relay.ConnectFailed:
		f.proxy.Failed(err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		f.proxy.Unanswered()
		return relay.Hop{}, false
	case upstream.Elsewhere(err):
		f.proxy.Unanswered()
	default:
		f.proxy.Answered()
		return relay.Hop{}, false
	}
	if len(f.others) == 0 {
		return relay.Hop{}, false
	}
	hop, err := f.next()
	return hop, err == nil
}

// target is what the proxy is asked for: the name where one is known.
func (f *flow) target() upstream.Target {
	target := upstream.Target{Host: f.record.Name, Port: f.record.Destination.Port()}
	if target.Host == "" {
		target.Host = f.record.Destination.Addr().Unmap().String()
	}
	return target
}

// Closed is the flow's end on the engine.
func (f *flow) Closed(outcome relay.Outcome) {
	f.record.Sent, f.record.Received = outcome.Sent, outcome.Received
	f.record.Duration, f.record.Err = outcome.Duration, outcome.Err
	if f.proxy != nil && outcome.End != relay.ConnectFailed && outcome.End != relay.HandshakeFailed {
		f.proxy.Answered()
	}
	f.end()
}

// end tells of the flow's end, however it was carried.
func (f *flow) end() {
	if f.record.Way == wayUpstream && f.record.Err != nil && f.record.Sent+f.record.Received == 0 {
		f.server.warn(f.record.Err)
	}
	f.server.config.Access(f.record)
	f.server.open.Add(-1)
}
