package udp

import (
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// batchSize is how many datagrams one system call reads or sends at most.
	batchSize = 32
	// maxDatagram is the length of the longest payload that a UDP header can tell (RFC
	// 768: 65,535 less 8 bytes).
	maxDatagram = 65527
	// headroom is left before a datagram for the header that the proxy is to see.
	headroom = upstream.MaxDatagramHeader
	// controlSize holds an IPv6 address (CMSG_SPACE of a sockaddr_in6 is 48 bytes).
	controlSize = 64
)

// inbox is what one system call has read.
type inbox struct {
	system   *system
	headers  [batchSize]mmsghdr
	vectors  [batchSize]unix.Iovec
	sources  [batchSize]sockaddr
	controls [batchSize][controlSize]byte
	buffers  [batchSize][headroom + maxDatagram]byte
}

func newInbox(s *system) *inbox {
	b := &inbox{system: s}
	for i := range b.headers {
		b.vectors[i] = unix.Iovec{Base: &b.buffers[i][headroom], Len: maxDatagram}
		b.headers[i].header = unix.Msghdr{Name: &b.sources[i][0], Iov: &b.vectors[i], Iovlen: 1, Control: &b.controls[i][0]}
	}
	return b
}

// receive reads what a socket has, at most a batch.
func (b *inbox) receive(socket int) (n int, errno unix.Errno) {
	for i := range b.headers {
		b.headers[i].header.Namelen = uint32(len(sockaddr{}))
		b.headers[i].header.Controllen = controlSize
	}
	return b.system.messages(unix.SYS_RECVMMSG, socket, b.headers[:])
}

// bytes, source and destination are those of datagram i.
func (b *inbox) bytes(i int) []byte {
	return b.buffers[i][headroom : headroom+b.headers[i].size]
}

func (b *inbox) source(i int) netip.AddrPort {
	return parseSockaddr(b.sources[i][:b.headers[i].header.Namelen])
}

func (b *inbox) destination(i int) netip.AddrPort {
	return originalDestination(b.controls[i][:b.headers[i].header.Controllen])
}

// after returns datagram i behind a header, which is copied into the room before it.
func (b *inbox) after(header []byte, i int) []byte {
	start := headroom - len(header)
	copy(b.buffers[i][start:], header)
	return b.buffers[i][start : headroom+b.headers[i].size]
}

// tally counts what one session has sent, or received.
type tally struct {
	datagrams, bytes int64
	total            *atomic.Int64 // the datagrams of all sessions
}

// outbox collects datagrams that leave from one socket, one after the other.
type outbox struct {
	system   *system
	counters *counters
	socket   int
	used     int
	headers  [batchSize]mmsghdr
	vectors  [batchSize]unix.Iovec
	tallies  [batchSize]*tally
	payloads [batchSize]int
}

func newOutbox(s *system, c *counters) *outbox {
	b := &outbox{system: s, counters: c, socket: none}
	for i := range b.headers {
		b.headers[i].header = unix.Msghdr{Iov: &b.vectors[i], Iovlen: 1}
	}
	return b
}

// add appends a datagram, which must stay as it is until flush. to is nil for a connected
// socket. Its payload, in bytes, is counted once it is sent.
func (b *outbox) add(socket int, datagram []byte, to *sockaddr, size uint32, t *tally, payload int) {
	if socket != b.socket || b.used == batchSize {
		b.flush()
		b.socket = socket
	}
	i := b.used
	b.used++
	b.vectors[i] = unix.Iovec{Len: uint64(len(datagram))}
	if len(datagram) > 0 {
		b.vectors[i].Base = &datagram[0]
	}
	header := &b.headers[i].header
	header.Name, header.Namelen = nil, 0
	if to != nil {
		header.Name, header.Namelen = &to[0], size
	}
	b.tallies[i], b.payloads[i] = t, payload
}

// flush sends what there is. What the kernel does not take is dropped: UDP keeps nothing
// back.
func (b *outbox) flush() {
	again := true
	for done := 0; done < b.used; {
		n, errno := b.system.messages(unix.SYS_SENDMMSG, b.socket, b.headers[done:b.used])
		if errno == unix.EINTR {
			continue
		}
		if again && errno != 0 && errno != unix.EAGAIN && errno != unix.EMSGSIZE {
			// What an ICMP error about an earlier datagram says is told to a later one
			// (udp(7)), which is not sent; the second time it is about this one.
			again = false
			continue
		}
		again = true
		if errno != 0 {
			why := dropUnsent
			if errno == unix.EMSGSIZE {
				why = dropTooLong
			}
			b.counters.drop(why)
			done++
			continue
		}
		b.tallies[done].total.Add(int64(n)) // what leaves from one socket goes one way
		for i := done; i < done+n; i++ {
			b.tallies[i].datagrams++
			b.tallies[i].bytes += int64(b.payloads[i])
		}
		done += n
	}
	for i := range b.used {
		b.tallies[i], b.vectors[i].Base, b.headers[i].header.Name = nil, nil, nil
	}
	b.used, b.socket = 0, none
}
