package forward

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// bufferSize is what is read or gathered at once. Nearly all heads fit, and of those
// that carry a page its beginning.
const bufferSize = 16 << 10 // bytes

// sourceError is a failure of the connection that a body comes from, or of what it
// brought, as opposed to one of the connection that it goes to.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// stream is the reading side of a connection. Its buffer comes with the first byte
// and goes with the last, so that one which waits holds none.
type stream struct {
	conn    upstream.Conn
	buffers *sync.Pool

	held       *[]byte // what goes back to the pool; nil if buffer is none of its
	buffer     []byte
	start, end int // of what was read and not yet taken

	raw  syscall.RawConn
	try  func(fd uintptr) (done bool)
	last error // of try
}

// take returns a buffer.
func take(buffers *sync.Pool) *[]byte {
	if buffer, ok := buffers.Get().(*[]byte); ok {
		return buffer
	}
	buffer := make([]byte, bufferSize)
	return &buffer
}

// preload puts what was read of the connection before into the buffer.
func (s *stream) preload(flight []byte) {
	s.hold(take(s.buffers))
	if len(flight) > len(s.buffer) {
		s.buffer, s.held = append([]byte(nil), flight...), nil
	}
	s.end = copy(s.buffer, flight)
}

func (s *stream) hold(buffer *[]byte) { s.held, s.buffer = buffer, *buffer }

// buffered is what was read and not yet taken. It is valid until the next read.
func (s *stream) buffered() []byte { return s.buffer[s.start:s.end] }

// skip takes n bytes; they stay readable until the next read.
func (s *stream) skip(n int) { s.start += n }

// release gives an empty buffer back.
func (s *stream) release() {
	if s.start < s.end {
		return
	}
	if s.held != nil {
		s.buffers.Put(s.held)
	}
	s.held, s.buffer, s.start, s.end = nil, nil, 0, 0
}

// fill reads what there is, behind what is buffered. A full buffer grows.
func (s *stream) fill() error {
	if s.start == s.end {
		s.release()
		return s.fillEmpty()
	}
	switch {
	case s.end < len(s.buffer):
	case s.start > 0:
		s.end = copy(s.buffer, s.buffered())
		s.start = 0
	default:
		grown := make([]byte, 2*len(s.buffer))
		s.end = copy(grown, s.buffered())
		s.start = 0
		if s.held != nil {
			s.buffers.Put(s.held)
		}
		s.held, s.buffer = nil, grown
	}
	n, err := s.conn.Read(s.buffer[s.end:])
	s.end += n
	if n > 0 {
		return nil
	}
	return err
}

// fillEmpty waits without a buffer, and takes one when there is something to read.
func (s *stream) fillEmpty() error {
	tcp, ok := s.conn.(*net.TCPConn)
	if !ok {
		return s.fillHeld()
	}
	if s.raw == nil {
		raw, err := tcp.SyscallConn()
		if err != nil {
			return err
		}
		s.raw, s.try = raw, s.tryRead
	}
	if err := s.raw.Read(s.try); err != nil {
		return err
	}
	return s.last
}

// fillHeld waits with a buffer, for a connection whose bytes are not those of its socket.
func (s *stream) fillHeld() error {
	s.hold(take(s.buffers))
	n, err := s.conn.Read(s.buffer)
	if n > 0 {
		s.end = n
		return nil
	}
	s.release()
	return err
}

// tryRead reads if that does not have to wait.
func (s *stream) tryRead(fd uintptr) (done bool) {
	buffer := take(s.buffers)
	var n int
	for {
		n, s.last = unix.Read(int(fd), *buffer)
		if s.last != unix.EINTR {
			break
		}
	}
	if n > 0 {
		s.hold(buffer)
		s.end = n
		return true
	}
	s.buffers.Put(buffer)
	if s.last == nil {
		s.last = io.EOF
	}
	return s.last != unix.EAGAIN
}

// more waits for the next bytes of a body, after what waits in to has gone out.
func (s *stream) more(to *sink) ([]byte, error) {
	if err := to.flush(); err != nil {
		return nil, err
	}
	if err := s.fill(); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, sourceError{err}
	}
	return s.buffered(), nil
}

// line waits for a whole line of at most limit bytes and returns it without the CRLF
// at its end, which is not taken.
func (s *stream) line(to *sink, limit int) ([]byte, error) {
	looked := 0
	for {
		text := s.buffered()
		if newline := bytes.IndexByte(text[looked:], '\n'); newline >= 0 {
			newline += looked
			if newline < 1 || text[newline-1] != '\r' || bytes.IndexByte(text[:newline-1], '\r') >= 0 {
				return nil, sourceError{errChunk}
			}
			return text[:newline-1], nil
		}
		if looked = len(text); looked > limit {
			return nil, sourceError{errChunk}
		}
		if _, err := s.more(to); err != nil {
			return nil, err
		}
	}
}

// head waits for a whole head and returns it, with its empty line. Without any byte of
// it the end of the connection is io.EOF.
func (s *stream) head() ([]byte, error) {
	looked := 0
	for {
		text := s.buffered()
		if end := endOfHead(text, looked); end > maxHead {
			return nil, errHeadTooLong
		} else if end > 0 {
			return text[:end], nil
		}
		if looked = len(text); looked > maxHead {
			return nil, errHeadTooLong
		}
		if err := s.fill(); err != nil {
			if err == io.EOF && looked > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// quiet reports whether the connection is open and nothing has arrived on it.
func (s *stream) quiet() bool {
	if s.start < s.end {
		return false
	}
	return peek(s.conn) == unix.EAGAIN
}

// peek looks whether there is something to read: nil if so, or if that cannot be known
// without a read; EAGAIN if not, else why there will be nothing.
func peek(conn upstream.Conn) error {
	below, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := below.SyscallConn()
	if err != nil {
		return err
	}
	failure := raw.Control(func(fd uintptr) {
		var one [1]byte
		var n int
		if n, _, err = unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK|unix.MSG_DONTWAIT); err == nil && n == 0 {
			err = io.EOF
		}
	})
	if failure != nil {
		return failure
	}
	return err
}

// sink is the writing side of a connection. It gathers what is short, so that a head
// and the beginning of a body leave together; flush sends it.
type sink struct {
	conn    upstream.Conn
	buffers *sync.Pool

	held    *[]byte
	pending []byte
}

// gather returns what is pending, to be appended to and given to set.
func (s *sink) gather() []byte {
	if s.pending == nil {
		s.held = take(s.buffers)
		s.pending = (*s.held)[:0]
	}
	return s.pending
}

func (s *sink) set(pending []byte) { s.pending = pending }

// write sends data at last; it may wait for flush.
func (s *sink) write(data []byte) error {
	if pending := s.gather(); len(pending)+len(data) <= cap(pending) {
		s.pending = append(pending, data...)
		return nil
	}
	both := net.Buffers{s.pending, data}
	_, err := both.WriteTo(s.conn)
	s.release()
	return err
}

// flush sends what is pending.
func (s *sink) flush() error {
	var err error
	if len(s.pending) > 0 {
		_, err = s.conn.Write(s.pending)
	}
	s.release()
	return err
}

// release gives the buffer back, and forgets what is in it.
func (s *sink) release() {
	if s.held != nil {
		s.buffers.Put(s.held)
	}
	s.held, s.pending = nil, nil
}

// readFrom carries at most n bytes from a connection, by splice(2) if it can be, and stops
// early only at its end.
func (s *sink) readFrom(from upstream.Conn, n int64) (moved int64, err error) {
	if err := s.flush(); err != nil {
		return 0, err
	}
	moved, err = relay.Copy(s.conn, from, n)
	if err != nil {
		// The kernel does not say which side it was.
		if reason := peek(from); reason != nil && !errors.Is(reason, unix.EAGAIN) {
			return moved, sourceError{err}
		}
		return moved, fmt.Errorf("splice: %w", err)
	}
	return moved, nil
}
