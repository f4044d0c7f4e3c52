package udp

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// fromClients takes in what clients have sent.
func (l *loop) fromClients(ctx context.Context, listener int) {
	for range turn {
		n, errno := l.in.receive(listener)
		if errno != 0 {
			return // EAGAIN; what else there is, such as a lack of memory, comes again
		}
		for i := range n {
			l.fromClient(ctx, i)
		}
		l.out.flush()
		if n < batchSize {
			return
		}
	}
}

// fromClient sends a datagram on. The buffers stay as they are until the outbox is flushed.
func (l *loop) fromClient(ctx context.Context, i int) {
	client, destination := l.in.source(i), l.in.destination(i)
	if !client.IsValid() || !destination.IsValid() {
		l.counters.drop(dropUnaddressed)
		return
	}
	s := l.sessions[client]
	var p *peer
	if s != nil {
		p = s.peers[destination]
	}
	if p == nil {
		route := l.config.Route(client.Addr(), destination)
		if route.Way == Refused {
			l.counters.drop(dropRefused)
			return
		}
		var why reason
		if s == nil {
			if s, why = l.admit(client, &l.in.sources[i], l.in.headers[i].header.Namelen); s == nil {
				l.counters.drop(why)
				return
			}
			l.refresh(s)
		}
		if p, why = l.find(s, destination, route); p == nil {
			l.counters.drop(why)
			return
		}
	}
	p.used = l.now
	l.refresh(s)
	switch {
	case p.way == Direct:
		l.sendDirect(s, p, l.in.bytes(i))
	case s.stage == granted:
		l.out.add(s.relay, l.in.after(p.header, i), nil, 0, &s.sent, int(l.in.headers[i].size))
	case s.stage == failed:
		l.counters.drop(dropFailed)
	default:
		l.keep(s, p, l.in.bytes(i))
		if s.stage == unasked {
			l.ask(ctx, s)
		}
	}
}

// sendQueued sends what has waited for the association.
func (l *loop) sendQueued(s *session) {
	queue := s.queue
	s.queue = nil
	for _, q := range queue {
		l.held -= len(q.payload)
		datagram := append(q.peer.header[:len(q.peer.header):len(q.peer.header)], q.payload...)
		l.out.add(s.relay, datagram, nil, 0, &s.sent, len(q.payload))
	}
	l.out.flush()
}

// sendDirect sends a datagram past the proxy.
func (l *loop) sendDirect(s *session, p *peer, payload []byte) {
	family, kind := 0, onDirect4
	if p.destination.Addr().Is6() {
		family, kind = 1, onDirect6
	}
	if s.direct[family] == none {
		socket, err := openSession(familyOf(p.destination.Addr()), l.config.Mark, netip.AddrPort{})
		if err == nil {
			if err = l.watch(socket, s.slot, s.generation, kind, unix.EPOLLIN); err != nil {
				unix.Close(socket)
			}
		}
		if err != nil {
			l.log.Warn().Err(err).Msg("a client's UDP is not sent")
			l.counters.drop(dropUnsent)
			return
		}
		s.direct[family] = socket
	}
	l.out.add(s.direct[family], payload, &p.sockaddr, p.size, &s.sent, len(payload))
}

// fromRelay gives a client what the proxy has relayed.
func (l *loop) fromRelay(s *session) {
	for range turn {
		n, errno := l.in.receive(s.relay)
		if errno != 0 {
			return
		}
		for i := range n {
			datagram, err := upstream.ParseDatagram(l.in.bytes(i))
			switch {
			case err == upstream.ErrFragment:
				l.counters.drop(dropFragment)
				continue
			case err != nil:
				l.counters.drop(dropHeader)
				continue
			}
			from, why, ok := l.asked(s, datagram)
			if !ok {
				l.counters.drop(why)
				continue
			}
			l.reply(s, from, datagram.Payload)
		}
		l.out.flush()
		if n < batchSize {
			return
		}
	}
}

// fromDirect gives a client what others have sent to the session's own socket.
func (l *loop) fromDirect(s *session, socket int) {
	for range turn {
		n, errno := l.in.receive(socket)
		if errno != 0 {
			return
		}
		for i := range n {
			from := l.in.source(i)
			switch {
			case s.peers[from] != nil && s.peers[from].way == Direct:
				l.reply(s, from, l.in.bytes(i))
			case l.config.Impostor(from.Addr()) || l.config.Filter == AddressDependent && !s.knows(from.Addr()):
				l.counters.drop(dropStranger)
			default:
				l.reply(s, from, l.in.bytes(i))
			}
		}
		l.out.flush()
		if n < batchSize {
			return
		}
	}
}

// reply sends to a client as if from an address.
func (l *loop) reply(s *session, from netip.AddrPort, payload []byte) {
	if from.Port() == 0 {
		l.counters.drop(dropHeader)
		return
	}
	socket, err := l.replySocket(from)
	if err != nil {
		advice := "a reply cannot leave from the address that was asked"
		if errors.Is(err, unix.EADDRINUSE) {
			advice += ": another program holds this UDP port on all addresses of the gateway; have it listen on some"
		}
		l.log.Warn().Err(err).Stringer("from", from).Msg(advice)
		l.counters.drop(dropSocket)
		return
	}
	l.out.add(socket, payload, &s.sockaddr, s.size, &s.received, len(payload))
}

// fromControl ends a session when the proxy ends the association.
func (l *loop) fromControl(s *session) {
	var scratch [1024]byte
	n, err := unix.Read(s.control, scratch[:])
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
	case n <= 0:
		l.end(s, errRelay)
	default:
		if s.heard += n; s.heard > maxChatter {
			l.end(s, errChatter)
		}
	}
}

// errors reads what ICMP errors a socket was told of (IP_RECVERR, ip(7)), and reports
// whether one of them says that nobody has the port. Those about a path's MTU have been
// heeded by the kernel.
func (l *loop) errors(socket int) (refused bool) {
	var control [512]byte // a struct sock_extended_err with the address of who complains
	for {
		n, controlled, _, _, err := unix.Recvmsg(socket, nil, control[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if n < 0 || err != nil {
			break
		}
		l.counters.icmp.Add(1)
		for rest := control[:controlled]; len(rest) > 0; {
			header, data, after, err := unix.ParseOneSocketControlMessage(rest)
			if err != nil {
				break
			}
			rest = after
			if (header.Level == unix.SOL_IP && header.Type == unix.IP_RECVERR ||
				header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_RECVERR) && len(data) >= 4 {
				// The first field is the error's number, as errno(3) has it.
				refused = refused || unix.Errno(binary.NativeEndian.Uint32(data)) == unix.ECONNREFUSED
			}
		}
	}
	// What is left of it would be told to the next call in the place of its result.
	number, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_ERROR)
	return refused || err == nil && unix.Errno(number) == unix.ECONNREFUSED
}
