package upstream_test

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// proxy is a small HTTP proxy on loopback that wants user:right and answers every
// other CONNECT with its reply.
type proxy struct {
	listener net.Listener
	reply    string        // after the credential was accepted
	delay    time.Duration // before any answer
	requests atomic.Int64
	denials  atomic.Int64
	targets  sync.Map
}

func startProxy(t *testing.T, reply string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, reply: reply}
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() { p.serve(conn) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		connections.Wait()
	})
	return p
}

func (p *proxy) serve(conn net.Conn) {
	defer conn.Close()
	request, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		return
	}
	p.requests.Add(1)
	p.targets.Store(request.Host, true)
	time.Sleep(p.delay)
	if request.Header.Get("Proxy-Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte("user:right")) {
		p.denials.Add(1)
		io.WriteString(conn, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n")
		return
	}
	io.WriteString(conn, p.reply)
	io.Copy(conn, conn)
}

// port returns the proxy's port.
func (p *proxy) port() int { return p.listener.Addr().(*net.TCPAddr).Port }

// parse returns the proxy as an upstream, under a host that leads to loopback.
func (p *proxy) parse(t *testing.T, credential, host string) *upstream.Proxy {
	t.Helper()
	parsed, err := parseBasic(fmt.Sprintf("http://%s@%s:%d", credential, host, p.port()))
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

// loopbackPort is any free port on 127.0.0.1.
var loopbackPort = netip.MustParseAddrPort("127.0.0.1:0")

// blackHole makes a loopback address answer no SYN and returns it: a listener whose
// accept queue is full drops them (listen(2), net.ipv4.tcp_abort_on_overflow=0).
func blackHole(t *testing.T, at netip.AddrPort) netip.AddrPort {
	t.Helper()
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(at.Addr(), uint16(bound.(*unix.SockaddrInet4).Port))
	for range 4 {
		conn, err := net.DialTimeout("tcp", address.String(), 100*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Skip("the accept queue of a listener does not fill")
	return address
}

// parseBasic is upstream.Parse with the method pinned, so that nothing has to be found out.
func parseBasic(url string) (*upstream.Proxy, error) {
	proxy, err := upstream.Parse(url)
	if err == nil {
		err = proxy.Login(nil, auth.Basic)
	}
	return proxy, err
}
