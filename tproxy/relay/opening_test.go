package relay_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// TestPeek gives the session every byte, whatever the segments, and the hop the
// same bytes again.
func TestPeek(t *testing.T) {
	p := listenPeer(t)
	type call struct {
		flight string
		last   bool
	}
	calls := make(chan call, 100)
	g := start(t, 1, relay.Config{}, func() *stub {
		s := p.through()
		s.peek = func(flight []byte, last bool) bool {
			calls <- call{string(flight), last}
			return !strings.Contains(string(flight), "!") && len(calls) < cap(calls)
		}
		return s
	})

	t.Run("until it has enough", func(t *testing.T) {
		conn := g.dial(t)
		flight := ""
		for _, piece := range []string{"", "hel", "lo!"} {
			send(t, conn, piece)
			flight += piece
			if got := <-calls; got != (call{flight, false}) {
				t.Fatalf("peeked at %+v, want %q", got, flight)
			}
		}
		up := p.next(t)
		send(t, conn, " more")
		grant(t, up, granted+"welcome")
		expect(t, up, "hello! more")
		expect(t, conn, "welcome")
		conn.CloseWrite()
		up.CloseWrite()
		if outcome := g.outcome(t); outcome.Sent != 11 || outcome.Received != 7 || outcome.Address != p.address {
			t.Errorf("%+v", outcome)
		}
	})
	t.Run("until the client ends", func(t *testing.T) {
		conn := g.dial(t)
		<-calls
		send(t, conn, "half")
		if got := <-calls; got != (call{"half", false}) {
			t.Fatalf("peeked at %+v", got)
		}
		check(t, conn.CloseWrite())
		if got := <-calls; got != (call{"half", true}) {
			t.Fatalf("peeked at %+v", got)
		}
		up := p.next(t)
		grant(t, up, granted)
		expectEnd(t, up, "half")
		send(t, up, "whole")
		check(t, up.CloseWrite())
		expectEnd(t, conn, "whole")
		g.outcome(t)
	})
	t.Run("until there is too much", func(t *testing.T) {
		conn := g.dial(t)
		<-calls
		text := strings.Repeat("x", 5*relay.MaxFlight)
		go io.WriteString(conn, text)
		for {
			got := <-calls
			if len(got.flight) > relay.MaxFlight || got.last != (len(got.flight) == relay.MaxFlight) {
				t.Fatalf("peeked at %d bytes, last %t", len(got.flight), got.last)
			}
			if got.last {
				break
			}
		}
		up := p.next(t)
		grant(t, up, granted)
		expect(t, up, text)
	})
}

// TestAbandoned: a client that closes without a word is not routed, one that was
// not to be peeked at is.
func TestAbandoned(t *testing.T) {
	p := listenPeer(t)
	silent := start(t, 1, relay.Config{}, func() *stub {
		s := p.to()
		s.peek = func([]byte, bool) bool { return true }
		return s
	})
	conn := silent.dial(t)
	check(t, conn.CloseWrite())
	expectEnd(t, conn, "")
	if outcome := silent.outcome(t); outcome.End != relay.Abandoned || outcome.Address.IsValid() {
		t.Errorf("%+v", outcome)
	}

	server := start(t, 1, relay.Config{}, p.through)
	conn = server.dial(t)
	check(t, conn.CloseWrite())
	up := p.next(t)
	grant(t, up, granted+"220 ready")
	expectEnd(t, up, "")
	check(t, up.CloseWrite())
	expectEnd(t, conn, "220 ready")
}

// TestHandshake covers how bytes of the two sides mix with those of the handshake.
func TestHandshake(t *testing.T) {
	p := listenPeer(t)
	g := start(t, 1, relay.Config{}, p.through)

	t.Run("bytes with the answer", func(t *testing.T) {
		conn := g.dial(t)
		up := p.next(t)
		grant(t, up, granted+"banner")
		check(t, up.CloseWrite())
		expectEnd(t, conn, "banner")
	})
	t.Run("bytes before the answer", func(t *testing.T) {
		conn := g.dial(t)
		text := strings.Repeat("early ", 100_000)
		go io.WriteString(conn, text)
		up := p.next(t)
		expect(t, up, question)
		for _, piece := range granted {
			up.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
			if n, err := up.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("%d bytes of the client came before the answer was complete: %v", n, err)
			}
			send(t, up, string(piece))
		}
		up.SetReadDeadline(time.Now().Add(patience))
		expect(t, up, text)
	})
	for name, answer := range map[string]string{"refusal": "407 no\r\n\r\n", "end": "20"} {
		t.Run(name, func(t *testing.T) {
			drain(g)
			conn := g.dial(t)
			up := p.next(t)
			grant(t, up, answer)
			up.CloseWrite()
			expectReset(t, conn)
			expectGone(t, up)
			outcome := g.outcome(t)
			if outcome.End != relay.HandshakeFailed || !strings.Contains(outcome.Err.Error(), p.address.String()) {
				t.Errorf("%+v", outcome)
			}
		})
	}
	t.Run("client gone", func(t *testing.T) {
		drain(g)
		conn := g.dial(t)
		up := p.next(t)
		expect(t, up, question)
		reset(t, conn)
		expectReset(t, up)
		if outcome := g.outcome(t); outcome.End != relay.ClientFailed || !errors.Is(outcome.Err, unix.ECONNRESET) {
			t.Errorf("%+v", outcome)
		}
	})
}

// long is a handshake of many and large messages, the first of which is a part of
// something that it goes on to use.
type long struct {
	left     int
	template [2 * longPart]byte
}

const longPart = 1 << 20 // bytes: more than a socket takes at once

func (h *long) Hello() []byte { return h.template[:longPart] }

func (h *long) Feed(in []byte) (out, rest []byte, done bool, err error) {
	if h.left--; h.left == 0 {
		return []byte("bye"), in[1:], true, nil
	}
	return bytes.Repeat([]byte{byte(h.left)}, longPart), nil, false, nil
}

// TestLongHandshake: messages that the socket does not take at once, and a last
// word together with the end.
func TestLongHandshake(t *testing.T) {
	p := listenPeer(t)
	handshake := &long{left: 3}
	g := start(t, 1, relay.Config{}, func() *stub {
		s := p.to()
		s.hop.Handshake = handshake
		return s
	})
	conn := g.dial(t)
	send(t, conn, "first")
	up := p.next(t)
	time.Sleep(20 * time.Millisecond)
	for _, message := range []string{"\x00", "\x02", "\x01"} {
		expect(t, up, strings.Repeat(message, longPart))
		send(t, up, "x")
	}
	expect(t, up, "byefirst")
	check(t, up.CloseWrite())
	expectEnd(t, conn, "")
	conn.Close()
	if handshake.template != [2 * longPart]byte{} {
		t.Error("the engine has written into a message")
	}
	if outcome := g.outcome(t); outcome.Sent != 5 || outcome.Received != 0 || outcome.End != relay.Orderly {
		t.Errorf("%+v", outcome)
	}
}

// TestConnect tries the addresses of a hop in order.
func TestConnect(t *testing.T) {
	p := listenPeer(t)
	closed := closedPort(t)
	mapped := netip.AddrPortFrom(netip.AddrFrom16(p.address.Addr().As16()), p.address.Port())
	for name, test := range map[string]struct {
		addrs []netip.AddrPort
		end   relay.End
		err   error
	}{
		"first":       {[]netip.AddrPort{p.address, closed}, relay.Orderly, nil},
		"second":      {[]netip.AddrPort{closed, p.address}, relay.Orderly, nil},
		"IPv4-mapped": {[]netip.AddrPort{mapped}, relay.Orderly, nil},
		"none":        {[]netip.AddrPort{closed, closed}, relay.ConnectFailed, unix.ECONNREFUSED},
		"no address":  {nil, relay.ConnectFailed, nil},
		"nonsense":    {[]netip.AddrPort{{}}, relay.ConnectFailed, nil},
		"zone":        {[]netip.AddrPort{netip.MustParseAddrPort("[fe80::1%nosuch]:1")}, relay.ConnectFailed, nil},
	} {
		t.Run(name, func(t *testing.T) {
			g := start(t, 1, relay.Config{}, func() *stub { return &stub{hop: relay.Hop{Addrs: test.addrs}} })
			if test.end == relay.Orderly {
				conn := g.dial(t)
				up := p.next(t)
				send(t, up, "hello")
				up.CloseWrite()
				expectEnd(t, conn, "hello")
				conn.Close()
			} else {
				g.expectRefused(t)
			}
			outcome := g.outcome(t)
			if outcome.End != test.end || test.err != nil && !errors.Is(outcome.Err, test.err) || (outcome.Err == nil) != (test.end == relay.Orderly) {
				t.Errorf("%+v", outcome)
			}
		})
	}
}

// TestSource binds outgoing connections; an address that is not there is the error
// of one attempt.
func TestSource(t *testing.T) {
	p := listenPeer(t)
	sources := []string{"192.0.2.1", "127.0.0.77"}
	g := start(t, 1, relay.Config{}, func() *stub {
		return &stub{hop: relay.Hop{
			Addrs: []netip.AddrPort{p.address, p.address},
			Source: func(netip.Addr) (source netip.Addr) {
				source, sources = netip.MustParseAddr(sources[0]), append(sources[1:], sources[0])
				return source
			},
		}}
	})
	conn := g.dial(t)
	if from := p.next(t).RemoteAddr().(*net.TCPAddr).IP.String(); from != "127.0.0.77" {
		t.Errorf("the connection comes from %s", from)
	}
	reset(t, conn)
	alone := start(t, 1, relay.Config{}, func() *stub {
		return &stub{hop: relay.Hop{
			Addrs:  []netip.AddrPort{p.address},
			Source: func(netip.Addr) netip.Addr { return netip.MustParseAddr("192.0.2.1") },
		}}
	})
	alone.expectRefused(t)
	if outcome := alone.outcome(t); !errors.Is(outcome.Err, unix.EADDRNOTAVAIL) {
		t.Errorf("%+v", outcome)
	}
}

// TestMark puts SO_MARK on outgoing connections.
func TestMark(t *testing.T) {
	leaks(t)
	probe, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	defer unix.Close(probe)
	denied := unix.SetsockoptInt(probe, unix.SOL_SOCKET, unix.SO_MARK, 1) != nil
	p := listenPeer(t)
	g := start(t, 1, relay.Config{Mark: 0x04000000}, p.to)
	if denied {
		g.expectRefused(t)
		if outcome := g.outcome(t); outcome.End != relay.ConnectFailed || !errors.Is(outcome.Err, unix.EPERM) {
			t.Errorf("%+v", outcome)
		}
		return
	}
	g.dial(t)
	p.next(t)
	marked := false
	for name := range descriptors() {
		fd, _ := strconv.Atoi(name)
		if mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK); err == nil && mark == 0x04000000 {
			marked = true
		}
	}
	if !marked {
		t.Error("no socket is marked")
	}
}

// TestRefused: clients that are not to be served get a reset.
func TestRefused(t *testing.T) {
	t.Run("by Accept", func(t *testing.T) {
		clients := make(chan netip.AddrPort, 2)
		g := start(t, 1, relay.Config{Accept: func(from, to netip.AddrPort) relay.Session {
			clients <- from
			clients <- to
			return nil
		}}, nil)
		g.expectRefused(t)
		if from, to := <-clients, <-clients; from.Addr().String() != "127.0.0.1" || to.String() != g.address {
			t.Errorf("accepted %s to %s", from, to)
		}
	})
	t.Run("by Route", func(t *testing.T) {
		why := errors.New("not for you")
		g := start(t, 1, relay.Config{}, func() *stub { return &stub{refuse: why} })
		g.expectRefused(t)
		if outcome := g.outcome(t); outcome.End != relay.RouteFailed || outcome.Err != why {
			t.Errorf("%+v", outcome)
		}
	})
	t.Run("by MaxFlows", func(t *testing.T) {
		p := listenPeer(t)
		g := start(t, 2, relay.Config{MaxFlows: 1}, p.to)
		first := g.dial(t)
		up := p.next(t)
		g.expectRefused(t)
		first.Close()
		up.Close()
		g.outcome(t)
		second := g.dial(t)
		send(t, p.next(t), "hello")
		expect(t, second, "hello")
		if stats := g.Stats(); stats.Refused != 1 || stats.Accepted != 2 || stats.Flows != 1 {
			t.Errorf("%+v", stats)
		}
	})
}

// TestDetach hands a client over with what it said.
func TestDetach(t *testing.T) {
	type handed struct {
		socket int
		flight string
	}
	taken := make(chan handed, 1)
	g := start(t, 1, relay.Config{MaxFlows: 1}, func() *stub {
		return &stub{
			peek: func(flight []byte, _ bool) bool { return len(flight) == 0 },
			hop:  relay.Hop{Detach: func(socket int, flight []byte) { taken <- handed{socket, string(flight)} }},
		}
	})
	for range 3 {
		conn := g.dial(t)
		send(t, conn, "hello")
		got := <-taken
		if got.flight != "hello" {
			t.Errorf("handed over with %q", got.flight)
		}
		send(t, conn, " world")
		file := os.NewFile(uintptr(got.socket), "client")
		text := make([]byte, 6)
		if _, err := io.ReadFull(file, text); err != nil || string(text) != " world" {
			t.Errorf("read %q, %v", text, err)
		}
		if g.Stats().Flows != 0 {
			t.Errorf("%+v", g.Stats())
		}
		file.Close()
		expectReset(t, conn)
	}
}

// TestIPv6 goes from IPv6 to IPv6.
func TestIPv6(t *testing.T) {
	leaks(t)
	server, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here: ", err)
	}
	defer server.Close()
	p := peer{server, netip.MustParseAddrPort(server.Addr().String())}
	socket, address := listen(t, "[::1]:0")
	g := start(t, 0, relay.Config{Sockets: [][]int{{socket}}}, p.through)
	g.address = address.String()
	conn := g.dial(t)
	grant(t, p.next(t), granted+"hello")
	expect(t, conn, "hello")
}

// closedPort is an address that refuses connections.
func closedPort(t *testing.T) netip.AddrPort {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer listener.Close()
	return netip.MustParseAddrPort(listener.Addr().String())
}

// expectGone waits until the other side has closed, in whichever way.
func expectGone(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
}

// drain forgets the outcomes of what ran before.
func drain(g *gateway) {
	for g.Stats().Flows > 0 {
		time.Sleep(time.Millisecond)
	}
	for len(g.outcomes) > 0 {
		<-g.outcomes
	}
}
