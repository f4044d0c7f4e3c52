package upstream_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// h2Proxy is a proxy that speaks HTTP/2, by package http. What becomes of a tunnel the test
// says.
type h2Proxy struct {
	*httptest.Server
	upstream    *upstream.Proxy
	dialer      *upstream.Dialer
	connections atomic.Int32
	mutex       sync.Mutex
	open        []net.Conn
}

func startH2Proxy(t *testing.T, credential string, streams int, tunnel func(w http.ResponseWriter, r *http.Request)) *h2Proxy {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	p := new(h2Proxy)
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.ProtoMajor != 2 || r.UserAgent() != "" {
			t.Errorf("%s by %s from %q", r.Method, r.Proto, r.UserAgent())
		}
		tunnel(w, r)
	}))
	p.EnableHTTP2 = true
	p.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: streams}
	p.Config.ErrorLog = log.New(io.Discard, "", 0)
	p.Config.ConnState = func(conn net.Conn, state http.ConnState) {
		if state == http.StateNew {
			p.connections.Add(1)
			p.mutex.Lock()
			p.open = append(p.open, conn)
			p.mutex.Unlock()
		}
	}
	p.StartTLS()
	roots := x509.NewCertPool()
	roots.AddCert(p.Certificate())
	p.dialer = &upstream.Dialer{ConnectTimeout: 10 * time.Second, HandshakeTimeout: 10 * time.Second, TLS: &tls.Config{RootCAs: roots}}
	var err error
	if p.upstream, err = upstream.Parse("https://" + credential + p.Listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.dialer.Close()
		p.Close()
		for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, before %d:\n%s", runtime.NumGoroutine(), goroutines, stacks[:runtime.Stack(stacks, true)])
			}
		}
	})
	return p
}

// dial opens a tunnel.
func (p *h2Proxy) dial(t *testing.T) upstream.Conn {
	t.Helper()
	conn, err := p.tunnel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (p *h2Proxy) tunnel(ctx context.Context) (upstream.Conn, error) {
	conn, rest, err := p.dialer.Tunnel(ctx, p.upstream, upstream.Target{Host: "origin.test", Port: 22})
	if len(rest) > 0 {
		err = fmt.Errorf("early bytes: %q", rest)
	}
	return conn, err
}

// echo opens a tunnel that sends back what comes, and its end.
func echo(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	controller := http.NewResponseController(w)
	controller.Flush()
	buffer := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(buffer)
		w.Write(buffer[:n])
		controller.Flush()
		if err != nil {
			return
		}
	}
}

// TestMultiplex carries many tunnels on one connection, and opens another when the proxy
// lets no more on it.
func TestMultiplex(t *testing.T) {
	for _, test := range []struct{ streams, tunnels, connections int }{{100, 50, 1}, {10, 35, 4}} {
		t.Run(fmt.Sprintf("%d of %d", test.tunnels, test.streams), func(t *testing.T) {
			p := startH2Proxy(t, "", test.streams, echo)
			var running sync.WaitGroup
			open := make(chan struct{})
			var opened sync.WaitGroup
			opened.Add(test.tunnels)
			for number := range test.tunnels {
				running.Go(func() {
					conn, err := p.tunnel(t.Context())
					opened.Done()
					if err != nil {
						t.Error(err)
						return
					}
					<-open
					text := strings.Repeat(fmt.Sprint(number), 10_000)
					go func() {
						io.WriteString(conn, text)
						conn.CloseWrite()
					}()
					if answer, err := io.ReadAll(conn); err != nil || string(answer) != text {
						t.Errorf("%d bytes of %d, %v", len(answer), len(text), err)
					}
					if moved, reset := upstream.Look(conn); moved != int64(2*len(text)) || reset {
						t.Errorf("moved %d bytes of %d, reset %t", moved, 2*len(text), reset)
					}
					conn.Close()
				})
			}
			opened.Wait()
			close(open)
			running.Wait()
			// Those that find no place at once may each open a connection, one after the other.
			if connections := int(p.connections.Load()); connections != test.connections {
				t.Errorf("%d connections", connections)
			}
		})
	}
}

// TestMultiplexStalled: a tunnel that nobody reads holds a window of bytes and keeps no other
// from going on.
func TestMultiplexStalled(t *testing.T) {
	var pushed atomic.Int64
	p := startH2Proxy(t, "", 100, func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.Host, "stalled.") {
			echo(w, r)
			return
		}
		w.WriteHeader(http.StatusOK)
		for chunk := make([]byte, 64<<10); ; pushed.Add(int64(len(chunk))) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	for range 5 {
		stalled, _, err := p.dialer.Tunnel(t.Context(), p.upstream, upstream.Target{Host: "stalled.test", Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		stalled.SetLinger(0)
		defer stalled.Close()
	}
	for before := int64(-1); before != pushed.Load(); time.Sleep(300 * time.Millisecond) {
		before = pushed.Load()
	}
	if most := int64(5 * (1<<20 + 256<<10)); pushed.Load() > most {
		t.Errorf("%d bytes went out for nobody, more than %d", pushed.Load(), most)
	}
	for range 20 {
		conn := p.dial(t)
		text := strings.Repeat("x", 1<<20)
		go func() {
			io.WriteString(conn, text)
			conn.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, conn); err != nil || n != int64(len(text)) {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	if connections := p.connections.Load(); connections != 1 {
		t.Errorf("%d connections", connections)
	}
}

// TestMultiplexEnds passes ends on as ends, and aborts as aborts.
func TestMultiplexEnds(t *testing.T) {
	seen := make(chan error, 1)
	p := startH2Proxy(t, "", 100, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		io.WriteString(w, "hello")
		http.NewResponseController(w).Flush()
		if strings.HasPrefix(r.Host, "abort.") {
			panic(http.ErrAbortHandler)
		}
		_, err := io.Copy(io.Discard, r.Body)
		seen <- err
	})
	tunnel := func(host string) upstream.Conn {
		conn, _, err := p.dialer.Tunnel(t.Context(), p.upstream, upstream.Target{Host: host, Port: 1})
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	conn := tunnel("end.test")
	conn.CloseWrite()
	if err := <-seen; err != nil {
		t.Errorf("an end is %v to the proxy", err)
	}
	if text, err := io.ReadAll(conn); err != nil || string(text) != "hello" {
		t.Errorf("%q, %v", text, err)
	}
	conn.Close()

	conn = tunnel("end.test")
	conn.SetLinger(0)
	conn.Close()
	if err := <-seen; err == nil {
		t.Error("an abort is an end to the proxy")
	}

	conn = tunnel("abort.test")
	if text, err := io.ReadAll(conn); err == nil {
		t.Errorf("the proxy's abort is an end after %q", text)
	}
	conn.Close()

	conn = tunnel("end.test")
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if text, err := io.ReadAll(conn); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q, %v", text, err)
	}
	conn.Close()
	if err := <-seen; err == nil {
		t.Error("a deadline is an end to the proxy")
	}
}

// TestMultiplexLost: when the connection breaks its tunnels do, and the next ones go on a
// new one.
func TestMultiplexLost(t *testing.T) {
	p := startH2Proxy(t, "", 100, echo)
	conn := p.dial(t)
	p.mutex.Lock()
	p.open[0].Close()
	p.mutex.Unlock()
	if text, err := io.ReadAll(conn); err == nil {
		t.Errorf("an end after %q", text)
	}
	again := p.dial(t)
	io.WriteString(again, "x")
	if _, err := io.ReadFull(again, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	if connections := p.connections.Load(); connections != 2 {
		t.Errorf("%d connections", connections)
	}

	p.dialer.NetworkChanged()
	third := p.dial(t)
	io.WriteString(again, "x") // it goes on where it is
	if _, err := io.ReadFull(again, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	third.Close()
	if connections := p.connections.Load(); connections != 3 {
		t.Errorf("%d connections after a change of the network", connections)
	}
}

// TestMultiplexRefused judges answers as those of HTTP/1, and sends a refused credential
// once.
func TestMultiplexRefused(t *testing.T) {
	var denied atomic.Int32
	p := startH2Proxy(t, "user:wrong@", 100, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Proxy-Authorization") != "" {
			denied.Add(1)
		}
		w.Header().Set("Proxy-Authenticate", `Basic realm="company"`)
		w.WriteHeader(http.StatusProxyAuthRequired)
	})
	if _, err := p.tunnel(t.Context()); !upstream.Denied(err) {
		t.Errorf("%v", err)
	}
	for range 5 {
		if _, err := p.tunnel(t.Context()); !errors.Is(err, upstream.ErrCredentialRefused) {
			t.Errorf("%v", err)
		}
	}
	if denied.Load() != 1 {
		t.Errorf("the credential was sent %d times", denied.Load())
	}

	forbidding := startH2Proxy(t, "", 100, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	_, err := forbidding.tunnel(t.Context())
	if refused, ok := errors.AsType[*upstream.RefusedError](err); !ok || refused.Code != 403 || upstream.Elsewhere(err) {
		t.Errorf("%v", err)
	}

	silent := startH2Proxy(t, "", 100, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	silent.dialer.HandshakeTimeout = 100 * time.Millisecond
	if _, err := silent.tunnel(t.Context()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	silent.dialer.HandshakeTimeout = time.Minute
	if _, err := silent.tunnel(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
