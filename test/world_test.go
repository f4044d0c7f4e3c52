package test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// What the company's proxy demands, and the URL that says so. The password has
// every character that gave trouble somewhere.
const (
	user      = "us er"
	password  = "p@ss:w/o%rd"
	proxyUser = "us%20er:p%40ss%3Aw%2Fo%25rd@"
)

// Names that the proxy resolves, and the clients know from their hosts files.
var hosts = map[string]netip.Addr{
	"origin.test": lab.Origin4,
	"six.test":    lab.Origin6,
}

// world is a lab with servers on it.
type world struct {
	*lab.Lab
	t      *testing.T
	proxy  *lab.ConnectProxy
	origin *lab.Origin // behind the proxy
	direct *lab.Origin // what is reached past the proxy
}

// newWorld builds the routed layout with everything running but the gateway.
func newWorld(t *testing.T) *world {
	t.Helper()
	l, err := lab.Routed()
	return populate(t, l, err)
}

// newOneArmedWorld is the same on the layout with one card.
func newOneArmedWorld(t *testing.T) *world {
	t.Helper()
	l, err := lab.OneArmed()
	return populate(t, l, err)
}

func populate(t *testing.T, l *lab.Lab, err error) *world {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	w := &world{
		Lab: l, t: t,
		proxy:  &lab.ConnectProxy{User: user, Password: password, Hosts: hosts},
		origin: &lab.Origin{Label: "origin"},
		direct: &lab.Origin{Label: "direct"},
	}
	addresses := []netip.Addr{lab.Origin4, lab.Origin6}
	must(t, w.origin.Start(l.Origin, []string{"origin.test", "six.test"}, addresses))
	t.Cleanup(w.origin.Close)
	must(t, w.direct.Start(l.Router, nil, addresses))
	t.Cleanup(w.direct.Close)
	must(t, w.proxy.Start(l.Proxy, lab.ProxyPort))
	t.Cleanup(w.proxy.Close)
	return w
}

// upstream is the --upstream of the lab's proxy.
func upstream() string { return fmt.Sprintf("http://%s%s:%d", proxyUser, lab.Proxy4, lab.ProxyPort) }

// gateway starts the program with the lab's proxy as upstream.
func (w *world) gateway(arguments ...string) *gateway {
	w.t.Helper()
	return startGateway(w.t, w.Gateway, append([]string{"--upstream", upstream()}, arguments...)...)
}

// get fetches a URL from the client and returns the body.
func (w *world) get(url string) (string, error) {
	roots := w.origin.Roots()
	client := lab.HTTPClient(w.Client, hosts, roots)
	client.Timeout = 5 * time.Second
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return strings.TrimSpace(string(body)), err
}

// dial connects the client to a destination.
func (w *world) dial(address netip.Addr, port int) *net.TCPConn {
	w.t.Helper()
	return dial(w.t, w.Client, address, port)
}

func dial(t *testing.T, ns *netns.NS, address netip.Addr, port int) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", netip.AddrPortFrom(address, uint16(port)).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	return conn.(*net.TCPConn)
}

// banner connects and reads what a server says first.
func banner(t *testing.T, ns *netns.NS, address netip.Addr, port int) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", netip.AddrPortFrom(address, uint16(port)).String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	buffer := make([]byte, len(lab.Banner))
	n, err := io.ReadFull(conn, buffer)
	return string(buffer[:n]), err
}

// clientHello is the first flight of a TLS client that asks for a name.
func clientHello(t *testing.T, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: name}).Handshake()
	buffer := make([]byte, 16<<10)
	n, err := server.Read(buffer)
	must(t, err)
	return buffer[:n]
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// both are the origin's addresses, one a family.
var both = []netip.Addr{lab.Origin4, lab.Origin6}
