package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// wantReset wants a connection to end with a reset within a time.
func wantReset(t *testing.T, conn *net.TCPConn, limit time.Duration) {
	t.Helper()
	start := time.Now()
	must(t, conn.SetReadDeadline(start.Add(limit)))
	_, err := io.Copy(io.Discard, conn)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client got %v after %v and not a reset within %v", err, time.Since(start), limit)
	}
}

// wantRefusal wants a new connection of the client to be reset within a time. The
// reset may be there before the client knows that it is connected.
func (w *world) wantRefusal(address netip.Addr, port int, limit time.Duration) {
	w.t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(w.t.Context(), limit)
	defer cancel()
	conn, err := w.Client.Dial(ctx, "tcp", netip.AddrPortFrom(address, uint16(port)).String())
	if err == nil {
		defer conn.Close()
		wantReset(w.t, conn.(*net.TCPConn), limit-time.Since(start))
	} else if !errors.Is(err, syscall.ECONNRESET) {
		w.t.Errorf("the client got %v after %v and not a reset within %v", err, time.Since(start), limit)
	}
}

func TestDeadUpstreamResetsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.proxy.Close()
	w.gateway()
	for _, address := range both {
		w.wantRefusal(address, 22, time.Second)
	}
}

func TestBlackHoledUpstreamIsBounded(t *testing.T) {
	w := newWorld(t)
	hole := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.77"), 3128) // nobody answers ARP there
	g := startGateway(t, w.Gateway, "--upstream", "http://"+hole.String(), "--connect-timeout", "500ms")
	w.wantRefusal(lab.Origin4, 22, 2*time.Second)
	if f := g.waitFlows(1)[0]; f.End == "closed" || f.Way != "upstream" {
		t.Errorf("access line %+v", f)
	}
}

func TestSilentUpstreamIsBounded(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() {
		w.proxy.Answer = func(string) (string, bool) { return "", true }
	})
	w.gateway("--reply-timeout", "500ms")
	w.wantRefusal(lab.Origin4, 22, 2*time.Second)
}

// TestWrongPassword: one refusal is seen, named with its cure, and nothing more is
// sent until SIGHUP.
func TestWrongPassword(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Password = "changed" })
	g := w.gateway()
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() { w.wantRefusal(lab.Origin4, 22, time.Second) })
	}
	clients.Wait()
	w.wantRefusal(lab.Origin6, 22, time.Second)
	if n := w.proxy.Refused(); n != 1 {
		t.Errorf("the proxy saw %d refused passwords and not one", n)
	}
	g.waitFor("the upstream refuses the credential")
	g.waitFor("a flow was not carried")
	log := g.output.String()
	if !strings.Contains(log, "407") || !strings.Contains(log, "SIGHUP") {
		t.Errorf("the log does not say 407 and what to do")
	}

	w.proxy.Change(func() { w.proxy.Password = password })
	must(t, g.command.Process.Signal(syscall.SIGHUP))
	g.waitFor("reloaded")
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
		t.Errorf("after SIGHUP: %q, %v", got, err)
	}
	if n := w.proxy.Refused(); n != 1 {
		t.Errorf("the proxy saw %d refused passwords and not one", n)
	}
}

// TestRefusalsAreNamed: what the proxy says no with is in the access log.
func TestRefusalsAreNamed(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Ports = []int{443} })
	g := w.gateway()
	w.wantRefusal(lab.Origin4, 22, time.Second)
	if f := g.waitFlows(1)[0]; !strings.Contains(f.End, "403") {
		t.Errorf("access line %+v", f)
	}
}

// TestEarlyBytes: what comes in the same segment as the 200 belongs to the client.
func TestEarlyBytes(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Early = "early " })
	w.gateway()
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != ("early " + lab.Banner)[:len(lab.Banner)] {
		t.Errorf("%q, %v", got, err)
	}
}

// TestClientHelloByteByByte: the name is found however the bytes are cut up.
func TestClientHelloByteByByte(t *testing.T) {
	w := newWorld(t)
	g := w.gateway()
	conn := w.dial(lab.Origin4, 443)
	must(t, conn.SetNoDelay(true))
	for _, b := range clientHello(t, "origin.test") {
		if _, err := conn.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Microsecond)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the server's flight: %v", err)
	}
	conn.Close()
	if f := g.waitFlows(1)[0]; f.Name != "origin.test" || f.NameFrom != "sni" {
		t.Errorf("access line %+v", f)
	}
}

// TestHostileFlights: none of these names a host, hangs, or disturbs its neighbour.
func TestHostileFlights(t *testing.T) {
	noise, err := io.ReadAll(io.LimitReader(lab.Noise(), 70<<10))
	must(t, err)
	hello := clientHello(t, "origin.test")
	for name, test := range map[string]struct {
		port   int
		flight []byte
	}{
		"random bytes":       {443, noise},
		"random bytes, http": {80, noise},
		"truncated record":   {443, hello[:len(hello)/2]},
		"zero-length record": {443, []byte{0x16, 3, 1, 0, 0, 0x16, 3, 1, 0, 0}},
		"endless header":     {80, []byte("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 70<<10))},
		"line in the name":   {80, []byte("GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n")},
		"own address":        {80, []byte("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			g := w.gateway("--peek-timeout", "300ms", "--half-close-timeout", "1s", "--idle-timeout", "2s")
			conn := w.dial(lab.Origin4, test.port)
			go conn.Write(test.flight)
			if body, err := w.get("https://six.test/"); err != nil {
				t.Errorf("another client: %q, %v", body, err)
			}
			for _, f := range g.waitFlows(2) {
				if strings.HasPrefix(f.Destination, lab.Origin4.String()) && f.Name != "" {
					t.Errorf("a name was found: %+v", f)
				}
			}
			// Nothing but the address that the client dialled.
			for _, target := range w.proxy.Targets() {
				if want := fmt.Sprintf("%s:%d", lab.Origin4, test.port); target != want && target != "six.test:443" {
					t.Errorf("the proxy was asked for %q", target)
				}
			}
		})
	}
}

// TestConnectionLimit: more flows than --max-conns are reset, and the others live.
func TestConnectionLimit(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--max-conns", "2")
	first, second := w.dial(lab.Origin4, 22), w.dial(lab.Origin4, 22)
	for _, conn := range []*net.TCPConn{first, second} {
		if _, err := io.ReadFull(conn, make([]byte, len(lab.Banner))); err != nil {
			t.Fatal(err)
		}
	}
	w.wantRefusal(lab.Origin4, 22, time.Second)
	g.waitFor("too many flows")
	first.Close()
	g.waitFlows(1)
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
		t.Errorf("after one has ended: %q, %v", got, err)
	}
}

// TestPortExhaustion: with all local ports towards the upstream in use the log says
// so, and one more source address gives as many ports again.
func TestPortExhaustion(t *testing.T) {
	for _, test := range []struct {
		name      string
		arguments []string
		carried   int
	}{
		{"one address", nil, 10},
		{"two addresses", []string{"--upstream-source", lab.Uplink4.String() + ",198.51.100.2"}, 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			must(t,
				w.Gateway.Addr("wan0", "198.51.100.2/24"),
				w.Gateway.Sysctl("net.ipv4.ip_local_port_range", "40000 40009"))
			g := w.gateway(append(test.arguments, "--drain-timeout", "100ms")...)
			// The first use of a credential is alone on its way, from the kernel's choice.
			if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
				t.Fatalf("%q, %v", got, err)
			}
			g.waitFlows(1)
			must(t, w.Gateway.Sysctl("net.ipv4.tcp_fin_timeout", "1"))
			carried := 0
			for range 30 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				conn, err := w.Client.Dial(ctx, "tcp", netip.AddrPortFrom(lab.Origin4, 22).String())
				cancel()
				if err != nil {
					continue
				}
				defer conn.Close()
				conn.SetReadDeadline(time.Now().Add(time.Second))
				if _, err := io.ReadFull(conn, make([]byte, len(lab.Banner))); err == nil {
					carried++
				}
			}
			// A port may still be waiting after the first flow.
			if carried < test.carried-1 || carried > test.carried {
				t.Errorf("%d flows were carried at once, want %d", carried, test.carried)
			}
			g.waitFor("all local ports towards the upstream are in use")
			g.command.Process.Signal(syscall.SIGTERM)
			g.waitFor(`"ports_exhausted":`)
		})
	}
}
