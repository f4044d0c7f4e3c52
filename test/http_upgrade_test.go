package test

import (
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// TestUpgradeAnswers: whatever a proxy says to a WebSocket's handshake but 101, it is
// asked for a tunnel; if there is none to be had either, its first answer is the client's.
// Other protocols are asked for beside ordinary answers, which then stand.
func TestUpgradeAnswers(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"
	for _, test := range []struct {
		name, protocol, answer string
		ports                  []int // to which the proxy allows CONNECT
		status                 int
		body                   string
		tunnels                bool
	}{
		{"forbidden", "websocket", "HTTP/1.1 403 Forbidden\nContent-Length: 0\n\n", nil, 101, "", true},
		{"not implemented", "websocket", "HTTP/1.1 501 Not Implemented\nContent-Length: 0\n\n", nil, 101, "", true},
		{"body that ends with the connection", "websocket", "HTTP/1.1 403 Forbidden\nConnection: close\n\nno", nil, 101, "", true},
		// Of a server that has not seen the Upgrade, because the proxy took it away.
		{"bad request", "websocket", "HTTP/1.1 400 Bad Request\nContent-Length: 0\n\n", nil, 101, "", true},
		{"upgrade required", "websocket", "HTTP/1.1 426 Upgrade Required\nUpgrade: websocket\nContent-Length: 0\n\n", nil, 101, "", true},
		{"as if nothing was asked", "websocket", ok, nil, 101, "", true},
		{"in chunks", "websocket", "HTTP/1.1 404 Not Found\nTransfer-Encoding: chunked\n\n2\nno\n0\n\n", nil, 101, "", true},
		{"forbidden, and no tunnel", "websocket", "HTTP/1.1 403 Forbidden\nContent-Length: 2\n\nno", []int{443}, 403, "no", false},
		{"another protocol", "x-other", "HTTP/1.1 501 Not Implemented\nContent-Length: 0\n\n", nil, 101, "", true},
		{"another protocol that is optional", "x-other", ok, nil, 200, "ok", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.proxy.Change(func() { w.proxy.NoUpgrade, w.proxy.Ports = lines(test.answer), test.ports })
			g := w.gateway()
			for i, address := range both {
				host := named(address)
				c := w.converse(address, 80)
				c.say("GET /chat HTTP/1.1\nHost: " + host + "\nConnection: keep-alive, Upgrade\nUpgrade: " + test.protocol + "\nSec-WebSocket-Version: 13\n\n")
				response, err := http.ReadResponse(c.reader, nil)
				must(t, err)
				if response.StatusCode != test.status || response.Header.Get("Proxy-Status") != "" {
					t.Fatalf("%s %v", response.Status, response.Header)
				}
				if test.status == http.StatusSwitchingProtocols {
					io.WriteString(c, "frames")
					must(t, c.CloseWrite())
					if echo, err := io.ReadAll(c.reader); err != nil || string(echo) != "frames" {
						t.Errorf("echoed %q, %v", echo, err)
					}
				} else if body, err := io.ReadAll(response.Body); err != nil || string(body) != test.body {
					t.Errorf("%q, %v", body, err)
				}
				if tunnelled := slices.Contains(w.proxy.Targets(), host+":80"); tunnelled != test.tunnels {
					t.Errorf("the proxy saw CONNECT %q", w.proxy.Targets())
				}
				if f := g.waitFlows(i + 1)[i]; f.Message != "request" || f.Status != test.status || f.URL != "http://"+host+"/chat" || f.End != "done" {
					t.Errorf("access line %+v", f)
				}
			}
			// The proxy saw the question as it was put, with the gateway's own credential.
			want := lines("GET http://origin.test/chat HTTP/1.1\nHost: origin.test\nSec-WebSocket-Version: 13\nConnection: Upgrade\nUpgrade: " + test.protocol + "\n" + credential + "\n")
			if streams := strings.Join(w.proxy.Streams(), ""); !strings.HasPrefix(streams, want) {
				t.Errorf("the proxy received %q and not %q", streams, want)
			}
		})
	}
}

// TestUpgradeWithABody: what has gone to the proxy with the request cannot be sent
// through a tunnel once more.
func TestUpgradeWithABody(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.NoUpgrade = "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno" })
	w.gateway()
	c := w.converse(both[0], 80)
	c.say("POST /chat HTTP/1.1\nHost: origin.test\nConnection: Upgrade\nUpgrade: websocket\nContent-Length: 4\n\nbody")
	if response, body := c.hear(); response.StatusCode != http.StatusForbidden || body != "no" {
		t.Errorf("%s %q", response.Status, body)
	}
	if targets := w.proxy.Targets(); len(targets) > 0 {
		t.Errorf("the proxy saw CONNECT %q", targets)
	}
}
