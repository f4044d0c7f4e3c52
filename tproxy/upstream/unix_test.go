package upstream_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// socketPath is where a proxy of a test listens.
func socketPath(t *testing.T) string { return filepath.Join(t.TempDir(), "pro xy,1@.sock") }

// onSocket is such a proxy as an upstream.
func onSocket(t *testing.T, scheme, path string) *upstream.Proxy {
	t.Helper()
	return parse(t, scheme+"+unix://"+strings.NewReplacer(" ", "%20", ",", "%2C", "@", "%40").Replace(path))
}

// listenSocket accepts connections, one after the other.
func listenSocket(t *testing.T, path string) (accept func() *net.UnixConn) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return func() *net.UnixConn {
		conn, err := listener.Accept()
		if err != nil {
			t.Error(err)
			return nil
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn.(*net.UnixConn)
	}
}

// socketDialer is one that is patient enough for a test.
func socketDialer() *upstream.Dialer {
	return &upstream.Dialer{ConnectTimeout: 5 * time.Second, HandshakeTimeout: 5 * time.Second}
}

// openSocket opens a tunnel through a proxy that hears a question and says its answer.
func openSocket(t *testing.T, scheme, hears, says string) (near upstream.Conn, far *net.UnixConn, rest string) {
	t.Helper()
	path := socketPath(t)
	accept := listenSocket(t, path)
	accepted := make(chan *net.UnixConn, 1)
	go func() {
		conn := accept()
		question := make([]byte, len(hears))
		if _, err := io.ReadFull(conn, question); err != nil || string(question) != hears {
			t.Errorf("the proxy hears %q, %v", question, err)
		}
		io.WriteString(conn, says)
		accepted <- conn
	}()
	conn, early, err := socketDialer().Tunnel(t.Context(), onSocket(t, scheme, path), target)
	far = <-accepted
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn, far, string(early)
}

const connectRequest = "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n"

// TestSocketTunnel: a tunnel with half-close through a unix socket, in each protocol.
func TestSocketTunnel(t *testing.T) {
	for _, test := range []struct{ scheme, hears, says string }{
		{"http", connectRequest, "HTTP/1.1 200 OK\r\n\r\n"},
		{"socks5", socks5OfferNone, "\x05\x00" + socks5Granted}, // which says all at once
		{"socks4a", strings.Replace(socks4Request, "us er", "", 1), socks4Granted},
	} {
		t.Run(test.scheme, func(t *testing.T) {
			near, far, rest := openSocket(t, test.scheme, test.hears, test.says+"early")
			if rest != "early" {
				t.Errorf("rest %q", rest)
			}
			io.WriteString(near, "request")
			if err := near.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			heard, err := io.ReadAll(far)
			if text := string(heard); err != nil || !strings.HasSuffix(text, "request") {
				t.Errorf("the proxy hears %q, %v", text, err)
			}
			io.WriteString(far, "answer")
			far.CloseWrite()
			if answer, err := io.ReadAll(near); err != nil || string(answer) != "answer" {
				t.Errorf("%q, %v", answer, err)
			}
		})
	}
}

// TestSocketAbort: what an abort is on a unix socket, either way.
func TestSocketAbort(t *testing.T) {
	near, far, _ := openSocket(t, "http", connectRequest, "HTTP/1.1 200 OK\r\n\r\n")
	if err := near.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	near.Close()
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the proxy reads %v", err)
	}
	if _, err := far.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the proxy writes: %v", err)
	}

	near, far, _ = openSocket(t, "http", connectRequest, "HTTP/1.1 200 OK\r\n\r\n")
	io.WriteString(near, "unread")
	far.Close()
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection that the proxy left with unread bytes: %v", err)
	}
}

// TestSocketMissing: a proxy that does not listen is named with the remedy, and used once
// it does.
func TestSocketMissing(t *testing.T) {
	path := socketPath(t)
	proxy, dialer := onSocket(t, "http", path), socketDialer()
	if _, known := dialer.Known(proxy); known {
		t.Error("an event loop is to connect to it")
	}
	if onSocket(t, "socks5", path).Associates() {
		t.Error("datagrams are to go through it")
	}
	connect := func(says string) {
		t.Helper()
		conn, err := dialer.Connect(t.Context(), proxy)
		if err == nil {
			conn.Close()
			t.Error("there is a connection")
		} else if !strings.Contains(err.Error(), says) || !upstream.Elsewhere(err) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %v", err)
		}
	}
	connect("no such file or directory: is the proxy running, and is that the socket's path?")

	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dialer.Connect(t.Context(), proxy)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()

	listener.SetUnlinkOnClose(false)
	listener.Close()
	connect("connection refused: nobody listens there")

	if os.Geteuid() == 0 {
		return // who may do everything
	}
	if err := os.Chmod(filepath.Dir(path), 0); err != nil {
		t.Fatal(err)
	}
	connect("permission denied: let this program's user write to the socket")
}

// TestSocketQueue: a proxy whose queue is full for a while is waited for, as TCP does by
// itself, and no longer than a connect may take.
func TestSocketQueue(t *testing.T) {
	path := socketPath(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	proxy, dialer := onSocket(t, "http", path), socketDialer()
	first, err := dialer.Connect(t.Context(), proxy) // fills the queue
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()

	impatient := &upstream.Dialer{ConnectTimeout: 100 * time.Millisecond, HandshakeTimeout: time.Second}
	start := time.Now()
	conn, err := impatient.Connect(t.Context(), proxy)
	if err == nil {
		conn.Close()
	}
	if took := time.Since(start); err == nil || !strings.Contains(err.Error(), "does not accept the connections that wait") || took < 100*time.Millisecond || took > 2*time.Second {
		t.Fatalf("after %s: %v", took, err)
	}

	connected := make(chan error, 1)
	go func() {
		conn, err := dialer.Connect(t.Context(), proxy)
		if err == nil {
			conn.Close()
		}
		connected <- err
	}()
	select {
	case err := <-connected:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	accepted, _, err := unix.Accept(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(accepted)
	if err := <-connected; err != nil {
		t.Error(err)
	}
}

// TestSocketGroup: a proxy that does not listen yet is taken for down, and used once it
// answers.
func TestSocketGroup(t *testing.T) {
	path := socketPath(t)
	proxy := onSocket(t, "http", path)
	group := upstream.NewGroup(upstream.First, proxy)
	ctx, cancel := context.WithCancel(t.Context())
	changes, watched := make(chan upstream.Change, 10), make(chan struct{})
	go func() {
		defer close(watched)
		group.Watch(ctx, socketDialer(), func(c upstream.Change) { changes <- c })
	}()
	defer func() { cancel(); <-watched }()
	dialer := socketDialer()
	for range 2 {
		if _, err := dialer.Connect(ctx, proxy); err == nil {
			t.Fatal("there is a connection")
		}
		time.Sleep(10 * time.Millisecond) // Watch may not have begun yet
	}
	if c := <-changes; c.Up || !errors.Is(c.Err, syscall.ENOENT) {
		t.Fatalf("%+v", c)
	}
	accept := listenSocket(t, path)
	question := make([]byte, 100)
	conn := accept()
	n, err := conn.Read(question)
	if want := "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n"; err != nil || !strings.HasPrefix(string(question[:n]), want) {
		t.Errorf("it is asked %q, %v", question[:n], err)
	}
	io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
	if c := <-changes; !c.Up {
		t.Fatalf("%+v", c)
	}
}
