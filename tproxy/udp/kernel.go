package udp

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr is a socket address in the kernel's form: struct sockaddr_in6, of which
// sockaddr_in uses the first 16 bytes (ip(7), ipv6(7)).
type sockaddr [unix.SizeofSockaddrInet6]byte

// set makes it an address without a zone, and returns its length.
func (a *sockaddr) set(to netip.AddrPort) (size uint32) {
	binary.BigEndian.PutUint16(a[2:], to.Port())
	if to.Addr().Is4() {
		binary.NativeEndian.PutUint16(a[:], unix.AF_INET)
		octets := to.Addr().As4()
		copy(a[4:], octets[:])
		return unix.SizeofSockaddrInet4
	}
	binary.NativeEndian.PutUint16(a[:], unix.AF_INET6)
	octets := to.Addr().As16()
	copy(a[8:], octets[:])
	return unix.SizeofSockaddrInet6
}

// parseSockaddr reads one, without its zone. It is zero if it is of another family.
func parseSockaddr(from []byte) netip.AddrPort {
	switch {
	case len(from) >= unix.SizeofSockaddrInet4 && binary.NativeEndian.Uint16(from) == unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(from[4:8])), binary.BigEndian.Uint16(from[2:]))
	case len(from) >= unix.SizeofSockaddrInet6 && binary.NativeEndian.Uint16(from) == unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(from[8:24])), binary.BigEndian.Uint16(from[2:]))
	}
	return netip.AddrPort{}
}

// originalDestination is what IP_RECVORIGDSTADDR has added to a datagram (ip(7)); zero if
// it has not.
func originalDestination(control []byte) netip.AddrPort {
	for len(control) > 0 {
		header, data, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		control = rest
		if header.Level == unix.SOL_IP && header.Type == unix.IP_ORIGDSTADDR ||
			header.Level == unix.SOL_IPV6 && header.Type == unix.IPV6_ORIGDSTADDR {
			return parseSockaddr(data)
		}
	}
	return netip.AddrPort{}
}

// mmsghdr is struct mmsghdr of recvmmsg(2) in a 64-bit kernel.
type mmsghdr struct {
	header unix.Msghdr
	size   uint32
	_      uint32
}

// announceEvery is how many system calls a loop that does not park makes between two that
// the runtime hears of, which keeps the runtime's monitor awake: see fetchEvents of
// package relay.
const announceEvery = 64

// system makes the loop's system calls on non-blocking descriptors: most of them unknown
// to the runtime, as those of package relay (kernel.go there says what that saves).
type system struct{ calls int }

// messages is recvmmsg(2) or sendmmsg(2), without a wait.
func (s *system) messages(number uintptr, socket int, messages []mmsghdr) (int, unix.Errno) {
	call := unix.RawSyscall6
	if s.calls++; s.calls%announceEvery == 0 {
		call = unix.Syscall6
	}
	n, _, errno := call(number, uintptr(socket), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// events is epoll_wait(2) without a wait.
func (s *system) events(epoll int, events []unix.EpollEvent) (int, unix.Errno) {
	call := unix.RawSyscall6
	if s.calls++; s.calls%announceEvery == 0 {
		call = unix.Syscall6
	}
	n, _, errno := call(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(&events[0])), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
