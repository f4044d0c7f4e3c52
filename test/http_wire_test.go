package test

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestHeadAtTheProxy compares what the proxy receives, byte for byte. \n stands for CRLF.
func TestHeadAtTheProxy(t *testing.T) {
	own := credential // with its line break
	for _, test := range []struct {
		name      string
		arguments []string
		address   netip.Addr
		sent, got string
	}{
		{
			"plain", nil, lab.Origin4,
			"GET /a?b=c HTTP/1.1\nHost: origin.test\nUser-Agent: x\n\n",
			"GET http://origin.test/a?b=c HTTP/1.1\nHost: origin.test\nUser-Agent: x\n" + own + "\n",
		},
		{
			"hop-by-hop fields end here", nil, lab.Origin6,
			"GET / HTTP/1.1\nHost: six.test\nConnection: keep-alive, X-Hop\nX-Hop: 1\nKeep-Alive: 5\nProxy-Connection: keep-alive\nX-End: 2\n\n",
			"GET http://six.test/ HTTP/1.1\nHost: six.test\nX-End: 2\n" + own + "\n",
		},
		{
			// A captured client knows of no proxy: what it says to one is not ours to tell.
			"the client's own credential ends here", nil, lab.Origin4,
			"GET / HTTP/1.1\nHost: origin.test\nProxy-Authorization: Basic eDp4\n\n",
			"GET http://origin.test/ HTTP/1.1\nHost: origin.test\n" + own + "\n",
		},
		{
			// Privacy: nothing is added unless asked for, and nothing of the client's changed.
			"no Via and no X-Forwarded-For", nil, lab.Origin4,
			"GET / HTTP/1.1\nHost: origin.test\nVia: 1.1 a\nX-Forwarded-For: 10.1.1.1\n\n",
			"GET http://origin.test/ HTTP/1.1\nHost: origin.test\nVia: 1.1 a\nX-Forwarded-For: 10.1.1.1\n" + own + "\n",
		},
		{
			"--http-via",
			[]string{"--http-via"},
			lab.Origin4,
			"GET / HTTP/1.1\nHost: origin.test\nVia: 1.1 a\n\n",
			"GET http://origin.test/ HTTP/1.1\nHost: origin.test\n" + own + "Via: 1.1 a, 1.1 transproxy-tproxy\n\n",
		},
		{
			"--http-forwarded-for",
			[]string{"--http-forwarded-for"},
			lab.Origin4,
			"GET / HTTP/1.1\nHost: origin.test\nX-Forwarded-For: 10.1.1.1\n\n",
			"GET http://origin.test/ HTTP/1.1\nHost: origin.test\n" + own + "X-Forwarded-For: 10.1.1.1, " + lab.Client4.String() + "\n\n",
		},
		{
			"--http-forwarded-for, IPv6",
			[]string{"--http-forwarded-for"},
			lab.Origin6,
			"GET / HTTP/1.1\nHost: six.test\n\n",
			"GET http://six.test/ HTTP/1.1\nHost: six.test\n" + own + "X-Forwarded-For: " + lab.Client6.String() + "\n\n",
		},
		{
			"IPv6 address", nil, lab.Origin6,
			"GET / HTTP/1.0\n\n",
			"GET http://[" + lab.Origin6.String() + "]/ HTTP/1.1\nHost: [" + lab.Origin6.String() + "]\n" + own + "\n",
		},
		{
			// Or every client could have the gateway fetch what the proxy alone may reach.
			"a Host that is another address", nil, lab.Origin4,
			"GET / HTTP/1.1\nHost: 169.254.169.254\n\n",
			"GET http://" + lab.Origin4.String() + "/ HTTP/1.1\nHost: " + lab.Origin4.String() + "\n" + own + "\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.gateway(test.arguments...)
			c := w.converse(test.address, 80)
			c.say(test.sent)
			if response, body := c.hear(); response.StatusCode != http.StatusOK {
				t.Errorf("%s %q", response.Status, body)
			}
			if got, want := w.proxy.Streams(), lines(test.got); !slices.Equal(got, []string{want}) {
				t.Errorf("the proxy received\n%q\nand not\n%q", got, want)
			}
		})
	}
}

// TestPortOfTheTarget: it is the one that the client dialled, whatever Host says.
func TestPortOfTheTarget(t *testing.T) {
	w := newHTTPWorld(t)
	w.gateway()
	w.converse(lab.Origin4, portWeb).ask("GET /status/200 HTTP/1.1\nHost: origin.test\n\n", "200")
	w.converse(lab.Origin6, portWeb).ask("GET /status/200 HTTP/1.1\nHost: six.test:9999\n\n", "200")
	if want := []string{"GET http://origin.test:8080/status/200", "GET http://six.test:8080/status/200"}; !slices.Equal(w.proxy.Requests(), want) {
		t.Errorf("the proxy saw %q, want %q", w.proxy.Requests(), want)
	}
}

// TestConnectionsToTheProxyAreReused by all clients, as many as are needed at once; one
// that the proxy has closed meanwhile costs the client nothing.
func TestConnectionsToTheProxyAreReused(t *testing.T) {
	w := newHTTPWorld(t)
	g := w.gateway()
	get := func(address netip.Addr) {
		w.converse(address, portWeb).ask("GET /status/200 HTTP/1.1\nHost: "+named(address)+"\n\n", "200")
	}
	for i := range 5 {
		// The record comes once the connection is there for others.
		get(lab.Origin4)
		accessLines(g, 2*i+1)
		get(lab.Origin6)
		accessLines(g, 2*i+2)
	}
	if n := len(w.proxy.Streams()); n != 1 {
		t.Errorf("10 requests one after the other took %d connections", n)
	}
	reused := accessLines(g, 10)
	for i, line := range reused {
		if line["reused"] != (i > 0) {
			t.Errorf("request %d: reused is %v", i, line["reused"])
		}
	}

	// Two that run at the same time, the first of which waits for its body.
	c := w.converse(lab.Origin4, portWeb)
	c.say("POST /early HTTP/1.1\nHost: origin.test\nContent-Length: 1\n\n")
	response, err := http.ReadResponse(c.reader, nil)
	must(t, err)
	get(lab.Origin6)
	c.say("x")
	if body, err := io.ReadAll(response.Body); err != nil || string(body) != "early\n1\n" {
		t.Errorf("%q, %v", body, err)
	}
	if n := len(w.proxy.Streams()); n != 2 {
		t.Errorf("two requests at once brought the proxy to %d connections", n)
	}

	// Requests are not sent into a connection whose end is known.
	w.proxy.Close()
	again := &lab.ConnectProxy{User: user, Password: password, Hosts: hosts}
	must(t, again.Start(w.Proxy, lab.ProxyPort))
	t.Cleanup(again.Close)
	get(lab.Origin4)
	if n := len(again.Streams()); n != 1 {
		t.Errorf("%d connections to the proxy that has come back", n)
	}
}

// accessLines are the lines of the access log as they are written, without regard to
// what is known of them.
func accessLines(g *gateway, n int) (found []map[string]any) {
	g.t.Helper()
	g.waitFlows(n)
	for line := range strings.Lines(g.output.String()) {
		var fields map[string]any
		if json.Unmarshal([]byte(line), &fields) == nil && (fields["message"] == "request" || fields["message"] == "flow") {
			found = append(found, fields)
		}
	}
	return found
}

// TestRequestLine: what the access log has of a request, and that a tunnel has one line.
func TestRequestLine(t *testing.T) {
	w := newHTTPWorld(t)
	g := w.gateway()
	for i, address := range both {
		c := w.converse(address, portWeb)
		c.say("POST /echo?token=secret HTTP/1.1\nHost: " + named(address) + "\nContent-Length: 5\n\nhello")
		c.hear()
		line := accessLines(g, i+1)[i]
		url := fmt.Sprintf("http://%s:%d/echo", named(address), portWeb)
		for name, want := range map[string]any{
			"message": "request", "client": c.LocalAddr().String(), "destination": netip.AddrPortFrom(address, portWeb).String(),
			"method": "POST", "url": url, "status": 200.0, "sent": 5.0, "received": 5.0, "reused": i > 0,
			"way": "upstream", "upstream": fmt.Sprintf("http://%s:%d", lab.Proxy4, lab.ProxyPort), "end": "done",
		} {
			if line[name] != want {
				t.Errorf("%s is %v, want %v", name, line[name], want)
			}
		}
		first, _ := line["first_byte_ms"].(float64)
		whole, _ := line["duration_ms"].(float64)
		if first <= 0 || whole < first || whole > 10_000 {
			t.Errorf("the first byte after %v ms of %v", first, whole)
		}
		if line["time"] == nil || len(line) != 15 {
			t.Errorf("fields %v", slices.Sorted(maps.Keys(line)))
		}
	}
	if text := g.output.String(); strings.Contains(text, "secret") || strings.Contains(text, "Basic") {
		t.Error("a query or a credential is in the log")
	}
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
		t.Fatalf("%q, %v", got, err)
	}
	time.Sleep(100 * time.Millisecond) // for a line too many
	if last := accessLines(g, 3); len(last) != 3 || last[2]["message"] != "flow" {
		t.Errorf("lines of a tunnel: %v", last[2:])
	}
}

// TestNotHTTPOnPort80: other protocols go through as they are, by CONNECT: HTTP/2 with
// prior knowledge (RFC 9113 section 3.3), TLS, a tunnel that a client believes to be its
// own proxy's, and what looks like a request for a while.
func TestNotHTTPOnPort80(t *testing.T) {
	for name, flight := range map[string]string{
		"HTTP/2":              "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
		"TLS":                 string(clientHello(t, "origin.test")),
		"CONNECT":             "CONNECT example.test:443 HTTP/1.1\r\nHost: example.test\r\n\r\n",
		"two spaces":          "GET  / HTTP/1.1\r\nHost: origin.test\r\n\r\n",
		"HTTP/0.9":            "GET /\r\n",
		"a method and no end": "POSTIT" + strings.Repeat("x", 100) + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.gateway("--http-ports", fmt.Sprint(lab.PortEcho), "--peek-timeout", "500ms")
			for _, address := range both {
				c := w.converse(address, lab.PortEcho)
				_, err := io.WriteString(c, flight)
				must(t, err, c.CloseWrite())
				if echo, err := io.ReadAll(c.reader); err != nil || string(echo) != flight {
					t.Errorf("echoed %q, %v; want %q", echo, err, flight)
				}
			}
			if len(w.proxy.Targets()) != len(both) || len(w.proxy.Requests()) > 0 {
				t.Errorf("the proxy saw CONNECT %q and requests %q", w.proxy.Targets(), w.proxy.Requests())
			}
		})
	}
}

// TestClientThatGoes: the rest of an answer that nobody reads is not fetched, and the
// connection to the proxy does not stay.
func TestClientThatGoes(t *testing.T) {
	w := newHTTPWorld(t)
	g := w.gateway()
	const size = 1 << 30
	before := sockets(t, g.command.Process)
	if before == 0 {
		t.Fatal("not even listeners: the comparison is blind")
	}
	c := w.converse(lab.Origin4, portWeb)
	c.say(fmt.Sprintf("GET /sized/%d HTTP/1.1\nHost: origin.test\n\n", size))
	_, err := io.ReadFull(c.reader, make([]byte, 1<<20))
	must(t, err, c.SetLinger(0), c.Close())
	line := accessLines(g, 1)[0]
	if received, _ := line["received"].(float64); line["end"] == "done" || received >= size {
		t.Errorf("access line %v", line)
	}
	if !within(5*time.Second, func() bool { return sockets(t, g.command.Process) <= before }) {
		t.Errorf("it has %d sockets open, and had %d before", sockets(t, g.command.Process), before)
	}
}
