package relay_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// patience bounds every wait of a test; nothing of it passes in a good run.
const patience = 20 * time.Second

// stub is a session whose answers are given beforehand. Its zero value dials at
// once, nowhere.
type stub struct {
	peek   func(flight []byte, last bool) bool
	hop    relay.Hop
	refuse error
	closed func(relay.Outcome)

	connected func(netip.AddrPort, time.Duration)
	retry     func(relay.End, error) (relay.Hop, bool)
}

func (s *stub) Peek(flight []byte, last bool) bool { return s.peek != nil && s.peek(flight, last) }
func (s *stub) Route() (relay.Hop, error)          { return s.hop, s.refuse }
func (s *stub) Connected(address netip.AddrPort, took time.Duration) {
	if s.connected != nil {
		s.connected(address, took)
	}
}

func (s *stub) Retry(how relay.End, err error) (relay.Hop, bool) {
	if s.retry == nil {
		return relay.Hop{}, false
	}
	return s.retry(how, err)
}

func (s *stub) Closed(outcome relay.Outcome) { s.closed(outcome) }

// connect is a handshake of one question and one answer that ends in an empty line.
type connect struct{ answer []byte }

const (
	question = "CONNECT\r\n\r\n"
	granted  = "200 OK\r\n\r\n"
)

func (c *connect) Hello() []byte { return []byte(question) }

func (c *connect) Feed(in []byte) (out, rest []byte, done bool, err error) {
	c.answer = append(c.answer, in...)
	head, rest, done := bytes.Cut(c.answer, []byte("\r\n\r\n"))
	if done && !bytes.HasPrefix(head, []byte("200")) {
		return nil, nil, false, errors.New("refused: " + string(head))
	}
	return nil, rest, done, nil
}

// gateway is an engine under test.
type gateway struct {
	*relay.Engine
	address  string
	outcomes chan relay.Outcome
	stop     context.CancelFunc
	served   chan error
}

// start serves an engine whose flows get what session returns, with so many loops
// beside those of the configuration. At the end of the test it must have left
// neither goroutines nor descriptors.
func start(t *testing.T, loops int, config relay.Config, session func() *stub) *gateway {
	t.Helper()
	leaks(t)
	g := &gateway{outcomes: make(chan relay.Outcome, 10_000), served: make(chan error, 1)}
	address := "127.0.0.1:0"
	for range loops {
		socket, bound := listen(t, address)
		address = bound.String()
		config.Sockets = append(config.Sockets, []int{socket})
	}
	g.address = address
	if config.Accept == nil {
		config.Accept = func(_, _ netip.AddrPort) relay.Session {
			s := session()
			s.closed = func(outcome relay.Outcome) { g.outcomes <- outcome }
			return s
		}
	}
	engine, err := relay.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	g.Engine = engine
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	go func() { g.served <- engine.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-g.served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Error("Serve does not return")
		}
		if stats := engine.Stats(); stats.Flows != 0 || stats.Pipes != 0 {
			t.Errorf("after the end: %+v", stats)
		}
	})
	return g
}

// listen returns a listening socket as the engine wants it.
func listen(t *testing.T, address string) (int, netip.AddrPort) {
	t.Helper()
	addr := netip.MustParseAddrPort(address)
	family, bound := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(addr.Port())})
	if addr.Addr().Is6() {
		family, bound = unix.AF_INET6, &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
	}
	socket, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	check(t, unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	check(t, unix.Bind(socket, bound))
	check(t, unix.Listen(socket, 4096))
	name, err := unix.Getsockname(socket)
	check(t, err)
	port := 0
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		port = name.Port
	case *unix.SockaddrInet6:
		port = name.Port
	}
	return socket, netip.AddrPortFrom(addr.Addr(), uint16(port))
}

// outcome is the next flow to end.
func (g *gateway) outcome(t *testing.T) relay.Outcome {
	t.Helper()
	select {
	case outcome := <-g.outcomes:
		return outcome
	case <-time.After(patience):
		t.Fatal("no flow ends")
		return relay.Outcome{}
	}
}

// dial connects to the gateway.
func (g *gateway) dial(t *testing.T) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", g.address, patience)
	check(t, err)
	return prepare(t, conn)
}

// expectRefused connects and is reset, perhaps before the connect returns.
func (g *gateway) expectRefused(t *testing.T) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", g.address, patience)
	if errors.Is(err, unix.ECONNRESET) {
		return
	}
	check(t, err)
	expectReset(t, prepare(t, conn))
}

// peer is a server that hands out its connections.
type peer struct {
	net.Listener
	address netip.AddrPort
}

func listenPeer(t *testing.T) peer {
	t.Helper()
	leaks(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { listener.Close() })
	return peer{listener, netip.MustParseAddrPort(listener.Addr().String())}
}

// next is the next connection to the peer.
func (p peer) next(t *testing.T) *net.TCPConn {
	t.Helper()
	p.Listener.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	conn, err := p.Accept()
	check(t, err)
	return prepare(t, conn)
}

// to is a session that goes to the peer at once.
func (p peer) to() *stub { return &stub{hop: relay.Hop{Addrs: []netip.AddrPort{p.address}}} }

// through is the same with a handshake.
func (p peer) through() *stub {
	s := p.to()
	s.hop.Handshake = new(connect)
	return s
}

// grant takes the question of the handshake and answers it.
func grant(t *testing.T, conn net.Conn, answer string) {
	t.Helper()
	expect(t, conn, question)
	send(t, conn, answer)
}

// ways are the two kinds of route that most tests take.
func ways(t *testing.T, run func(t *testing.T, session func(peer) func() *stub, open func(*testing.T, net.Conn))) {
	t.Run("direct", func(t *testing.T) {
		run(t, func(p peer) func() *stub { return p.to }, func(*testing.T, net.Conn) {})
	})
	t.Run("handshake", func(t *testing.T) {
		run(t, func(p peer) func() *stub { return p.through }, func(t *testing.T, conn net.Conn) { grant(t, conn, granted) })
	})
}

func prepare(t *testing.T, conn net.Conn) *net.TCPConn {
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

func send(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	_, err := conn.Write([]byte(text))
	check(t, err)
}

func expect(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if n, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got[:n], err, text)
	}
}

// expectEnd reads to the end, which must be a FIN.
func expectEnd(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if got, err := io.ReadAll(conn); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q and a FIN", got, err, text)
	}
}

// expectReset reads to the end, which must be a reset.
func expectReset(t *testing.T, conn net.Conn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, conn); !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("%d bytes, then %v; want a reset", n, err)
	}
}

// reset closes a connection by a reset.
func reset(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	check(t, conn.SetLinger(0))
	check(t, conn.Close())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so: %s", what)
		}
	}
}

// guarded are the tests that leaks watches already.
var guarded sync.Map

// leaks makes the test fail if it leaves goroutines or descriptors behind. It has
// to be called before anything is opened.
func leaks(t *testing.T) {
	if _, twice := guarded.LoadOrStore(t, true); twice {
		return
	}
	warmUp(t)
	goroutines, before := runtime.NumGoroutine(), descriptors()
	t.Cleanup(func() {
		guarded.Delete(t)
		var after map[string]string
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			after = descriptors()
			if runtime.NumGoroutine() <= goroutines && len(after) <= len(before) {
				return
			}
			if time.Now().After(deadline) {
				break
			}
		}
		for fd := range before {
			delete(after, fd)
		}
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		t.Errorf("left behind: descriptors %v; %d goroutines, before %d:\n%s",
			after, runtime.NumGoroutine(), goroutines, stacks)
	})
}

// warmUp makes the runtime open what it keeps for good: its own epoll instance.
func warmUp(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	listener.Close()
}

// descriptors returns the open descriptors of the process and what they are.
func descriptors() map[string]string {
	open := make(map[string]string)
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			open[entry.Name()] = target
		}
	}
	return open
}
