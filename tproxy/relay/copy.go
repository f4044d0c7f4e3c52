package relay

import (
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Copy carries what from sends to to, at most limit bytes; fewer without an error are all
// that came until the end. It is for connections that no engine carries. Between two of TCP
// the bytes go by splice(2), else through a buffer.
func Copy(to, from net.Conn, limit int64) (moved int64, err error) {
	toTCP, ok := to.(*net.TCPConn)
	fromTCP, both := from.(*net.TCPConn)
	if ok && both {
		return spliceAll(toTCP, fromTCP, limit)
	}
	buffer := make([]byte, copyBuffer)
	// Without ReadFrom and WriteTo, which would not use the buffer.
	return io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{io.LimitReader(from, limit)}, buffer)
}

// copyBuffer is the most that a record of TLS holds (RFC 8446 section 5.1).
const copyBuffer = 16 << 10 // bytes

// spliceAll is Copy by splice(2). Package net holds a pipe, of two descriptors, for as long
// as one of its copies lasts: so each of them is of what has arrived, and none waits for
// more.
func spliceAll(to, from *net.TCPConn, limit int64) (moved int64, err error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, err
	}
	var there arrival
	for moved < limit {
		if failure := raw.Read(there.look); failure != nil {
			return moved, failure
		}
		if there.err != nil {
			return moved, there.err
		}
		// At its end nothing has arrived, and a read of anything tells so.
		next := min(int64(max(there.bytes, 1)), limit-moved)
		var n int64
		if there.urgent {
			n, err = copyOnce(to, from, next)
		} else {
			n, err = to.ReadFrom(&io.LimitedReader{R: from, N: next})
		}
		moved += n
		if err != nil || n == 0 {
			return moved, err
		}
	}
	return moved, nil
}

// arrival is what waits in a socket.
type arrival struct {
	bytes  int  // 0 at the end
	urgent bool // there is urgent data, at whose mark splice(2) would stop for good
	err    error
}

// look reports whether there is anything to know about a socket, without waiting for it.
func (a *arrival) look(fd uintptr) (done bool) {
	for {
		if a.bytes, a.err = unix.IoctlGetInt(int(fd), unix.SIOCINQ); a.bytes > 0 || a.err != nil {
			// Looked at afterwards: a mark among these bytes is known then.
			events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
			unix.Poll(events, 0)
			a.urgent = events[0].Revents&unix.POLLPRI != 0
			return true
		}
		a.urgent = false
		// The end, a reset, or nothing yet. A reset is told once, so here if at all.
		var one [1]byte
		n, _, failure := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case failure == unix.EAGAIN:
			return false
		case failure == unix.EINTR:
		case n <= 0:
			a.err = failure
			return true
		}
	}
}

// copyOnce carries what one read gives.
func copyOnce(to, from *net.TCPConn, limit int64) (moved int64, err error) {
	var buffer [4 << 10]byte
	n, err := from.Read(buffer[:min(limit, int64(len(buffer)))])
	switch {
	case n > 0:
		n, err = to.Write(buffer[:n])
		return int64(n), err
	case err == io.EOF:
		return 0, nil
	}
	return 0, err
}
