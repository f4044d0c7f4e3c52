package relay

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The system calls of the loops. All are on non-blocking descriptors and return
// at once, so that they need not be announced to the Go scheduler as ordinary
// calls are. The announcement itself is cheap, but the first one after a pause
// wakes the monitor thread of the runtime, which then runs every 20 µs for a
// while: measured at 60 connections a second, 410 µs of processor time for each
// with ordinary calls and 250 µs with these. Under full load an ordinary call that
// takes longer than those 20 µs, as a large splice does, loses its processor to the
// monitor and has to win it back.
//
// The price is that the runtime does not see a loop as what it is; see
// loop.fetchEvents for what makes up for that.

// call makes a system call that returns a number.
func call(number, a, b, c, d, e, f uintptr) (int, error) {
	result, _, errno := unix.RawSyscall6(number, a, b, c, d, e, f)
	if errno != 0 {
		return 0, errno
	}
	return int(result), nil
}

// receive is recv(2). into is not empty.
func receive(socket int, into []byte) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(socket), uintptr(unsafe.Pointer(&into[0])), uintptr(len(into)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// send is send(2). bytes is not empty.
func send(socket int, bytes []byte) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(socket), uintptr(unsafe.Pointer(&bytes[0])), uintptr(len(bytes)), unix.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// splice is splice(2), one of whose descriptors is a pipe.
func splice(from, to, most int) (int, error) {
	return call(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(most), unix.SPLICE_F_NONBLOCK)
}

// shutdown is shutdown(2) of the direction that sends.
func shutdown(socket int) error {
	_, err := call(unix.SYS_SHUTDOWN, uintptr(socket), unix.SHUT_WR, 0, 0, 0, 0)
	return err
}

// shut is close(2). The descriptor is gone even if there is an error, and nothing
// that a socket or a pipe could report is of interest by then.
func shut(fd int) {
	call(unix.SYS_CLOSE, uintptr(fd), 0, 0, 0, 0, 0)
}

// newSocket returns a TCP socket of a family.
func newSocket(family int) (int, error) {
	return call(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP, 0, 0, 0)
}

// setOption is setsockopt(2) of a number.
func setOption(socket, level, option int, value int32) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(socket), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// setLinger sets SO_LINGER to no time at all, or switches it off.
func setLinger(socket int, on bool) error {
	value := unix.Linger{}
	if on {
		value.Onoff = 1
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(socket), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&value)), unsafe.Sizeof(value), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// socketError returns and clears the error of a socket that reported one.
func socketError(socket int) error {
	var value int32
	size := uint32(unsafe.Sizeof(value))
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(socket), unix.SOL_SOCKET, unix.SO_ERROR, uintptr(unsafe.Pointer(&value)), uintptr(unsafe.Pointer(&size)), 0)
	switch {
	case errno != 0:
		return errno
	case value == 0:
		return unix.ECONNRESET // another call has been told
	}
	return unix.Errno(value)
}

// control is epoll_ctl(2).
func control(epoll, operation, fd int, t token, events uint32) error {
	event := unix.EpollEvent{Events: events, Fd: t.slot, Pad: t.generation}
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), uintptr(operation), uintptr(fd), uintptr(unsafe.Pointer(&event)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// fetch is epoll_wait(2) without a wait.
func fetch(epoll int, events []unix.EpollEvent) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// sockaddr is a socket address in the kernel's form: struct sockaddr_in6, of which
// sockaddr_in uses the first 16 bytes (ip(7), ipv6(7)).
type sockaddr [unix.SizeofSockaddrInet6]byte

// connect is connect(2); that the connection is in progress is no error.
func connect(socket int, to netip.AddrPort) error {
	raw, size := sockaddrOf(to)
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(socket), uintptr(unsafe.Pointer(&raw)), size)
	if errno != 0 && errno != unix.EINPROGRESS {
		return errno
	}
	return nil
}

// bind is bind(2).
func bind(socket int, to netip.AddrPort) error {
	raw, size := sockaddrOf(to)
	_, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(socket), uintptr(unsafe.Pointer(&raw)), size)
	if errno != 0 {
		return errno
	}
	return nil
}

// accept is accept4(2).
func accept(listening int) (socket int, remote netip.AddrPort, err error) {
	var raw sockaddr
	size := uint32(len(raw))
	fd, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listening), uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return 0, netip.AddrPort{}, errno
	}
	return int(fd), raw.addrPort(), nil
}

// localAddress is getsockname(2).
func localAddress(socket int) (netip.AddrPort, error) {
	var raw sockaddr
	size := uint32(len(raw))
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(socket), uintptr(unsafe.Pointer(&raw)), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return netip.AddrPort{}, errno
	}
	return raw.addrPort(), nil
}

// sockaddrOf returns the kernel's form of an address that is not IPv4-mapped, and
// its size. The zone of a link-local one is left out; see scope.
func sockaddrOf(from netip.AddrPort) (to sockaddr, size uintptr) {
	binary.BigEndian.PutUint16(to[2:], from.Port())
	if from.Addr().Is4() {
		binary.NativeEndian.PutUint16(to[:], unix.AF_INET)
		ip := from.Addr().As4()
		copy(to[4:], ip[:])
		return to, unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(to[:], unix.AF_INET6)
	ip := from.Addr().As16()
	copy(to[8:], ip[:])
	binary.NativeEndian.PutUint32(to[24:], scope(from.Addr()))
	return to, unix.SizeofSockaddrInet6
}

// addrPort is the inverse of sockaddrOf. An IPv4 connection of a dual-stack socket
// comes out as what it is.
func (a *sockaddr) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(a[2:])
	if binary.NativeEndian.Uint16(a[:]) == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(a[4:8])), port)
	}
	addr := netip.AddrFrom16([16]byte(a[8:24])).Unmap()
	return netip.AddrPortFrom(withScope(addr, binary.NativeEndian.Uint32(a[24:])), port)
}
