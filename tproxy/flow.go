package tproxy

import (
	"net/netip"
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
	Name        string         // what the client called it; empty if it did not say
	NameFrom    string         // where Name came from: "sni" or "host"
	Way         string         // "upstream", "direct"; empty if the flow ended before that was decided
	Upstream    string         // the proxy, without credentials; empty for the direct way
	Sent        int64          // bytes from the client to the destination
	Received    int64          // bytes from the destination to the client
	Err         error          // why it ended; nil when both sides closed
}

// flow is one captured connection as the engine's session. Its methods are called
// on the flow's loop.
type flow struct {
	server  *Server
	sniffer sniffer         // nil once it has answered, and for ports that are not peeked
	source  string          // what the sniffer's name is called in the access log
	proxy   *upstream.Proxy // nil for the direct way
	first   netip.AddrPort  // the proxy's address that is tried first
	record  Record
}

func (s *Server) newFlow(client, destination netip.AddrPort) *flow {
	f := &flow{server: s, record: Record{Client: client, Destination: destination}}
	f.sniffer, f.source = snifferFor(destination.Port())
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
	if verdict == sniff.Found {
		f.record.Name, f.record.NameFrom = name, f.source
	}
	f.sniffer = nil
	return false
}

// Route decides where the flow goes.
func (f *flow) Route() (relay.Hop, error) {
	s := f.server
	if s.policy.refuses(f.record.Destination.Addr()) {
		return relay.Hop{}, errRefused
	}
	f.proxy = s.policy.proxy(f.record.Destination, f.record.Name)
	if f.proxy == nil {
		f.record.Way = wayDirect
		// To the address that the client chose, never to one resolved anew.
		return relay.Hop{Addrs: []netip.AddrPort{f.record.Destination}}, nil
	}
	f.record.Way, f.record.Upstream = wayUpstream, f.proxy.String()

	addresses, known := s.dialer.Known(f.proxy)
	lease, standing := f.proxy.Standing()
	if !known || !standing {
		return relay.Hop{Detach: f.detach}, nil
	}
	handshake, err := f.proxy.Handshake(f.target())
	if err != nil {
		return relay.Hop{}, err
	}
	f.first = addresses[0]
	return relay.Hop{Addrs: addresses, Handshake: leased{handshake, lease}}, nil
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
	if f.first.IsValid() && outcome.Address.IsValid() && outcome.Address != f.first && outcome.End != relay.ConnectFailed {
		f.server.dialer.Worked(f.proxy, outcome.Address.Addr())
	}
	f.record.Sent, f.record.Received = outcome.Sent, outcome.Received
	f.record.Duration, f.record.Err = outcome.Duration, outcome.Err
	f.end()
}

// end tells of the flow's end, however it was carried.
func (f *flow) end() {
	f.server.warn(&f.record)
	f.server.config.Access(f.record)
	f.server.open.Add(-1)
}

// leased is a handshake that tells the credential's breaker what became of it.
type leased struct {
	upstream.Handshake
	lease *upstream.Lease
}

// Feed is that of the handshake.
func (l leased) Feed(in []byte) (out, rest []byte, done bool, err error) {
	out, rest, done, err = l.Handshake.Feed(in)
	if done || err != nil {
		l.lease.Settle(err)
	}
	return out, rest, done, err
}
