package exchange_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// query returns a query of type A with the id 0xabcd.
func query(name string) []byte {
	message := []byte{0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for label := range strings.SplitSeq(name, ".") {
		message = append(message, byte(len(label)))
		message = append(message, label...)
	}
	return append(message, 0, 0, 1, 0, 1)
}

// firstLabel returns the first label of the name that query asks for, in lower case.
func firstLabel(query []byte) string {
	return strings.ToLower(string(query[13 : 13+query[12]]))
}

// answer returns an answer to query with one address and size bytes of TXT behind it.
func answer(query []byte, size int) []byte {
	message := bytes.Clone(query)
	message[2], message[3] = 0x81, 0x80
	message[7] = 1
	message = append(message, 0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 0, 0, 4, 192, 0, 2, 1)
	if size > 0 {
		message[7] = 2
		message = append(message, 0xc0, 12, 0, 16, 0, 1, 0, 0, 1, 0)
		message = binary.BigEndian.AppendUint16(message, uint16(size))
		message = append(message, make([]byte, size)...)
	}
	return message
}

// withRcode returns an answer to query without records.
func withRcode(query []byte, rcode byte) []byte {
	message := bytes.Clone(query)
	message[2], message[3] = 0x81, 0x80|rcode
	return message
}

// framed returns messages with their lengths before them.
func framed(messages ...[]byte) []byte {
	var stream []byte
	for _, message := range messages {
		stream = binary.BigEndian.AppendUint16(stream, uint16(len(message)))
		stream = append(stream, message...)
	}
	return stream
}

// readQuery reads one query from a stream.
func readQuery(conn net.Conn) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(conn, message)
	return message, err
}

// peer is one connection of a stand-in server.
type peer struct {
	net.Conn
	number int // of connections before it
	mutex  sync.Mutex
}

// send writes messages with their lengths in one piece.
func (p *peer) send(messages ...[]byte) { p.raw(framed(messages...)) }

func (p *peer) raw(stream []byte) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.Write(stream)
}

// standIn is a server of streams on loopback. handle is called for each query, on a
// goroutine of its own unless serial is set.
type standIn struct {
	handle   func(p *peer, query []byte)
	serial   bool
	accepted atomic.Int64 // connections
	asked    atomic.Int64 // queries
	dials    atomic.Int64
	delay    time.Duration                // of each dial
	wrap     func(conn net.Conn) net.Conn // of accepted connections

	address  string
	listener net.Listener
	running  sync.WaitGroup
	mutex    sync.Mutex
	open     map[net.Conn]bool
}

// start serves until the test ends.
func (s *standIn) start(t testing.TB) *standIn {
	t.Helper()
	s.listen(t)
	t.Cleanup(s.stop)
	return s
}

// listen serves, at the same address if it did before.
func (s *standIn) listen(t testing.TB) {
	t.Helper()
	if s.address == "" {
		s.address = "127.0.0.1:0"
	}
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	s.address, s.listener = listener.Addr().String(), listener
	s.open = make(map[net.Conn]bool)
	s.running.Go(s.accept)
}

// stop closes everything and waits.
func (s *standIn) stop() {
	s.listener.Close()
	s.hangUp()
	s.running.Wait()
}

// hangUp closes the connections that are open.
func (s *standIn) hangUp() {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for conn := range s.open {
		conn.Close()
	}
}

func (s *standIn) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mutex.Lock()
		s.open[conn] = true
		s.mutex.Unlock()
		p := &peer{Conn: conn, number: int(s.accepted.Add(1) - 1)}
		if s.wrap != nil {
			p.Conn = s.wrap(conn)
		}
		s.running.Go(func() {
			s.serve(p)
			conn.Close()
			s.mutex.Lock()
			delete(s.open, conn)
			s.mutex.Unlock()
		})
	}
}

func (s *standIn) serve(p *peer) {
	var handling sync.WaitGroup
	defer handling.Wait()
	for {
		query, err := readQuery(p)
		if err != nil {
			return
		}
		s.asked.Add(1)
		if s.serial {
			s.handle(p, query)
		} else {
			handling.Go(func() { s.handle(p, query) })
		}
	}
}

func (s *standIn) dial(ctx context.Context) (net.Conn, error) {
	s.dials.Add(1)
	if s.delay > 0 {
		select {
		case <-time.After(s.delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return new(net.Dialer).DialContext(ctx, "tcp", s.address)
}

// closed makes the test close the server at its end, before what it talks to.
func closed[S interface{ Close() }](t testing.TB, server S) S {
	t.Cleanup(server.Close)
	return server
}

// wantGoroutines fails the test if at its end there are more goroutines than now. It
// is called first.
func wantGoroutines(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(5 * time.Second)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
			}
			runtime.Gosched() // those of net/http end by themselves
			time.Sleep(time.Millisecond)
		}
	})
}

// ask asks for an address and checks the answer.
func ask(server interface {
	Exchange(context.Context, []byte) ([]byte, error)
}, ctx context.Context, name string,
) error {
	q := query(name)
	got, err := server.Exchange(ctx, q)
	if err != nil {
		return err
	}
	if !bytes.Equal(q, query(name)) {
		return fmt.Errorf("%s: the query was changed to %x", name, q)
	}
	if want := answer(q, 0); !bytes.Equal(got, want) {
		return fmt.Errorf("%s: answer %x, want %x", name, got[:min(len(got), 100)], want)
	}
	return nil
}

// askAll asks for n names at once and returns the errors.
func askAll(server exchange.Server, ctx context.Context, n int, name func(int) string) []error {
	errs := make([]error, n)
	var asking sync.WaitGroup
	for i := range n {
		asking.Go(func() { errs[i] = ask(server, ctx, name(i)) })
	}
	asking.Wait()
	return errs
}

func within(t testing.TB, limit time.Duration, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if took := time.Since(start); took > limit {
		t.Errorf("%s took %s, more than %s", what, took, limit)
	}
}
