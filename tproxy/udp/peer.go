package udp

import (
	"net/netip"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// nameTimeout is how long the first answer of a destination that was asked by name is
	// waited for. Until it is there nobody knows its address, so that another name on the
	// same port would have to share it: see route.
	nameTimeout = time.Second
	// maxReal bounds the addresses at which a name's answers are recognised. A proxy that
	// looks names up for each datagram goes round all that there are.
	maxReal = 8
)

// peer is a destination of a session.
type peer struct {
	destination netip.AddrPort // the address that the client has asked
	way         Way
	sockaddr    sockaddr // the destination, for the direct way
	size        uint32
	header      []byte // of what goes to the proxy
	name        string // by which the proxy is asked; empty for its address
	real        int    // how many addresses its answers come from
	asked       time.Duration
	used        time.Duration
}

// find returns the peer of a destination, or makes it. It is nil if a datagram to it is to
// be dropped, for the reason.
func (l *loop) find(s *session, destination netip.AddrPort, r Route) (*peer, reason) {
	p := &peer{destination: destination, way: r.Way, asked: l.now}
	switch {
	case r.Way == Upstream:
		if why, ok := l.address(s, p, r); !ok {
			return nil, why
		}
	case r.Placeholder:
		return nil, dropForgotten
	default:
		p.size = p.sockaddr.set(destination)
	}
	if len(s.peers) >= maxPeers {
		s.forgetPeer()
	}
	if s.record.Destinations++; s.record.Destinations == 1 {
		s.record.Destination, s.record.Name, s.record.NameFrom, s.record.Way = destination, r.Name, r.NameFrom, r.Way
	}
	s.peers[destination] = p
	s.lasting = s.lasting || !shortPort(destination.Port())
	return p, 0
}

// address decides how the proxy is told of a peer: by the name where there is one. Its
// first answer then comes from an address that is not known here. It is recognised by its
// port; so there must not be two names of which this is waited for.
func (l *loop) address(s *session, p *peer, r Route) (why reason, ok bool) {
	if r.Name != "" {
		alone := true
		for _, other := range s.peers {
			if other.name != "" && other.real == 0 && other.destination.Port() == p.destination.Port() && l.now-other.asked < nameTimeout {
				alone = false
			}
		}
		if alone {
			header, err := upstream.AppendDatagramTarget(nil, upstream.Target{Host: r.Name, Port: p.destination.Port()})
			if err == nil {
				p.header, p.name = header, r.Name
				return 0, true
			}
		} else if r.Placeholder {
			return dropNames, false // the client sends it again
		}
	}
	if r.Placeholder {
		return dropForgotten, false
	}
	p.header = upstream.AppendDatagramHeader(nil, p.destination)
	return 0, true
}

// forgetPeer makes room for another one. Of a few, which are any (the order of a map is),
// the one that was not used for longest goes.
func (s *session) forgetPeer() {
	const tries = 8
	var oldest *peer
	n := 0
	for _, p := range s.peers {
		if oldest == nil || p.used < oldest.used {
			oldest = p
		}
		if n++; n == tries {
			break
		}
	}
	delete(s.peers, oldest.destination)
	if oldest.real > 0 {
		for real, p := range s.real {
			if p == oldest {
				delete(s.real, real)
			}
		}
	}
}

// asked returns the address that the client has asked, of one from which the proxy relays.
func (l *loop) asked(s *session, d upstream.Datagram) (netip.AddrPort, reason, bool) {
	if d.Name != nil {
		for _, p := range s.peers {
			if p.name == string(d.Name) && p.destination.Port() == d.From.Port() {
				return p.destination, 0, true
			}
		}
		return netip.AddrPort{}, dropStranger, false
	}
	from := d.From
	if p := s.real[from]; p != nil {
		return p.destination, 0, true
	}
	if s.peers[from] != nil {
		if p := s.peers[from]; p.name != "" && p.real == 0 {
			s.recognise(from, p)
		}
		return from, 0, true
	}
	if p := s.named(from.Port()); p != nil {
		s.recognise(from, p)
		return p.destination, 0, true
	}
	if l.config.Impostor(from.Addr()) {
		return netip.AddrPort{}, dropImpostor, false
	}
	if from.Addr().Is4() != s.client.Addr().Is4() || l.config.Filter == AddressDependent && !s.knows(from.Addr()) {
		return netip.AddrPort{}, dropStranger, false
	}
	return from, 0, true
}

// recognise takes note that a peer that was asked by name answers from an address.
func (s *session) recognise(from netip.AddrPort, p *peer) {
	if s.real == nil {
		s.real = make(map[netip.AddrPort]*peer)
	}
	s.real[from] = p
	p.real++
}

// named returns the peer that was asked by name and may be the one that answers from a
// port for the first time: the one that has not answered yet, else the only one.
func (s *session) named(port uint16) *peer {
	var found, only *peer
	n := 0
	for _, p := range s.peers {
		if p.name == "" || p.destination.Port() != port {
			continue
		}
		n++
		only = p
		if p.real == 0 && (found == nil || p.asked > found.asked) {
			found = p
		}
	}
	switch {
	case found != nil:
		return found
	case n == 1 && only.real < maxReal:
		return only
	}
	return nil
}

// knows reports whether the client has sent to an address.
func (s *session) knows(address netip.Addr) bool {
	for destination := range s.peers {
		if destination.Addr() == address {
			return true
		}
	}
	return false
}
