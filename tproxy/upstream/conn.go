package upstream

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is the connection on which a flow leaves: a *net.TCPConn, which can be spliced, or
// TLS to a proxy, a stream of it or a unix socket, which are not.
type Conn interface {
	net.Conn
	// CloseWrite ends what this side sends, and leaves what it receives.
	CloseWrite() error
	// SetLinger with 0 makes Close an abort, which the far side cannot take for an
	// orderly end; with a negative number it takes that back. See net.TCPConn.
	SetLinger(seconds int) error
}

// stateClose is that of a connection of which nothing is left: TCP_CLOSE of the kernel's
// include/net/tcp_states.h. After a FIN it is another.
const stateClose = 7

// Look tells by the kernel's view of a connection (TCP_INFO, tcp(7)) how many bytes it has
// received and how many of those it sent were acknowledged, and whether it was reset. Of
// one that is closed here both are zero.
func Look(conn net.Conn) (moved int64, reset bool) {
	if stream, ok := conn.(*stream); ok {
		return stream.moved.Load(), false
	}
	below, ok := conn.(syscall.Conn)
	if !ok {
		return 0, false
	}
	raw, err := below.SyscallConn()
	if err != nil {
		return 0, false
	}
	raw.Control(func(fd uintptr) {
		if state, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO); err == nil {
			moved, reset = int64(state.Bytes_received+state.Bytes_acked), state.State == stateClose
		}
	})
	return moved, reset
}
