package upstream_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// tlsProxy is a proxy behind TLS whose tunnels go to the test. resumed says of each
// connection whether its handshake was short.
type tlsProxy struct {
	upstream *upstream.Proxy
	dialer   *upstream.Dialer
	tunnels  chan *tls.Conn
	resumed  chan bool
}

func startTLSProxy(t *testing.T) *tlsProxy {
	t.Helper()
	certified := httptest.NewUnstartedServer(nil) // for its certificate, of 127.0.0.1 among others
	certified.StartTLS()
	t.Cleanup(certified.Close)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: certified.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	p := &tlsProxy{tunnels: make(chan *tls.Conn, 10), resumed: make(chan bool, 10)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			secure := conn.(*tls.Conn)
			if _, err := http.ReadRequest(bufio.NewReader(secure)); err != nil {
				conn.Close()
				continue
			}
			p.resumed <- secure.ConnectionState().DidResume
			io.WriteString(secure, "HTTP/1.1 200 OK\r\n\r\n")
			p.tunnels <- secure
		}
	}()
	roots := x509.NewCertPool()
	roots.AddCert(certified.Certificate())
	p.dialer = &upstream.Dialer{
		ConnectTimeout: 5 * time.Second, HandshakeTimeout: 5 * time.Second,
		TLS: &tls.Config{RootCAs: roots, ClientSessionCache: tls.NewLRUClientSessionCache(1)},
	}
	if p.upstream, err = upstream.Parse("https://" + listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	return p
}

// open opens a tunnel.
func (p *tlsProxy) open(t *testing.T) (upstream.Conn, *tls.Conn) {
	t.Helper()
	conn, _, err := p.dialer.Tunnel(t.Context(), p.upstream, upstream.Target{Host: "origin.test", Port: 22})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	far := <-p.tunnels
	t.Cleanup(func() { far.Close() })
	return conn, far
}

// TestTLSEnds tells an end that the proxy has announced from one that it has not, and has
// its own told apart as well.
func TestTLSEnds(t *testing.T) {
	p := startTLSProxy(t)
	read := func(conn net.Conn) (string, error) {
		text, err := io.ReadAll(conn)
		return string(text), err
	}
	t.Run("announced", func(t *testing.T) {
		conn, far := p.open(t)
		io.WriteString(far, "all")
		far.CloseWrite()
		if text, err := read(conn); text != "all" || err != nil {
			t.Errorf("%q, %v", text, err)
		}
		io.WriteString(conn, "later") // the other direction goes on
		conn.CloseWrite()
		if text, err := read(far); text != "later" || err != nil {
			t.Errorf("%q, %v", text, err)
		}
	})
	t.Run("cut", func(t *testing.T) {
		conn, far := p.open(t)
		io.WriteString(far, "half")
		far.NetConn().Close()
		if text, err := read(conn); text != "half" || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q, %v", text, err)
		}
	})
	t.Run("aborted here", func(t *testing.T) {
		conn, far := p.open(t)
		io.WriteString(conn, "half")
		conn.SetLinger(0)
		conn.Close()
		if text, err := read(far); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%q, %v", text, err)
		}
	})
	t.Run("not aborted after all", func(t *testing.T) {
		conn, far := p.open(t)
		conn.SetLinger(0)
		io.WriteString(conn, "all")
		conn.SetLinger(-1)
		conn.Close()
		if text, err := read(far); text != "all" || err != nil {
			t.Errorf("%q, %v", text, err)
		}
	})
}

// TestTLSResumption makes the second handshake a short one.
func TestTLSResumption(t *testing.T) {
	p := startTLSProxy(t)
	for _, want := range []bool{false, true} {
		conn, far := p.open(t)
		io.WriteString(far, "x") // the ticket comes before it
		io.ReadFull(conn, make([]byte, 1))
		if resumed := <-p.resumed; resumed != want {
			t.Errorf("resumed %t, want %t", resumed, want)
		}
	}
}

// TestLook counts what a connection has moved, and sees a reset.
func TestLook(t *testing.T) {
	p := startTLSProxy(t)
	conn, far := p.open(t)
	before, reset := upstream.Look(conn)
	if before == 0 || reset {
		t.Errorf("%d bytes, reset %t", before, reset)
	}
	io.WriteString(far, strings.Repeat("x", 10_000))
	io.ReadFull(conn, make([]byte, 10_000))
	if after, _ := upstream.Look(conn); after < before+10_000 {
		t.Errorf("%d bytes after %d", after, before)
	}
	far.NetConn().(*net.TCPConn).SetLinger(0)
	far.NetConn().Close()
	for deadline := time.Now().Add(10 * time.Second); !reset; {
		if _, reset = upstream.Look(conn); time.Now().After(deadline) {
			t.Fatal("the reset was not seen")
		}
	}
	left, right := net.Pipe()
	defer left.Close()
	defer right.Close()
	if moved, reset := upstream.Look(left); moved != 0 || reset {
		t.Errorf("a pipe: %d, %t", moved, reset)
	}
}
