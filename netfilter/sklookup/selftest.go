package sklookup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// contextSize is that of struct bpf_sk_lookup (linux/bpf.h), with its padding.
const contextSize = 72 // bytes

// ask runs the program as the kernel does for a packet, and returns its verdict and the cookie (SO_COOKIE of socket(7)) of the
// socket that it assigns, 0 for none. The packet comes in on the interface 0, which is none: the kernel's test run has no other.
func (h *Handle) ask(protocol uint32, destination netip.AddrPort) (verdict uint32, assigned uint64, err error) {
	packet, after := make([]byte, contextSize), make([]byte, contextSize)
	family := uint32(unix.AF_INET6)
	field := localIP6Field
	if destination.Addr().Is4() {
		family, field = unix.AF_INET, localIP4Field
	}
	copy(packet[field:], destination.Addr().AsSlice())
	binary.NativeEndian.PutUint32(packet[familyField:], family)
	binary.NativeEndian.PutUint32(packet[protocolField:], protocol)
	binary.NativeEndian.PutUint32(packet[localPortField:], uint32(destination.Port()))
	verdict, err = h.program.Run(&ebpf.RunOptions{Context: packet, ContextOut: after})
	return verdict, binary.NativeEndian.Uint64(after), err
}

// test asks the program about packets of which the answers are known: that the kernel takes it does not say that it does
// here what it is meant to. It leaves interfaces, addresses and sockets empty. Kernels before Linux 5.14 cannot be asked.
func (h *Handle) test() (err error) {
	socket, cookie, err := probe()
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	own := netip.MustParsePrefix("127.0.0.0/8")
	defer func() { err = errors.Join(err, h.Refuse(), h.Set(nil, nil)) }()
	if err := errors.Join(h.Set([]int{0}, []netip.Prefix{own}), h.Assign(socket, false)); err != nil {
		return err
	}
	foreign := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), 443) // for documentation: RFC 5737
	for _, c := range []struct {
		what        string
		destination netip.AddrPort
		verdict     uint32
		assigned    uint64
	}{
		{"a foreign destination", foreign, pass, cookie},
		{"an own destination", netip.AddrPortFrom(own.Addr().Next(), 443), pass, 0},
	} {
		verdict, assigned, err := h.ask(unix.IPPROTO_TCP, c.destination)
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("ask the sk_lookup program about %s: %w", c.what, err)
		}
		if verdict != c.verdict || assigned != c.assigned {
			return fmt.Errorf("the sk_lookup program answers %d and socket %#x for %s, and should %d and %#x: --engine tproxy does without it",
				verdict, assigned, c.what, c.verdict, c.assigned)
		}
	}
	return nil
}

// probe opens a socket that nobody connects to. The caller closes it.
func probe() (socket int, cookie uint64, err error) {
	socket, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("open a socket: %w", err)
	}
	if err = unix.Bind(socket, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err == nil {
		err = unix.Listen(socket, 1)
	}
	if err == nil {
		cookie, err = unix.GetsockoptUint64(socket, unix.SOL_SOCKET, unix.SO_COOKIE)
	}
	if err != nil {
		unix.Close(socket)
		return 0, 0, fmt.Errorf("open a socket on 127.0.0.1: %w", err)
	}
	return socket, cookie, nil
}
