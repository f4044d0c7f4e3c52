package upstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

var target = upstream.Target{Host: "example.org", Port: 443}

func dialer() *upstream.Dialer {
	return &upstream.Dialer{ConnectTimeout: 5 * time.Second, HandshakeTimeout: 5 * time.Second}
}

// TestTunnel: bytes in the segment of the answer are kept, and afterwards the
// connection is plain, without a deadline.
func TestTunnel(t *testing.T) {
	const early = "220 mail.example.org ESMTP\r\n"
	p := startProxy(t, "HTTP/1.1 200 OK\r\n\r\n"+early)
	d := dialer()
	d.HandshakeTimeout = 200 * time.Millisecond
	var sockets atomic.Int64
	d.Control = func(network, address string, c syscall.RawConn) error {
		if !strings.HasPrefix(network, "tcp") || !strings.HasSuffix(address, fmt.Sprint(":", p.port())) {
			t.Errorf("control of %s %s", network, address)
		}
		sockets.Add(1)
		return nil
	}
	for _, host := range []string{"127.0.0.1", "localhost"} {
		conn, rest, err := d.Tunnel(t.Context(), p.parse(t, "user:right", host), target)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if string(rest) != early {
			t.Errorf("rest %q", rest)
		}
		time.Sleep(2 * d.HandshakeTimeout)
		io.WriteString(conn, "ping")
		answer := make([]byte, 4)
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "ping" {
			t.Errorf("answer %q, error %v", answer, err)
		}
		wantPlainTCP(t, conn.(*net.TCPConn))
	}
	if _, asked := p.targets.Load("example.org:443"); !asked {
		t.Error("the proxy was asked for something else")
	}
	if sockets.Load() < 2 {
		t.Errorf("%d sockets were controlled", sockets.Load())
	}
}

// wantPlainTCP looks at the options of a socket.
func wantPlainTCP(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if protocol, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || protocol != unix.IPPROTO_TCP {
			t.Errorf("protocol %d, %v", protocol, err)
		}
		if idle, err := unix.GetsockoptInt(int(fd), unix.SOL_TCP, unix.TCP_KEEPIDLE); err != nil || idle != 120 {
			t.Errorf("keep-alive after %d s, %v", idle, err)
		}
	})
}

func TestDirect(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	d := dialer()
	controlled := false
	d.Control = func(string, string, syscall.RawConn) error { controlled = true; return nil }
	port := uint16(listener.Addr().(*net.TCPAddr).Port)
	for _, address := range []string{"127.0.0.1", "::ffff:127.0.0.1"} {
		conn, err := d.Direct(t.Context(), netip.AddrPortFrom(netip.MustParseAddr(address), port))
		if err != nil {
			t.Fatal(err)
		}
		wantPlainTCP(t, conn)
		conn.Close()
	}
	if !controlled {
		t.Error("the socket was not controlled")
	}
	listener.Close()
	if _, err := d.Direct(t.Context(), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("error %v", err)
	}
	d.Control = func(string, string, syscall.RawConn) error { return syscall.EPERM }
	if _, err := d.Direct(t.Context(), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)); !errors.Is(err, syscall.EPERM) {
		t.Errorf("error %v", err)
	}
}

// TestWrongPassword: of 50 flows at once one is refused by the proxy, and nothing
// more is sent until Reset.
func TestWrongPassword(t *testing.T) {
	p := startProxy(t, "")
	p.delay = 50 * time.Millisecond
	d, wrong := dialer(), p.parse(t, "user:wr0ng", "127.0.0.1")
	round := func() (answered, silent int64) {
		var a, s atomic.Int64
		var flows sync.WaitGroup
		for range 50 {
			flows.Go(func() {
				conn, _, err := d.Tunnel(t.Context(), wrong, target)
				var refused *upstream.RefusedError
				switch {
				case errors.As(err, &refused) && refused.Code == 407 && upstream.Denied(err):
					a.Add(1)
				case errors.Is(err, upstream.ErrCredentialRefused):
					s.Add(1)
				default:
					t.Errorf("connection %v, error %v", conn, err)
				}
				if text := fmt.Sprint(err); strings.Contains(text, "wr0ng") || strings.Contains(text, "\n") {
					t.Errorf("error %q", text)
				}
			})
		}
		flows.Wait()
		return a.Load(), s.Load()
	}
	for range 2 {
		if answered, silent := round(); answered != 1 || silent != 49 {
			t.Errorf("%d were refused by the proxy, %d without asking it", answered, silent)
		}
		if answered, silent := round(); answered != 0 || silent != 50 {
			t.Errorf("later %d were refused by the proxy, %d without asking it", answered, silent)
		}
		wrong.Reset()
	}
	if p.requests.Load() != 2 || p.denials.Load() != 2 {
		t.Errorf("the proxy saw %d requests and denied %d, want 2", p.requests.Load(), p.denials.Load())
	}
}

// TestRightPassword: 50 flows at once all get through.
func TestRightPassword(t *testing.T) {
	p := startProxy(t, "HTTP/1.1 200 OK\r\n\r\n")
	d, right := dialer(), p.parse(t, "user:right", "127.0.0.1")
	var flows sync.WaitGroup
	for range 50 {
		flows.Go(func() {
			conn, _, err := d.Tunnel(t.Context(), right, target)
			if err != nil {
				t.Error(err)
				return
			}
			conn.Close()
		})
	}
	flows.Wait()
}

// TestHandshakeBlackHole: a proxy that takes the connection and says nothing.
func TestHandshakeBlackHole(t *testing.T) {
	p := startProxy(t, "")
	d := dialer()
	d.HandshakeTimeout = 100 * time.Millisecond
	silent := p.parse(t, "user:right", "127.0.0.1")
	start := time.Now()
	_, _, err := d.Tunnel(t.Context(), silent, target)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() || !strings.Contains(err.Error(), "no answer within 100ms") {
		t.Errorf("error %v", err)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %s", took)
	}

	// It said nothing about the credential.
	if _, ok, err := try(silent); !ok || err != nil {
		t.Errorf("ok %v, error %v", ok, err)
	}
}

// TestCancelled: whatever a flow waits for, it ends with its context.
func TestCancelled(t *testing.T) {
	p := startProxy(t, "")
	hole := blackHole(t, loopbackPort)
	waiting := p.parse(t, "user:right", "127.0.0.1")
	lease, _, _ := try(waiting)
	defer lease.Settle(context.Canceled)
	for name, proxy := range map[string]*upstream.Proxy{
		"connect":   parse(t, hole.String()),
		"turn":      waiting,
		"handshake": p.parse(t, "user:right", "127.0.0.1"),
	} {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		start := time.Now()
		_, _, err := dialer().Tunnel(ctx, proxy, target)
		if took := time.Since(start); !errors.Is(err, context.Canceled) || took > time.Second {
			t.Errorf("%s: error %v after %s", name, err, took)
		}
	}
}

func parse(t *testing.T, raw string) *upstream.Proxy {
	t.Helper()
	proxy, err := parseBasic(raw)
	if err != nil {
		t.Fatal(err)
	}
	return proxy
}

// TestConnectBlackHole: nobody answers the SYN.
func TestConnectBlackHole(t *testing.T) {
	d := dialer()
	d.ConnectTimeout = 100 * time.Millisecond
	hole := blackHole(t, loopbackPort)
	for name, dial := range map[string]func() error{
		"tunnel": func() error { _, _, err := d.Tunnel(t.Context(), parse(t, hole.String()), target); return err },
		"direct": func() error { _, err := d.Direct(t.Context(), hole); return err },
	} {
		start := time.Now()
		err := dial()
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s: error %v", name, err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s: took %s", name, took)
		}
	}
}

func TestDeadProxy(t *testing.T) {
	p := startProxy(t, "")
	p.listener.Close()
	_, _, err := dialer().Tunnel(t.Context(), p.parse(t, "user:right", "127.0.0.1"), target)
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.HasPrefix(err.Error(), "tunnel to example.org:443 through http://127.0.0.1:") {
		t.Errorf("error %v", err)
	}
	// "dial tcp :0->..." is the mark of a socket that was bound before its connect:
	// every port in use towards anybody would be out of its reach.
	if strings.Contains(fmt.Sprint(err), "->") {
		t.Errorf("the socket has a source address: %v", err)
	}
}

func TestHostileTargetIsNotDialled(t *testing.T) {
	p := startProxy(t, "")
	d := dialer()
	d.Control = func(string, string, syscall.RawConn) error {
		t.Error("a socket for a target that cannot be asked for")
		return nil
	}
	_, _, err := d.Tunnel(t.Context(), p.parse(t, "user:right", "127.0.0.1"), upstream.Target{Host: "a\r\nb", Port: 1})
	if err == nil || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q", err)
	}
}

// Addresses of a proxy's name, in the order in which they were looked up.
var (
	deadAddress = netip.MustParseAddr("127.0.0.2")
	liveAddress = netip.MustParseAddr("127.0.0.1")
)

// TestDeadFirstAddress: it costs its share of the time and not all of it, and the
// next flow begins with the address that worked.
func TestDeadFirstAddress(t *testing.T) {
	for _, test := range []struct {
		name string
		dead func(t *testing.T, at netip.AddrPort)
		cost time.Duration
	}{
		{"refuses", func(*testing.T, netip.AddrPort) {}, 0},
		{"is a black hole", func(t *testing.T, at netip.AddrPort) { blackHole(t, at) }, 500 * time.Millisecond},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := startProxy(t, "HTTP/1.1 200 OK\r\n\r\n")
			test.dead(t, netip.AddrPortFrom(deadAddress, uint16(p.port())))
			d := dialer()
			d.ConnectTimeout = time.Second
			d.Know("proxy", deadAddress, liveAddress)
			named := p.parse(t, "user:right", "proxy")
			for _, cost := range []time.Duration{test.cost, 0} {
				start := time.Now()
				conn, _, err := d.Tunnel(t.Context(), named, target)
				if err != nil {
					t.Fatal(err)
				}
				conn.Close()
				if took := time.Since(start); took < cost || took > cost+400*time.Millisecond {
					t.Errorf("took %s, want %s", took, cost)
				}
			}
		})
	}
}

// TestAllAddressesDead: the error tells of each, in one line.
func TestAllAddressesDead(t *testing.T) {
	p := startProxy(t, "")
	p.listener.Close()
	d := dialer()
	d.Know("proxy", deadAddress, liveAddress)
	_, _, err := d.Tunnel(t.Context(), p.parse(t, "user:right", "proxy"), target)
	text := fmt.Sprint(err)
	if !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(text, "127.0.0.1:") || !strings.Contains(text, "127.0.0.2:") || strings.Contains(text, "\n") {
		t.Errorf("error %q", text)
	}
}

// TestLookupSocketsAreControlled: a look-up that escaped the mark would be captured
// by the gateway's own rules.
func TestLookupSocketsAreControlled(t *testing.T) {
	var controlled []string
	d := dialer()
	d.Control = func(network, _ string, _ syscall.RawConn) error {
		controlled = append(controlled, network)
		return nil
	}
	resolver := d.Resolver()
	if !resolver.PreferGo {
		t.Error("the system's resolver opens sockets of its own")
	}
	conn, err := resolver.Dial(t.Context(), "udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if len(controlled) != 1 || controlled[0] != "udp4" {
		t.Errorf("controlled %v", controlled)
	}
}
