package test

import (
	"bufio"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// Ports of the explicit listeners.
const (
	passing        = 3132
	authenticating = 3133
)

// credential is what a client that has the company's password sends.
var credential = "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password)) + "\n"

// explicitly connects a host to an explicit listener of the gateway.
func (w *world) explicitly(from *netns.NS, port int) *conversation {
	address := lab.Gateway4
	if from == w.Gateway {
		address = netip.MustParseAddr("127.0.0.1")
	}
	conn := dial(w.t, from, address, port)
	return &conversation{w.t, conn, bufio.NewReader(conn)}
}

// TestExplicitProxy: with the client's own credential for the clients, with the
// gateway's for its own programs.
func TestExplicitProxy(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--no-proxy", "203.0.113.0/25")
	get := "GET http://origin.test/a HTTP/1.1\nHost: origin.test\n"
	c := w.explicitly(w.Client, passing)
	c.say(get + "\n")
	if response, _ := c.hear(); response.StatusCode != http.StatusProxyAuthRequired || response.Header.Get("Proxy-Authenticate") == "" {
		t.Errorf("without a credential: %s %v", response.Status, response.Header)
	}
	w.explicitly(w.Client, passing).ask(get+credential+"\n", "origin http://origin.test/a")
	w.explicitly(w.Gateway, authenticating).ask(get+"\n", "origin http://origin.test/a")

	c = w.explicitly(w.Client, authenticating)
	c.say(get + "\n")
	if response, body := c.hear(); response.StatusCode != http.StatusForbidden || !strings.Contains(body, "--explicit-") {
		t.Errorf("of another host: %s %q", response.Status, body)
	}
	for _, from := range []struct {
		host *netns.NS
		port int
		with string
	}{{w.Client, passing, credential}, {w.Gateway, authenticating, ""}} {
		c = w.explicitly(from.host, from.port)
		c.say("CONNECT origin.test:22 HTTP/1.1\nHost: origin.test:22\n" + from.with + "\n")
		if response, _ := http.ReadResponse(c.reader, &http.Request{Method: "CONNECT"}); response == nil || response.StatusCode != http.StatusOK {
			t.Fatalf("CONNECT: %+v", response)
		}
		line := make([]byte, len(lab.Banner))
		if _, err := io.ReadFull(c.reader, line); err != nil || string(line) != lab.Banner {
			t.Errorf("in the tunnel: %q, %v", line, err)
		}
		must(t, c.Close())
	}
	// An exempt address goes past the proxy.
	w.explicitly(w.Client, passing).ask("GET http://"+lab.Origin4.String()+"/ HTTP/1.1\nHost: x\n\n", "direct http://"+lab.Origin4.String()+"/")

	var messages []string
	for _, f := range g.waitFlows(7) {
		messages = append(messages, f.Message)
	}
	slices.Sort(messages)
	if want := []string{"flow", "flow", "request", "request", "request", "request", "request"}; !slices.Equal(messages, want) {
		t.Errorf("access lines %q", messages)
	}
	g.stop()
}

// TestExplicitStranger: a host on the uplink is no client, unless it is named.
func TestExplicitStranger(t *testing.T) {
	w := newWorld(t)
	get := "GET http://origin.test/a HTTP/1.1\nHost: origin.test\n\n"
	for _, named := range []bool{false, true} {
		var g *gateway
		if named {
			g = w.gateway("--explicit-with-auth-allow", lab.Neighbour4.String())
		} else {
			g = w.gateway()
		}
		conn := dial(t, w.Neighbour, lab.Uplink4, authenticating)
		c := &conversation{t, conn, bufio.NewReader(conn)}
		c.say(get)
		want := map[bool]int{true: http.StatusOK, false: http.StatusForbidden}[named]
		if response, _ := c.hear(); response.StatusCode != want {
			t.Errorf("named %t: %s", named, response.Status)
		}
		g.stop()
	}
}

// TestExplicitDestinations: a client does not get to the gateway's own services, nor
// to a cloud's metadata, whatever is exempt.
func TestExplicitDestinations(t *testing.T) {
	w := newWorld(t)
	listener, err := w.Gateway.Listen("tcp", "127.0.0.1:8080")
	must(t, err)
	served := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "secret") })}
	go served.Serve(listener)
	t.Cleanup(func() { served.Close() })

	refused := []string{
		"127.0.0.1:8080", "[::1]:8080", "[::ffff:127.0.0.1]:8080", "169.254.169.254", "0.0.0.0:8080", lab.Gateway4.String() + ":8080",
		"[64:ff9b::7f00:1]:8080", "localhost:8080",
	}
	g := w.gateway("--no-proxy", "*")
	for _, host := range refused {
		c := w.explicitly(w.Client, passing)
		c.say("GET http://" + host + "/ HTTP/1.1\nHost: x\n\n")
		if response, body := c.hear(); response.StatusCode != http.StatusForbidden || strings.Contains(body, "secret") {
			t.Errorf("%s: %s %q", host, response.Status, body)
		}
		if !strings.Contains(host, ":8080") {
			host += ":80"
		}
		c = w.explicitly(w.Client, passing)
		c.say("CONNECT " + host + " HTTP/1.1\nHost: x\n\n")
		if response, _ := c.hear(); response.StatusCode != http.StatusForbidden {
			t.Errorf("CONNECT %s: %s", host, response.Status)
		}
	}
	g.stop()
	w.gateway("--no-proxy", "*", "--explicit-allow-to", "127.0.0.1")
	w.explicitly(w.Client, passing).ask("GET http://127.0.0.1:8080/ HTTP/1.1\nHost: x\n\n", "secret")
}

// TestConfigurationFile: clients find the proxy by the address at which they asked.
func TestConfigurationFile(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	for _, path := range []string{"/proxy.pac", "/wpad.dat"} {
		c := w.explicitly(w.Client, passing)
		c.say("GET " + path + " HTTP/1.1\nHost: gateway:3132\n\n")
		response, body := c.hear()
		if response.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" || !strings.Contains(body, "PROXY "+lab.Gateway4.String()+":3132") {
			t.Errorf("%s: %v %q", path, response.Header, body)
		}
	}
}

// TestExplicitProxyOnly captures nothing and needs no privilege.
func TestExplicitProxyOnly(t *testing.T) {
	w := newWorld(t)
	before := w.kernelState()
	g := w.gateway("--explicit-proxy-only")
	if after := w.kernelState(); after != before {
		t.Errorf("the kernel's state has changed from %s to %s", before, after)
	}
	w.explicitly(w.Gateway, authenticating).ask("GET http://origin.test/ HTTP/1.1\nHost: x\n\n", "origin http://origin.test/")
	if body, err := w.get("http://origin.test/"); err != nil || body != "direct http://origin.test/" {
		t.Errorf("it captures: %q, %v", body, err)
	}
	g.stop()
}

// TestExplicitIdleAtStop: clients that only keep a connection do not hold up a stop.
func TestExplicitIdleAtStop(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--drain-timeout", "1m")
	c := w.explicitly(w.Gateway, authenticating)
	c.ask("GET http://origin.test/ HTTP/1.1\nHost: x\n\n", "origin http://origin.test/")
	captured := w.converse(lab.Origin4, 80)
	captured.ask("GET / HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/")
	start := time.Now()
	g.stop()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("the stop took %v", took)
	}
	for _, conn := range []net.Conn{c, captured} {
		if n, err := conn.Read(make([]byte, 1)); n > 0 || err != io.EOF {
			t.Errorf("an idle client saw %d bytes and %v, want an orderly end", n, err)
		}
	}
}
