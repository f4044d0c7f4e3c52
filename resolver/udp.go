package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// udpListener is one socket, read by one loop.
type udpListener struct {
	conn        *net.UDPConn
	transparent bool // queries were meant for others
}

// maxDatagram is the longest query that is read: none that is worked on is longer
// than a question, an OPT record and its options. Of a longer one the rest is cut
// off, which makes it malformed.
const maxDatagram = 4096

// maxSockets bounds the sockets of an address: one answers some 70,000 queries a
// second.
const maxSockets = 4

// listenUDP opens the sockets of an address: one for two processors, among which the
// kernel spreads the clients. Beside the work of the kernel and of the network card one for
// each processor costs more a query, for smaller batches, and answers no more of them.
func listenUDP(address netip.AddrPort, transparent bool, mark uint32) (listeners []*udpListener, err error) {
	for range min(maxSockets, (runtime.GOMAXPROCS(0)+1)/2) {
		config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
			var failure error
			err := raw.Control(func(fd uintptr) { failure = prepareUDP(int(fd), address.Addr(), transparent, mark) })
			return errors.Join(err, failure)
		}}
		conn, err := config.ListenPacket(context.Background(), network("udp", address), address.String())
		if err != nil {
			for _, listener := range listeners {
				listener.conn.Close()
			}
			return nil, err
		}
		listeners = append(listeners, &udpListener{conn.(*net.UDPConn), transparent})
	}
	return listeners, nil
}

// network keeps the families apart: an IPv6 socket takes no IPv4.
func network(transport string, address netip.AddrPort) string {
	if address.Addr().Is4() {
		return transport + "4"
	}
	return transport + "6"
}

// option is a socket option with a number as its value.
type option struct {
	name         string
	level, which int
	value        int
}

func setOptions(socket int, options []option) error {
	for _, o := range options {
		if err := unix.SetsockoptInt(socket, o.level, o.which, o.value); err != nil {
			return fmt.Errorf("set %s: %w", o.name, err)
		}
	}
	return nil
}

// shared are the options of all listeners. The mark keeps rules from taking answers
// for queries of this host.
func shared(mark uint32) []option {
	options := []option{{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}}
	if mark != 0 {
		options = append(options, option{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(mark)})
	}
	return options
}

// transparency lets a socket have the address that was asked.
func transparency(address netip.Addr) option {
	if address.Is4() {
		return option{"IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1}
	}
	return option{"IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1}
}

// ipv6MinimumMTU is what every link carries (RFC 8200 section 5).
const ipv6MinimumMTU = 1280

// prepareUDP sets what a UDP socket needs before it is bound. ICMP errors about a
// captured query's answer name an address that is not ours, so that the path's MTU
// cannot be learnt: longer answers go out in fragments.
func prepareUDP(socket int, address netip.Addr, transparent bool, mark uint32) error {
	options := append(shared(mark), option{"SO_REUSEPORT", unix.SOL_SOCKET, unix.SO_REUSEPORT, 1})
	if address.Is4() {
		options = append(options, option{"IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_OMIT})
	} else {
		options = append(options, option{"IPV6_MTU", unix.SOL_IPV6, unix.IPV6_MTU, ipv6MinimumMTU})
	}
	switch {
	case transparent && address.Is4():
		options = append(options, transparency(address), option{"IP_RECVORIGDSTADDR", unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1})
	case transparent:
		options = append(options, transparency(address), option{"IPV6_RECVORIGDSTADDR", unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1})
	case address.Is4():
		options = append(options, option{"IP_PKTINFO", unix.SOL_IP, unix.IP_PKTINFO, 1})
	default:
		options = append(options, option{"IPV6_RECVPKTINFO", unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1})
	}
	return setOptions(socket, options)
}

// inUse adds the remedy when another program has a port.
func inUse(err error, flag string) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%w: another program has that port: choose another with %s", err, flag)
	}
	return err
}

// serveUDP answers what comes in on one socket. It returns when the socket is closed,
// or fails.
func (s *Server) serveUDP(ctx context.Context, l *udpListener) error {
	raw, err := l.conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("receive DNS queries: %w", err)
	}
	b := &batch{raw: raw}
	for faults := 0; ; {
		n, err := b.receive()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err == nil:
			faults = 0
		default:
			// Such as a lack of memory; one that stays must not make the loop spin.
			if faults++; faults > 100 {
				return fmt.Errorf("receive DNS queries: %w", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		start := time.Now()
		for i := range n {
			s.receive(ctx, l, b, i, start)
		}
		s.stats.noReply.Add(int64(b.send()))
	}
}

// receive answers query i of a batch, now or later.
func (s *Server) receive(ctx context.Context, l *udpListener, b *batch, i int, start time.Time) {
	var q query
	var key [maxNameSize + 8]byte
	message, client := b.message(i), b.client(i)
	from := answerFrom(b.sources[i][:0], b.control(i))
	fault := q.read(message)
	allowed := l.transparent || s.config.Allow == nil || s.config.Allow(client.Addr().Unmap().WithZone(""))
	if fault != nil || !allowed || q.version != 0 {
		if o, ok := s.refused(&q, fault, allowed); ok {
			s.send(l, &q, o, start, from, client)
		}
		return
	}
	o, ok := s.cached(ctx, &q, q.key(key[:0]), b.into[i][:0])
	if !ok {
		s.later(ctx, l, &q, message, start, from, client)
		return
	}
	s.rememberAll(client.Addr(), &q, o.answer)
	b.answer(i, q.dress(o.answer, o.rcode, o.why, q.limit()), from)
	s.done(&q, o, start, client.Addr(), "udp")
}

// later works a query out on a goroutine.
func (s *Server) later(ctx context.Context, l *udpListener, q *query, message []byte, start time.Time, from []byte, client netip.AddrPort) {
	if s.inFlight.Load() >= int64(s.config.MaxInFlight) {
		o, zone := s.atOnce(client.Addr().Unmap(), q)
		if zone != nil {
			o = s.tooMany(q, q.key(nil))
		}
		s.send(l, q, o, start, from, client)
		return
	}
	message, from = append([]byte(nil), message...), append([]byte(nil), from...)
	s.running.Go(func() {
		var q query
		q.read(message)
		o := s.work(ctx, client.Addr().Unmap(), &q, q.key(nil))
		s.send(l, &q, o, start, from, client)
	})
}

// refused is the answer to what is not worked on, if it gets one.
func (s *Server) refused(q *query, fault error, allowed bool) (o outcome, ok bool) {
	switch {
	case fault == errIgnored:
		s.stats.noQuery.Add(1)
		return outcome{}, false
	case !allowed:
		// The answer is not longer than the query, and tells a client that was
		// forgotten in the list why it gets none.
		o = refusal(q, rcodeRefused)
		o.why = edeProhibited
	case fault == errOpcode:
		o = refusal(q, rcodeNotImp)
	case fault != nil:
		o = refusal(q, rcodeFormErr)
	default:
		o = refusal(q, rcodeBadVers)
	}
	o.err = fault
	return o, true
}

// send sends an answer over UDP.
func (s *Server) send(l *udpListener, q *query, o outcome, start time.Time, from []byte, client netip.AddrPort) {
	s.rememberAll(client.Addr(), q, o.answer)
	answer := q.dress(o.answer, o.rcode, o.why, q.limit())
	if _, _, err := l.conn.WriteMsgUDPAddrPort(answer, from, client); err != nil {
		s.stats.noReply.Add(1)
	}
	s.done(q, o, start, client.Addr(), "udp")
}

// done counts an answer, and tells of it.
func (s *Server) done(q *query, o outcome, start time.Time, client netip.Addr, transport string) {
	took := time.Since(start)
	s.stats.answered(q.kind, o.rcode, o.from, took)
	if !s.debug {
		return
	}
	s.log(q, o, took, client, transport)
}

// answerFrom appends the control message that makes an answer leave from the address
// that was asked, as the one of the query tells (ip(7), ipv6(7)). It is empty if that
// tells nothing.
func answerFrom(to, control []byte) []byte {
	for len(control) > 0 {
		header, data, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			return nil
		}
		control = rest
		switch {
		case header.Level == unix.SOL_IP && header.Type == unix.IP_ORIGDSTADDR && len(data) >= unix.SizeofSockaddrInet4:
			return appendPktinfo4(to, data[4:8])
		case header.Level == unix.SOL_IP && header.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			return appendPktinfo4(to, data[4:8])
		case header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_ORIGDSTADDR && len(data) >= unix.SizeofSockaddrInet6:
			return appendPktinfo6(to, data[8:24], 0)
		case header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			var scope uint32
			if data[0] == 0xfe && data[1]&0xc0 == 0x80 { // a link-local address is one of an interface
				scope = binary.NativeEndian.Uint32(data[16:])
			}
			return appendPktinfo6(to, data[:16], scope)
		}
	}
	return nil
}

// appendPktinfo4 appends a struct in_pktinfo whose ipi_spec_dst is the source.
func appendPktinfo4(to, source []byte) []byte {
	to = appendHeader(to, unix.SOL_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
	to = append(to, 0, 0, 0, 0)
	to = append(to, source...)
	to = append(to, 0, 0, 0, 0)
	return append(to, make([]byte, unix.CmsgSpace(unix.SizeofInet4Pktinfo)-len(to))...)
}

func appendPktinfo6(to, source []byte, scope uint32) []byte {
	to = appendHeader(to, unix.SOL_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
	to = append(to, source...)
	to = binary.NativeEndian.AppendUint32(to, scope)
	return append(to, make([]byte, unix.CmsgSpace(unix.SizeofInet6Pktinfo)-len(to))...)
}

// appendHeader appends a struct cmsghdr of a 64-bit kernel (cmsg(3)).
func appendHeader(to []byte, level, kind uint32, size int) []byte {
	to = binary.NativeEndian.AppendUint64(to, uint64(unix.CmsgLen(size)))
	to = binary.NativeEndian.AppendUint32(to, level)
	return binary.NativeEndian.AppendUint32(to, kind)
}

// log writes the line of a query.
func (s *Server) log(q *query, o outcome, took time.Duration, client netip.Addr, transport string) {
	event := s.config.Log.Debug().
		Stringer("client", client).
		Str("transport", transport).
		Str("name", q.text()).
		Str("type", typeName(q.kind)).
		Str("rcode", rcodeName(o.rcode)).
		Stringer("from", o.from).
		Dur("took", took)
	if o.way != "" {
		event = event.Str("way", o.way)
	}
	if o.err != nil {
		event = event.Err(o.err)
	}
	event.Msg("dns")
}
