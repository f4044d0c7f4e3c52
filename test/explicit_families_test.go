package test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.IPv6Loopback()
)

// place is where a client is, and the address at which it knows the gateway.
type place struct {
	host *netns.NS
	at   netip.Addr
}

// explicitlyAt connects to an explicit listener.
func (w *world) explicitlyAt(from place, port int) *conversation {
	w.t.Helper()
	conn := dial(w.t, from.host, from.at, port)
	return &conversation{w.t, conn, bufio.NewReader(conn)}
}

// TestExplicitFamilies: both listeners serve both families, requests and tunnels, and
// hand out a PAC that names the address at which they were asked.
func TestExplicitFamilies(t *testing.T) {
	w := newWorld(t)
	g := w.gateway()
	for _, from := range []struct {
		place
		port int
		with string // the client's credential
	}{
		{place{w.Client, lab.Gateway4}, passing, credential},
		{place{w.Client, lab.Gateway6}, passing, credential},
		{place{w.Gateway, loopback4}, passing, credential},
		{place{w.Gateway, loopback6}, passing, credential},
		{place{w.Gateway, loopback4}, authenticating, ""},
		{place{w.Gateway, loopback6}, authenticating, ""},
	} {
		t.Run(fmt.Sprintf("%s port %d", from.at, from.port), func(t *testing.T) {
			address := netip.AddrPortFrom(from.at, uint16(from.port)).String()
			c := w.explicitlyAt(from.place, from.port)
			for _, host := range []string{"origin.test", "six.test"} { // on one connection
				c.ask("GET http://"+host+"/a?b HTTP/1.1\nHost: "+host+"\n"+from.with+"\n", "origin http://"+host+"/a")
			}
			if from.with != "" {
				c.say("GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n")
				if response, _ := c.hear(); response.StatusCode != 407 || !strings.HasPrefix(response.Header.Get("Proxy-Authenticate"), "Basic") {
					t.Errorf("without a credential: %s %v", response.Status, response.Header)
				}
			}

			c = w.explicitlyAt(from.place, from.port)
			c.say("CONNECT six.test:22 HTTP/1.1\nHost: six.test:22\n" + from.with + "\n")
			response, err := http.ReadResponse(c.reader, &http.Request{Method: http.MethodConnect})
			must(t, err)
			line := make([]byte, len(lab.Banner))
			if _, err := io.ReadFull(c.reader, line); response.StatusCode != 200 || err != nil || string(line) != lab.Banner {
				t.Errorf("CONNECT: %s, %q, %v", response.Status, line, err)
			}
			must(t, c.Close())

			for _, path := range []string{"/proxy.pac", "/wpad.dat", "/wpad.dat?x=y"} {
				c := w.explicitlyAt(from.place, from.port)
				c.say("GET " + path + " HTTP/1.1\nHost: wpad\n\n")
				response, body := c.hear()
				if response.StatusCode != 200 || response.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" ||
					!strings.Contains(body, "function FindProxyForURL(") || !strings.Contains(body, `"PROXY `+address+`"`) {
					t.Errorf("%s: %s %v %q", path, response.Status, response.Header, body)
				}
			}
			c = w.explicitlyAt(from.place, from.port)
			c.say("GET /other HTTP/1.1\nHost: wpad\n\n")
			if response, body := c.hear(); response.StatusCode != 400 || !strings.Contains(body, "/proxy.pac") {
				t.Errorf("/other: %s %q", response.Status, body)
			}
			must(t, c.Close())
		})
	}
	if n := w.proxy.Refused(); n > 0 {
		t.Errorf("the proxy refused %d requests", n)
	}
	g.stop()
	if text := g.output.String(); strings.Contains(text, "a?b") || strings.Contains(text, "Basic") {
		t.Error("a query or a credential is in the log")
	}
}

// TestExplicitStrangersPassword: what a client on the passing listener sends is its own
// affair. Its wrong password does not keep the gateway from using the right one, and
// the gateway's right one does not let in a client that has none.
func TestExplicitStrangersPassword(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	get := "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n"
	captured := func() {
		t.Helper()
		w.converse(lab.Origin6, 80).ask("GET / HTTP/1.1\nHost: six.test\n\n", "origin http://six.test/")
	}
	captured() // leaves a connection to the proxy on which the right password was sent
	for _, with := range []string{"", "Proxy-Authorization: " + basic("guest", "guess") + "\n"} {
		for _, request := range []string{get, "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\n"} {
			c := w.explicitly(w.Client, passing)
			c.say(request + with + "\n")
			if response, _ := c.hear(); response.StatusCode != 407 || response.Header.Get("Proxy-Authenticate") == "" {
				t.Errorf("%q with %q: %s %v", request, with, response.Status, response.Header)
			}
		}
		captured()
		w.explicitly(w.Gateway, authenticating).ask(get+"\n", "origin http://origin.test/")
	}
	// No stream to the proxy has both kinds of requests on it.
	for _, stream := range w.proxy.Streams() {
		ours, all := strings.Count(stream, credential[:len(credential)-1]), strings.Count(stream, " HTTP/1.1\r\n")
		if ours != 0 && ours != all {
			t.Errorf("requests of clients with their own credentials are among those with ours: %q", stream)
		}
	}
	if refused, demanded := w.proxy.Refused(), w.proxy.Demanded(); refused != 2 || demanded != 2 {
		t.Errorf("the proxy refused %d requests with and %d without a password, want 2 and 2", refused, demanded)
	}
	// And one that sends its own on the authenticating listener gets by with ours alone.
	w.explicitly(w.Gateway, authenticating).ask(get+"Proxy-Authorization: "+basic("guest", "guess")+"\n\n", "origin http://origin.test/")
}

// TestExplicitOff: a listener that is off is not there, and the other one is.
func TestExplicitOff(t *testing.T) {
	w := newWorld(t)
	get := "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n"
	for _, test := range []struct {
		flag string
		port int
	}{{"--explicit-proxy-listen", passing}, {"--explicit-proxy-with-auth-listen", authenticating}} {
		g := w.gateway(test.flag, "off")
		for _, from := range []place{{w.Gateway, loopback4}, {w.Gateway, loopback6}, {w.Client, lab.Gateway4}} {
			if conn, err := from.host.Dial(t.Context(), "tcp", netip.AddrPortFrom(from.at, uint16(test.port)).String()); err == nil {
				conn.Close()
				t.Errorf("%s off: somebody listens at %s port %d", test.flag, from.at, test.port)
			}
		}
		other := passing + authenticating - test.port
		w.explicitly(w.Gateway, other).ask(strings.Replace(get, "\n\n", "\n"+credential+"\n", 1), "origin http://origin.test/")
		g.stop()
	}
	g := w.gateway("--explicit-proxy-listen", "[::1]:3200")
	c := w.explicitlyAt(place{w.Gateway, loopback6}, 3200)
	c.ask(strings.Replace(get, "\n\n", "\n"+credential+"\n", 1), "origin http://origin.test/")
	g.stop()
}

// TestExplicitUpgrade: WebSockets of clients that have the gateway as their proxy. Where
// the credential is the client's the proxy's refusal is its to see, and the CONNECT too.
func TestExplicitUpgrade(t *testing.T) {
	ask := "GET http://origin.test/chat HTTP/1.1\nHost: origin.test\nConnection: Upgrade\nUpgrade: websocket\n"
	for _, test := range []struct {
		name    string
		refuses bool
		port    int
		status  int
		tunnels []string
	}{
		{"passing, allowed", false, passing, 101, nil},
		{"passing, refused", true, passing, 403, nil},
		{"authenticating, allowed", false, authenticating, 101, nil},
		{"authenticating, refused", true, authenticating, 101, []string{"origin.test:80"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			if test.refuses {
				w.proxy.Change(func() { w.proxy.NoUpgrade = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n" })
			}
			w.gateway()
			c, with := w.explicitly(w.Gateway, test.port), ""
			if test.port == passing {
				with = credential
			}
			c.say(ask + with + "\n")
			response, err := http.ReadResponse(c.reader, nil)
			must(t, err)
			if response.StatusCode != test.status || !slices.Equal(w.proxy.Targets(), test.tunnels) {
				t.Errorf("%s; the proxy saw CONNECT %q", response.Status, w.proxy.Targets())
			}
			if response.StatusCode == http.StatusSwitchingProtocols {
				io.WriteString(c, "frames")
				must(t, c.CloseWrite())
				if echo, err := io.ReadAll(c.reader); err != nil || string(echo) != "frames" {
					t.Errorf("echoed %q, %v", echo, err)
				}
			}
		})
	}
}

// TestExplicitLines: a tunnel of an explicit client has one line, a request has one, and
// what was refused has one that says why.
func TestExplicitLines(t *testing.T) {
	w := newWorld(t)
	g := w.gateway()
	w.explicitly(w.Gateway, authenticating).ask("GET http://six.test/a?b HTTP/1.1\nHost: x\n\n", "origin http://six.test/a")
	g.waitFlows(1) // lines of different clients have no order but that in which they were waited for
	c := w.explicitly(w.Gateway, authenticating)
	c.say("CONNECT origin.test:22 HTTP/1.1\nHost: x\n\n")
	_, err := http.ReadResponse(c.reader, &http.Request{Method: http.MethodConnect})
	must(t, err)
	_, err = io.ReadFull(c.reader, make([]byte, len(lab.Banner)))
	must(t, err, c.CloseWrite())
	c.wantEnd()
	g.waitFlows(2)
	refused := w.explicitly(w.Client, authenticating)
	refused.say("GET http://origin.test/ HTTP/1.1\nHost: x\n\n")
	refused.hear()

	time.Sleep(100 * time.Millisecond) // for a line too many
	found := accessLines(g, 3)
	if len(found) != 3 {
		t.Fatalf("%d lines", len(found))
	}
	proxy := fmt.Sprintf("http://%s:%d", lab.Proxy4, lab.ProxyPort)
	for i, want := range []map[string]any{
		{"message": "request", "method": "GET", "url": "http://six.test/a", "status": 200.0, "way": "upstream", "upstream": proxy, "end": "done"},
		{
			"message": "flow", "name": "origin.test:22", "way": "upstream", "upstream": proxy, "sent": 0.0, "received": float64(len(lab.Banner)),
			"end": "closed", "client": c.LocalAddr().String(), "destination": "127.0.0.1:3133",
		},
		{"message": "request", "status": 403.0, "client": refused.LocalAddr().String(), "destination": lab.Gateway4.String() + ":3133"},
	} {
		for name, value := range want {
			if found[i][name] != value {
				t.Errorf("line %d: %s is %v, want %v", i, name, found[i][name], value)
			}
		}
	}
}
