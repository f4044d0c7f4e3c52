package exchange

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// frameLimit is how long one answer may take from its first byte to its last,
	// and how long the server may take no bytes. The longest answer, 64 KiB, needs
	// 260 kbit/s.
	frameLimit = 2 * time.Second

	// maxUnsent bounds the queries that a connection holds for a server that does
	// not read.
	maxUnsent = 256 << 10 // bytes

	// smallBuffer is what a connection holds for answers; it grows to maxMessage
	// for those that are longer, and only as their bytes arrive.
	smallBuffer = 4 << 10 // bytes

	lengthSize = 2 // bytes, before each message (RFC 1035 section 4.2.2)
)

// NewTCP returns a server that is asked over TCP (RFC 7766): queries are sent on
// kept connections without waiting for the answers to others, which may come in
// any order.
func NewTCP(name string, dial Dial, config Config) Server {
	return newTCP(name, dial, config)
}

func newTCP(name string, dial Dial, config Config) *pool {
	return newPool(name, func(ctx context.Context) (link, error) {
		conn, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		return newStream(conn, conn), nil
	}, config)
}

// NewTLS returns a server that is asked over TLS (RFC 7858), in the same way as
// over TCP. dial returns the connection without TLS; tlsConfig.ServerName is the
// name, or address, that the certificate must have. tlsConfig is not changed.
func NewTLS(name string, dial Dial, tlsConfig *tls.Config, config Config) Server {
	tlsConfig = clientTLS(tlsConfig, "dot") // the protocol's name at IANA
	return newPool(name, func(ctx context.Context) (link, error) {
		raw, conn, err := dialTLS(ctx, dial, tlsConfig)
		if err != nil {
			return nil, err
		}
		return newStream(conn, raw), nil
	}, config)
}

// clientTLS completes a copy of config. Sessions are resumed, which saves the
// server's certificate; TLS 1.2 is what RFC 8310 section 8.2 asks for at least.
func clientTLS(config *tls.Config, protocols ...string) *tls.Config {
	config = config.Clone()
	if config == nil {
		config = new(tls.Config)
	}
	if config.NextProtos == nil {
		config.NextProtos = protocols
	}
	if config.ClientSessionCache == nil {
		config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	}
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	return config
}

// dialTLS opens a connection and shakes hands on it.
func dialTLS(ctx context.Context, dial Dial, config *tls.Config) (raw net.Conn, conn *tls.Conn, err error) {
	raw, err = dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	conn = tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, nil, fmt.Errorf("TLS: %w", err)
	}
	return raw, conn, nil
}

var errCut = errors.New("the server closed the connection in the middle of an answer")

// stream is the link of messages with their length before them.
type stream struct {
	conn net.Conn
	raw  net.Conn // conn, or what is under its TLS

	writer  sync.WaitGroup
	pending chan struct{} // room for one: there is something in out
	ended   chan struct{} // closed when reading has ended

	mutex   sync.Mutex
	out     []byte    // queries that are not being sent yet
	deaf    bool      // nothing can be sent any more
	sending time.Time // when the write under way began; zero if there is none
	begun   time.Time // when the first byte of a partial answer came; zero if there is none
	begunID int       // its id, -1 while that is not known
	length  int       // its length as announced, bytes
}

func newStream(conn, raw net.Conn) *stream {
	return &stream{conn: conn, raw: raw, pending: make(chan struct{}, 1), ended: make(chan struct{})}
}

func (s *stream) room() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return !s.deaf && len(s.out) < maxUnsent
}

func (s *stream) send(_ *connection, id uint16, query []byte) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.out = binary.BigEndian.AppendUint16(s.out, uint16(len(query)))
	s.out = binary.BigEndian.AppendUint16(s.out, id)
	s.out = append(s.out, query[2:]...)
	select {
	case s.pending <- struct{}{}:
	default:
	}
}

// giveUp cannot take a query back.
func (s *stream) giveUp(uint16) {}

func (s *stream) partial() (id int, begun time.Time, ok bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.begunID, s.begun, !s.begun.IsZero()
}

func (s *stream) check(now time.Time) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	switch {
	case !s.begun.IsZero() && now.Sub(s.begun) > frameLimit:
		return fmt.Errorf("an answer of %d bytes, as announced, did not arrive within %s", s.length, frameLimit)
	case !s.sending.IsZero() && now.Sub(s.sending) > frameLimit:
		return fmt.Errorf("the server takes no bytes for %s", frameLimit)
	}
	return nil
}

// close does without TLS's farewell, for which the connection may have no room.
func (s *stream) close() { s.raw.Close() }

func (s *stream) wait() { s.writer.Wait() }

// serve reads answers, and has the queries sent meanwhile.
func (s *stream) serve(c *connection) error {
	s.writer.Go(s.write)
	defer close(s.ended)
	defer s.raw.Close()
	buffer := make([]byte, smallBuffer)
	have := 0
	for {
		n, err := s.conn.Read(buffer[have:])
		have += n
		taken, failure := s.feed(c, buffer[:have])
		switch {
		case failure != nil:
			return failure
		case err == io.EOF && taken < have:
			return errCut
		case err != nil:
			return err
		}
		have = copy(buffer, buffer[taken:have])
		if have == len(buffer) {
			buffer = append(buffer, make([]byte, min(len(buffer), lengthSize+maxMessage-len(buffer)))...)
		} else if have == 0 && len(buffer) > smallBuffer {
			buffer = make([]byte, smallBuffer)
		}
	}
}

// feed tells c the whole answers at the beginning of in, and returns how many bytes
// they were.
func (s *stream) feed(c *connection, in []byte) (taken int, err error) {
	for {
		rest := in[taken:]
		if len(rest) < lengthSize {
			break
		}
		length := int(binary.BigEndian.Uint16(rest))
		if length < headerSize {
			c.breaks()
			return taken, fmt.Errorf("%w: %d bytes announced", errMalformed, length)
		}
		if len(rest) < lengthSize+length {
			break
		}
		if err := c.answer(rest[lengthSize : lengthSize+length]); err != nil {
			return taken, err
		}
		taken += lengthSize + length
	}
	s.remember(in[taken:], taken > 0)
	return taken, nil
}

// remember takes note of a partial answer; fresh: it is not the one before.
func (s *stream) remember(part []byte, fresh bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if len(part) == 0 {
		s.begun = time.Time{}
		return
	}
	if fresh || s.begun.IsZero() {
		s.begun = time.Now()
	}
	s.begunID, s.length = -1, 0
	if len(part) >= lengthSize {
		s.length = int(binary.BigEndian.Uint16(part))
	}
	if len(part) >= lengthSize+2 {
		s.begunID = int(binary.BigEndian.Uint16(part[lengthSize:]))
	}
}

// write sends queries, as many at once as have gathered, until reading has ended.
func (s *stream) write() {
	var out []byte
	for {
		select {
		case <-s.pending:
		case <-s.ended:
			return
		}
		s.mutex.Lock()
		out, s.out = s.out, out[:0]
		s.sending = time.Now()
		s.mutex.Unlock()
		_, err := s.conn.Write(out)
		s.mutex.Lock()
		s.sending = time.Time{}
		s.deaf = err != nil
		s.mutex.Unlock()
		if err != nil {
			// Answers that have arrived are still read.
			s.raw.SetReadDeadline(time.Now().Add(frameLimit))
			return
		}
	}
}
