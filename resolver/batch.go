package resolver

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// batchSize is how many queries are read, and answered from the cache, by one
	// system call: enough to halve the cost of a query, and soon worked off.
	batchSize = 16

	// announceEvery is how many batches a loop that does not park reads between two
	// system calls that the runtime hears of: that keeps its monitor awake, which
	// preempts goroutines. If it heard of each, waking the monitor after every pause
	// would cost as much as the rest of a query.
	announceEvery = 64
)

// batch is the queries that one system call read, and the answers that another one
// will send. Answers and control messages stay in its own memory.
type batch struct {
	raw   syscall.RawConn
	turns int

	queries, answers [batchSize]mmsghdr
	sent             int // answers to be sent

	received, given [batchSize]unix.Iovec
	clients         [batchSize][unix.SizeofSockaddrInet6]byte
	controls        [batchSize][128]byte
	sources         [batchSize][64]byte // control messages of the answers
	messages        [batchSize][maxDatagram]byte
	into            [batchSize][maxDatagram + optSize + edeSize]byte
}

// mmsghdr is struct mmsghdr of recvmmsg(2) in a 64-bit kernel.
type mmsghdr struct {
	header unix.Msghdr
	size   uint32
	_      uint32
}

// receive waits for queries and returns how many there are. The errors are those of
// a closed socket and of recvmmsg(2).
func (b *batch) receive() (n int, err error) {
	b.sent = 0
	for i := range b.queries {
		b.received[i] = unix.Iovec{Base: &b.messages[i][0], Len: maxDatagram}
		b.queries[i].header = unix.Msghdr{
			Name: &b.clients[i][0], Namelen: unix.SizeofSockaddrInet6,
			Iov: &b.received[i], Iovlen: 1,
			Control: &b.controls[i][0], Controllen: uint64(len(b.controls[i])),
		}
	}
	var errno syscall.Errno
	err = b.raw.Read(func(fd uintptr) bool {
		n, errno = b.call(unix.SYS_RECVMMSG, fd, b.queries[:])
		return errno != unix.EAGAIN
	})
	if err == nil && errno != 0 && errno != unix.EINTR {
		return 0, errno
	}
	return n, err
}

// call is recvmmsg(2) or sendmmsg(2), without a wait.
func (b *batch) call(number uintptr, fd uintptr, messages []mmsghdr) (int, syscall.Errno) {
	call := unix.RawSyscall6
	if b.turns++; b.turns%announceEvery == 0 {
		call = unix.Syscall6
	}
	n, _, errno := call(number, fd, uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), unix.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// message, control and client are what came with query i.
func (b *batch) message(i int) []byte { return b.messages[i][:b.queries[i].size] }

func (b *batch) control(i int) []byte { return b.controls[i][:b.queries[i].header.Controllen] }

func (b *batch) client(i int) netip.AddrPort {
	name := &b.clients[i]
	port := binary.BigEndian.Uint16(name[2:])
	if binary.NativeEndian.Uint16(name[:]) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(name[4:8])), port)
	}
	address := netip.AddrFrom16([16]byte(name[8:24]))
	if scope := binary.NativeEndian.Uint32(name[24:]); scope != 0 {
		address = address.WithZone(strconv.FormatUint(uint64(scope), 10))
	}
	return netip.AddrPortFrom(address, port)
}

// answer adds the answer to query i, which leaves from where the control message
// says.
func (b *batch) answer(i int, answer, from []byte) {
	b.given[b.sent] = unix.Iovec{Base: &answer[0], Len: uint64(len(answer))}
	header := unix.Msghdr{Name: &b.clients[i][0], Namelen: b.queries[i].header.Namelen, Iov: &b.given[b.sent], Iovlen: 1}
	if len(from) > 0 {
		header.Control, header.Controllen = &from[0], uint64(len(from))
	}
	b.answers[b.sent].header = header
	b.sent++
}

// send sends the answers and returns how many could not be sent: there is no room
// for them, or no way to their client, who will ask again.
func (b *batch) send() (lost int) {
	for done := 0; done < b.sent; {
		var n int
		var errno syscall.Errno
		if err := b.raw.Control(func(fd uintptr) {
			n, errno = b.call(unix.SYS_SENDMMSG, fd, b.answers[done:b.sent])
		}); err != nil {
			return lost + b.sent - done // the socket is closed
		}
		if errno != 0 {
			lost++
			n = 1
		}
		done += n
	}
	return lost
}
