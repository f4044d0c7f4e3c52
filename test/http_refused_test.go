package test

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// smuggled are requests that two readers could take for different ones, or that are
// malformed (RFC 9112 sections 2.2, 3, 5.1, 5.2, 6.1, 6.3 and 11.2). \n stands for CRLF.
// The request line is well-formed in all of them: what does not begin with one is not
// taken for HTTP, and tunnelled.
var smuggled = []struct{ name, request string }{
	{"both lengths", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: 30\nTransfer-Encoding: chunked\n\n0\n\n"},
	{"both lengths, the other way round", "POST / HTTP/1.1\nHost: origin.test\nTransfer-Encoding: chunked\nContent-Length: 3\n\n0\n\n"},
	{"two lengths", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: 5\nContent-Length: 6\n\nhello"},
	{"the same length twice", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: 5\nContent-Length: 5\n\nhello"},
	{"list of lengths", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: 5, 5\n\nhello"},
	{"signed length", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: +5\n\nhello"},
	{"negative length", "POST / HTTP/1.1\nHost: origin.test\nContent-Length: -5\n\nhello"},
	{"coding that is not chunked", "POST / HTTP/1.1\nHost: origin.test\nTransfer-Encoding: gzip, chunked\n\n0\n\n"},
	{"almost chunked", "POST / HTTP/1.1\nHost: origin.test\nTransfer-Encoding: xchunked\n\n0\n\n"},
	{"chunked twice", "POST / HTTP/1.1\nHost: origin.test\nTransfer-Encoding: chunked, chunked\n\n0\n\n"},
	{"chunked in HTTP/1.0", "POST / HTTP/1.0\nHost: origin.test\nTransfer-Encoding: chunked\n\n0\n\n"},
	{"obs-fold", "GET / HTTP/1.1\nHost: origin.test\nX: y\n folded\n\n"},
	{"obs-fold with a tab", "GET / HTTP/1.1\nHost: origin.test\nX: y\n\tfolded\n\n"},
	{"white space before the first field", "GET / HTTP/1.1\n Host: origin.test\n\n"},
	{"space before a colon", "POST / HTTP/1.1\nHost: origin.test\nContent-Length : 5\n\nhello"},
	{"tab before a colon", "POST / HTTP/1.1\nHost: origin.test\nContent-Length\t: 5\n\nhello"},
	{"no colon", "GET / HTTP/1.1\nHost: origin.test\nX\n\n"},
	{"bare CR", "GET / HTTP/1.1\nHost: origin.test\nX: a\rContent-Length: 5\n\nhello"},
	{"NUL", "GET / HTTP/1.1\nHost: origin.test\nX: a\x00b\n\n"},
	{"no Host", "GET / HTTP/1.1\nX: y\n\n"},
	{"two Hosts", "GET / HTTP/1.1\nHost: origin.test\nHost: six.test\n\n"},
	{"two Hosts, HTTP/1.0", "GET / HTTP/1.0\nHost: origin.test\nHost: six.test\n\n"},
	{"user in Host", "GET / HTTP/1.1\nHost: six.test@origin.test\n\n"},
	{"path in Host", "GET / HTTP/1.1\nHost: origin.test/six.test\n\n"},
	{"list in Host", "GET / HTTP/1.1\nHost: origin.test, six.test\n\n"},
	{"malformed Host beside absolute form", "GET http://origin.test/ HTTP/1.1\nHost: a b\n\n"},
}

// bareLF are those in which \n is LF alone.
var bareLF = []struct{ name, request string }{
	{"LF only", "GET / HTTP/1.1\nHost: origin.test\n\n"},
	{"LF behind the request line", "GET / HTTP/1.1\nHost: origin.test\r\n\r\n"},
	{"LF behind a field", "GET / HTTP/1.1\r\nHost: origin.test\nX: y\r\n\r\n"},
	{"LF for the empty line", "GET / HTTP/1.1\r\nHost: origin.test\r\n\n"},
}

// behind is what an attacker wants to be taken for a request of its own.
const behind = "GET /behind HTTP/1.1\r\nHost: origin.test\r\n\r\n"

// TestSmugglingBytes sends each as the second request of a connection, when there is a
// connection to the next hop that waits for one: 400 comes back and the end, and what
// the next hop has received is the first request, byte for byte, as often as it was sent.
func TestSmugglingBytes(t *testing.T) {
	const first = "GET /first HTTP/1.1\r\nHost: origin.test\r\n"
	w := newWorld(t)
	g := w.gateway()
	sent := 0
	try := func(t *testing.T, request string) {
		sent++
		address := both[sent%len(both)]
		c := w.converse(address, 80)
		c.t = t
		_, err := io.WriteString(c, first+"\r\n")
		must(t, err)
		if response, body := c.hear(); response.StatusCode != http.StatusOK || body != "origin http://origin.test/first" {
			t.Fatalf("%s %q", response.Status, body)
		}
		_, err = io.WriteString(c, request+behind)
		must(t, err)
		response, _ := c.hear()
		if response.StatusCode != http.StatusBadRequest || !strings.HasPrefix(response.Header.Get("Proxy-Status"), "transproxy-tproxy; error=http_request_error") {
			t.Errorf("%s %v", response.Status, response.Header)
		}
		c.wantEnd()
	}
	for _, c := range smuggled {
		t.Run(c.name, func(t *testing.T) { try(t, lines(c.request)) })
	}
	for _, c := range bareLF {
		t.Run(c.name, func(t *testing.T) { try(t, c.request) })
	}

	head := "GET http://origin.test/first HTTP/1.1\r\nHost: origin.test\r\n" + strings.ReplaceAll(credential, "\n", "\r\n") + "\r\n"
	if got := strings.Join(w.proxy.Streams(), ""); got != strings.Repeat(head, sent) {
		t.Errorf("the proxy received %d bytes and not %d times %q:\n%q", len(got), sent, head, got)
	}
	if requests := w.proxy.Requests(); len(requests) != sent || len(w.origin.Sources()) != sent {
		t.Errorf("of %d requests %d came to the proxy and %d to the origin", sent, len(requests), len(w.origin.Sources()))
	}
	for _, f := range g.waitFlows(2 * sent) {
		if f.Status == http.StatusBadRequest && (f.End == "done" || f.Way != "" || f.Message != "request") {
			t.Errorf("access line %+v", f)
		}
	}
}

// TestSmugglingBytesDirectly: an exempt server sees none of it either.
func TestSmugglingBytesDirectly(t *testing.T) {
	const first = "GET /status/200 HTTP/1.1\r\nHost: origin.test:8080\r\n\r\n"
	w := newHTTPWorld(t)
	w.gateway("--no-proxy", "origin.test")
	for _, c := range smuggled {
		conversation := w.converse(both[0], portWeb)
		_, err := io.WriteString(conversation, first)
		must(t, err)
		conversation.hear()
		_, err = io.WriteString(conversation, lines(c.request)+behind)
		must(t, err)
		if response, _ := conversation.hear(); response.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", c.name, response.Status)
		}
	}
	for _, stream := range w.past.Streams() {
		if stream != first {
			t.Errorf("the server received %q", stream)
		}
	}
	if streams := len(w.past.Streams()); streams != len(smuggled) {
		t.Errorf("%d connections, want %d", streams, len(smuggled))
	}
}

// TestSmuggledChunks: a body that goes wrong when its head is with the proxy already
// does not end there, and nothing behind it arrives.
func TestSmuggledChunks(t *testing.T) {
	for name, body := range map[string]string{
		"no number":         "x\r\nhello\r\n0\r\n\r\n",
		"sign":              "+5\r\nhello\r\n0\r\n\r\n",
		"prefix":            "0x5\r\nhello\r\n0\r\n\r\n",
		"too large":         "10000000000000005\r\nhello\r\n0\r\n\r\n",
		"LF behind size":    "5\nhello\r\n0\r\n\r\n",
		"LF behind data":    "5\r\nhello\n0\r\n\r\n",
		"longer than said":  "5\r\nhello!\r\n0\r\n\r\n",
		"malformed trailer": "5\r\nhello\r\n0\r\nX : y\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.gateway()
			c := w.converse(both[0], 80)
			_, err := io.WriteString(c, "POST / HTTP/1.1\r\nHost: origin.test\r\nTransfer-Encoding: chunked\r\n\r\n"+body+behind)
			must(t, err)
			if response, _ := c.hear(); response.StatusCode != http.StatusBadRequest {
				t.Error(response.Status)
			}
			c.wantEnd()
			for _, stream := range w.proxy.Streams() {
				if strings.Contains(stream, "0\r\n\r\n") || strings.Contains(stream, "behind") {
					t.Errorf("the proxy received %q", stream)
				}
			}
		})
	}
}
