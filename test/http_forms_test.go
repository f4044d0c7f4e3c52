package test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// webForms are exchanges with a server of net/http that have to look to the client as
// if there was no gateway. HOST stands for the server's name, \n for CRLF.
var webForms = []struct {
	name, request string
	interim       int    // the status that comes first; 0 for none
	then          string // what the client sends after that
	status        int
	body          string
	length        int64  // the Content-Length of the answer; 0 for whatever there is
	trailer       string // the value of X-Sum in the trailer section
	closes        bool   // the connection ends with the answer
}{
	{name: "body with a length", request: "POST /echo HTTP/1.1\nHost: HOST\nContent-Length: 5\n\nhello", status: 200, body: "hello"},
	{name: "empty body", request: "POST /echo HTTP/1.1\nHost: HOST\nContent-Length: 0\n\n", status: 200},
	{
		name:    "chunks and trailers both ways",
		request: "POST /echo HTTP/1.1\nHost: HOST\nTE: trailers\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n5\nhello\n6;a=b\n world\n0\nX-Sum: 11\n\n",
		status:  200, body: "hello world", trailer: "11",
	},
	{name: "HEAD", request: "HEAD /sized/1000 HTTP/1.1\nHost: HOST\n\n", status: 200, length: 1000},
	{name: "204", request: "GET /status/204 HTTP/1.1\nHost: HOST\n\n", status: 204},
	{name: "304", request: "GET /status/304 HTTP/1.1\nHost: HOST\nIf-None-Match: \"a\"\n\n", status: 304},
	{name: "server error", request: "GET /status/500 HTTP/1.1\nHost: HOST\n\n", status: 500, body: "500"},
	{name: "early hints", request: "GET /hints HTTP/1.1\nHost: HOST\n\n", interim: 103, status: 200, body: "hinted"},
	{
		name: "100-continue", request: "POST /echo HTTP/1.1\nHost: HOST\nExpect: 100-continue\nContent-Length: 5\n\n",
		interim: 100, then: "hello", status: 200, body: "hello",
	},
	{
		// The client may send the body or not: this one does not, and goes.
		name: "100-continue refused", request: "POST /refuse HTTP/1.1\nHost: HOST\nExpect: 100-continue\nContent-Length: 5\n\n",
		status: 417, closes: true,
	},
	{name: "close", request: "GET /status/200 HTTP/1.1\nHost: HOST\nConnection: close\n\n", status: 200, body: "200", closes: true},
	{name: "HTTP/1.0", request: "POST /echo HTTP/1.0\nHost: HOST\nContent-Length: 5\n\nhello", status: 200, body: "hello", closes: true},
	{name: "HTTP/1.0 kept", request: "GET /sized/0 HTTP/1.0\nHost: HOST\nConnection: keep-alive\n\n", status: 200},
	{name: "absolute form", request: "GET http://HOST/status/200 HTTP/1.1\nHost: HOST\n\n", status: 200, body: "200"},
}

// TestWebForms sends each by each way. Where the connection stays, a second request
// shows that both sides agree where the first one ended.
func TestWebForms(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, v way, address netip.Addr) {
		for _, form := range webForms {
			t.Run(form.name, func(t *testing.T) {
				c := w.converse(address, portWeb)
				c.t = t
				host := named(address)
				method, _, _ := strings.Cut(form.request, " ")
				c.say(strings.ReplaceAll(form.request, "HOST", host))
				if form.interim != 0 {
					if response, _ := c.hear(); response.StatusCode != form.interim {
						t.Fatalf("%s comes first, want %d", response.Status, form.interim)
					}
					c.say(form.then)
				}
				response, body := c.hearTo(method)
				if response.StatusCode != form.status || body != form.body {
					t.Errorf("%s %q, want %d %q", response.Status, body, form.status, form.body)
				}
				if got := response.Header.Get("X-Origin"); got != v.origin {
					t.Errorf("answered by %q, want %q", got, v.origin)
				}
				if form.length != 0 && response.ContentLength != form.length {
					t.Errorf("Content-Length %d, want %d", response.ContentLength, form.length)
				}
				if got := response.Trailer.Get("X-Sum"); got != form.trailer {
					t.Errorf("X-Sum: %q in the trailers, want %q", got, form.trailer)
				}
				if own := response.Header.Get("Proxy-Status") + response.Header.Get("Via"); own != "" {
					t.Errorf("the gateway shows itself: %q", own)
				}
				if form.closes {
					c.wantEnd()
					return
				}
				c.ask("GET /status/200 HTTP/1.1\nHost: "+host+"\n\n", "200")
			})
		}
	})
}

// TestWebPipelined: requests that come at once are answered in their order, though the
// first one's answer takes the longest.
func TestWebPipelined(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		c := w.converse(address, portWeb)
		var all strings.Builder
		for _, request := range []string{"POST /echo", "GET /status/201", "GET /status/202"} {
			all.WriteString(request + " HTTP/1.1\nHost: " + named(address) + "\nContent-Length: 3\n\nabc")
		}
		c.say(all.String())
		for _, want := range []struct {
			status int
			body   string
		}{{200, "abc"}, {201, "201"}, {202, "202"}} {
			if response, body := c.hear(); response.StatusCode != want.status || body != want.body {
				t.Errorf("%s %q, want %+v", response.Status, body, want)
			}
		}
	})
}

// TestWebEarlyAnswer: the server answers while it reads. The client sees the answer's
// begin before it has sent the rest of its body, which then arrives whole.
func TestWebEarlyAnswer(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		c := w.converse(address, portWeb)
		const half = 100 << 10 // bytes: more than one read takes
		c.say(fmt.Sprintf("POST /early HTTP/1.1\nHost: %s\nContent-Length: %d\n\n", named(address), 2*half))
		c.say(strings.Repeat("x", half))
		response, err := http.ReadResponse(c.reader, nil)
		must(t, err)
		line := make([]byte, len("early\n"))
		_, err = io.ReadFull(response.Body, line)
		must(t, err)
		c.say(strings.Repeat("y", half))
		rest, err := io.ReadAll(response.Body)
		if err != nil || string(line)+string(rest) != fmt.Sprintf("early\n%d\n", 2*half) {
			t.Errorf("%q and then %q, %v", line, rest, err)
		}
	})
}

// TestWebLongBodies: more than any buffer holds, both ways at once.
func TestWebLongBodies(t *testing.T) {
	const size = 8 << 20 // bytes
	digest := sha256.New()
	io.CopyN(digest, lab.Noise(), size)
	want := digest.Sum(nil)
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		for name, framing := range map[string]string{"length": fmt.Sprintf("Content-Length: %d", size), "chunks": "Transfer-Encoding: chunked"} {
			c := w.converse(address, portWeb)
			c.say("POST /echo HTTP/1.1\nHost: " + named(address) + "\n" + framing + "\n\n")
			sent := make(chan error, 1)
			go func() { sent <- sendNoise(c, size, name == "chunks") }()
			response, err := http.ReadResponse(c.reader, nil)
			must(t, err)
			digest := sha256.New()
			n, err := io.Copy(digest, response.Body)
			if got := digest.Sum(nil); err != nil || n != size || string(got) != string(want) {
				t.Errorf("%s: %d bytes, sha256 %x, %v; want %d, %x", name, n, got, err, size, want)
			}
			must(t, <-sent)
			// An answer that begins before the body has ended may be the last.
			if response.Close {
				c.wantEnd()
			} else {
				c.ask("GET /status/200 HTTP/1.1\nHost: "+named(address)+"\n\n", "200")
			}
		}
	})
}

// sendNoise sends a body of that many bytes.
func sendNoise(to io.Writer, size int64, chunks bool) error {
	if !chunks {
		_, err := io.CopyN(to, lab.Noise(), size)
		return err
	}
	source, buffer := io.LimitReader(lab.Noise(), size), make([]byte, 60_000) // no divisor of any buffer's size
	for {
		n, err := io.ReadFull(source, buffer)
		if n > 0 {
			if _, err := fmt.Fprintf(to, "%x\r\n%s\r\n", n, buffer[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			_, err = io.WriteString(to, "0\r\n\r\n")
			return err
		}
	}
}

// TestWebUpgrade switches protocols where no proxy has a word in it, with bytes of
// the new protocol in the segment of the request.
func TestWebUpgrade(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		c := w.converse(address, portWeb)
		c.say("GET /upgrade HTTP/1.1\nHost: " + named(address) + "\nConnection: Upgrade\nUpgrade: websocket\n\nearly")
		response, err := http.ReadResponse(c.reader, nil)
		must(t, err)
		if response.StatusCode != http.StatusSwitchingProtocols {
			t.Fatal(response.Status)
		}
		io.WriteString(c, " and late")
		must(t, c.CloseWrite())
		if echo, err := io.ReadAll(c.reader); err != nil || string(echo) != "early and late" {
			t.Errorf("echoed %q, %v", echo, err)
		}
	})
}

// TestWebRequestInPieces: a head byte by byte, as a terminal sends it, is one request
// to the peeking engine as well as to the forwarder.
func TestWebRequestInPieces(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		c := w.converse(address, portWeb)
		must(t, c.SetNoDelay(true))
		for _, b := range []byte(lines("POST /echo HTTP/1.1\nHost: " + named(address) + "\nContent-Length: 2\n\nhi")) {
			_, err := c.Write([]byte{b})
			must(t, err)
			time.Sleep(time.Millisecond)
		}
		if response, body := c.hear(); response.StatusCode != 200 || body != "hi" {
			t.Errorf("%s %q", response.Status, body)
		}
	})
}

// TestWebHalfClosedClient: a client that has nothing more to ask may say so at once, as
// `printf … | nc -N` does, and gets its answer.
func TestWebHalfClosedClient(t *testing.T) {
	eachWay(t, func(t *testing.T, w *httpWorld, _ way, address netip.Addr) {
		c := w.converse(address, portWeb)
		c.say("POST /echo HTTP/1.1\nHost: " + named(address) + "\nContent-Length: 2\n\nhi")
		must(t, c.CloseWrite())
		if response, body := c.hear(); response.StatusCode != 200 || body != "hi" {
			t.Errorf("%s %q", response.Status, body)
		}
		c.wantEnd()
	})
}
