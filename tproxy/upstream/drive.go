package upstream

import (
	"fmt"
	"io"
	"net"
)

// replyBuffer holds the usual reply to a CONNECT (40 to 200 bytes) and a 407 with
// its challenges.
const replyBuffer = 2 << 10 // bytes

// Drive runs a handshake on conn and returns what conn sent beyond it: the first
// bytes of the tunnel. It neither sets a deadline nor closes conn; both are the
// caller's. A connection that ends too early is io.ErrUnexpectedEOF.
func Drive(conn net.Conn, h Handshake) (rest []byte, err error) {
	buffer := make([]byte, replyBuffer)
	out, done := h.Hello(), false
	for {
		if len(out) > 0 {
			if _, err := conn.Write(out); err != nil {
				return nil, fmt.Errorf("send the request: %w", err)
			}
			out = nil
		}
		if done {
			if len(rest) == 0 {
				return nil, nil // not to keep the buffer
			}
			return rest, nil
		}
		n, failure := conn.Read(buffer)
		if n > 0 { // perhaps with an error (io.Reader)
			if out, rest, done, err = h.Feed(buffer[:n]); err != nil {
				return nil, err
			}
		}
		if failure == nil || done {
			continue
		}
		if failure == io.EOF {
			failure = fmt.Errorf("the proxy closed the connection: %w", io.ErrUnexpectedEOF)
		}
		return nil, fmt.Errorf("wait for the proxy's answer: %w", failure)
	}
}
