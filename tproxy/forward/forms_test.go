package forward

import (
	"io"
	"net"
	"strings"
	"testing"
)

// form is one request and its answer, as seen on both sides of the gateway. \n stands
// for CRLF in all of them.
type exchangeForm struct {
	rfc, name string
	kind      Kind
	client    string // what the client sends
	hop       string // what the next hop gets
	answer    string // what it answers
	got       string // what the client gets
	closes    bool   // the gateway closes the client's connection behind it
	hopCloses bool   // the next hop closes its connection behind the answer
	via       bool
	tunnel    bool // what is behind the heads is that of a tunnel
}

// forms are the forms of messages that have to come out right. Nothing else may
// differ between the two sides.
var forms = []exchangeForm{
	{
		rfc: "9112 3.2.2", name: "origin form becomes absolute form",
		client: "GET /a?b=c HTTP/1.1\nHost: origin.test\nAccept: */*\n\n",
		hop:    "GET http://origin.test/a?b=c HTTP/1.1\nHost: origin.test\nAccept: */*\n\n",
	},
	{
		rfc: "9112 3.2.2", name: "absolute form wins over Host",
		client: "GET http://origin.test/x HTTP/1.1\nHost: other.test\n\n",
		hop:    "GET http://origin.test/x HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9112 3.2.1", name: "an empty path is /",
		client: "GET http://origin.test HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9112 3.2.1", name: "a query without a path",
		client: "GET http://origin.test?q HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/?q HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9112 3.2.4", name: "asterisk form loses its path",
		client: "OPTIONS * HTTP/1.1\nHost: origin.test\n\n",
		hop:    "OPTIONS http://origin.test HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9112 3.2", name: "HTTP/1.0 without Host goes to the original destination",
		client: "GET / HTTP/1.0\n\n",
		hop:    "GET http://203.0.113.7/ HTTP/1.1\nHost: 203.0.113.7\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nok", closes: true,
	},
	{
		rfc: "9112 3.2", name: "an empty Host is none",
		client: "GET / HTTP/1.1\nHost:\n\n",
		hop:    "GET http://203.0.113.7/ HTTP/1.1\nHost: 203.0.113.7\n\n",
	},
	{
		rfc: "9112 9.3", name: "HTTP/1.0 with keep-alive",
		client: "GET / HTTP/1.0\nHost: origin.test\nConnection: keep-alive\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: keep-alive\n\nok",
	},
	{
		rfc: "9110 4.2.1", name: "the port is the one that the client dialled",
		client: "GET / HTTP/1.1\nHost: origin.test:8080\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9110 7.2", name: "a Host that the DNS cannot know is not believed",
		client: "GET / HTTP/1.1\nHost: localhost\n\n",
		hop:    "GET http://203.0.113.7/ HTTP/1.1\nHost: 203.0.113.7\n\n",
	},
	{
		rfc: "9110 7.2", name: "a Host that is another address is not believed",
		client: "GET / HTTP/1.1\nHost: 127.0.0.1\n\n",
		hop:    "GET http://203.0.113.7/ HTTP/1.1\nHost: 203.0.113.7\n\n",
	},
	{
		rfc: "9110 7.2", name: "an exempt host gets origin form and its own Host",
		client: "GET /x HTTP/1.1\nHost: direct.test:80\nAccept: a\n\n",
		hop:    "GET /x HTTP/1.1\nHost: direct.test:80\nAccept: a\n\n",
	},
	{
		rfc: "9112 2.2", name: "an empty line before the request is ignored",
		client: "\nGET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9110 7.6.1", name: "hop-by-hop fields of a request end here",
		client: "GET / HTTP/1.1\nHost: origin.test\nConnection: keep-alive, X-Hop\nKeep-Alive: 5\nX-Hop: 1\nProxy-Connection: keep-alive\nX-End: 2\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nX-End: 2\n\n",
	},
	{
		rfc: "9110 7.6.1", name: "Connection does not take away what frames or routes",
		client: "POST / HTTP/1.1\nHost: origin.test\nConnection: content-length, host\nContent-Length: 2\n\nhi",
		hop:    "POST http://origin.test/ HTTP/1.1\nHost: origin.test\nContent-Length: 2\n\nhi",
	},
	{
		rfc: "9110 11.7.1", name: "a captured client's proxy credential ends here",
		client: "GET / HTTP/1.1\nHost: origin.test\nProxy-Authorization: Basic eHg6eHg=\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9110 11.7.1", name: "an explicit client's goes on", kind: Passing,
		client: "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nProxy-Authorization: Basic eHg6eHg=\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nProxy-Authorization: Basic eHg6eHg=\n\n",
	},
	{
		rfc: "9110 11.7.1", name: "and so does the challenge to it", kind: Passing,
		client: "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 407 Proxy Authentication Required\nProxy-Authenticate: Basic realm=\"x\"\nContent-Length: 0\n\n",
		got:    "HTTP/1.1 407 Proxy Authentication Required\nContent-Length: 0\nProxy-Authenticate: Basic realm=\"x\"\n\n",
	},
	{
		rfc: "9110 3.7", name: "the port of absolute form is kept for explicit clients", kind: Authenticating,
		client: "GET http://origin.test:8080/ HTTP/1.1\nHost: origin.test:8080\n\n",
		hop:    "GET http://origin.test:8080/ HTTP/1.1\nHost: origin.test:8080\n\n",
	},
	{
		rfc: "9110 10.1.4", name: "TE: trailers is said anew",
		client: "GET / HTTP/1.1\nHost: origin.test\nTE: trailers, deflate;q=0.5\nConnection: TE\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nConnection: TE\nTE: trailers\n\n",
	},
	{
		rfc: "9113 3.1", name: "an upgrade to h2c is not passed on",
		client: "GET / HTTP/1.1\nHost: origin.test\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAA\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
	},
	{
		rfc: "9110 7.6.2", name: "Max-Forwards is counted down",
		client: "OPTIONS /x HTTP/1.1\nHost: origin.test\nMax-Forwards: 5\n\n",
		hop:    "OPTIONS http://origin.test/x HTTP/1.1\nHost: origin.test\nMax-Forwards: 4\n\n",
	},
	{
		rfc: "9110 7.6.2", name: "Max-Forwards 0 is answered here",
		client: "TRACE / HTTP/1.1\nHost: origin.test\nMax-Forwards: 0\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Type: text/plain\nContent-Length: 0\nCache-Control: no-store\nConnection: keep-alive\n\n",
	},
	{
		rfc: "9110 7.6.3", name: "Via when asked for", via: true,
		client: "GET / HTTP/1.1\nHost: origin.test\nVia: 1.0 fred\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nVia: 1.0 fred, 1.1 transproxy-tproxy\nX-Forwarded-For: 192.168.1.9\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\nVia: 1.1 transproxy-tproxy\n\nok",
	},
	{
		rfc: "9112 6.3", name: "a body by Content-Length",
		client: "POST /p HTTP/1.1\nHost: origin.test\nContent-Length: 5\n\nhello",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nContent-Length: 5\n\nhello",
	},
	{
		rfc: "9112 6.3", name: "Content-Length 0",
		client: "POST /p HTTP/1.1\nHost: origin.test\nContent-Length: 0\n\n",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nContent-Length: 0\n\n",
	},
	{
		rfc: "9112 7.1", name: "a chunked body",
		client: "POST /p HTTP/1.1\nHost: origin.test\nTransfer-Encoding: chunked\n\n5\nhello\n0A\n0123456789\n0\n\n",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nTransfer-Encoding: chunked\n\n5\nhello\na\n0123456789\n0\n\n",
	},
	{
		rfc: "9112 7.1.1", name: "chunk extensions end here",
		client: "POST /p HTTP/1.1\nHost: origin.test\nTransfer-Encoding: Chunked\n\n5;a=b;c=\"d\"\nhello\n0;last\n\n",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nTransfer-Encoding: chunked\n\n5\nhello\n0\n\n",
	},
	{
		rfc: "9112 7.1.2", name: "trailers of a request, but for those that frame",
		client: "POST /p HTTP/1.1\nHost: origin.test\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n1\nx\n0\nX-Sum: 1\nContent-Length: 7\n\n",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nTrailer: X-Sum\nTransfer-Encoding: chunked\n\n1\nx\n0\nX-Sum: 1\n\n",
	},
	{
		rfc: "9110 10.1.1", name: "Expect goes on to the server",
		client: "POST /p HTTP/1.1\nHost: origin.test\nExpect: 100-continue\nContent-Length: 2\n\nhi",
		hop:    "POST http://origin.test/p HTTP/1.1\nHost: origin.test\nExpect: 100-continue\nContent-Length: 2\n\nhi",
		answer: "HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9110 15.2", name: "an HTTP/1.0 client gets no interim answer",
		client: "GET / HTTP/1.0\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nok", closes: true,
	},
	{
		rfc: "8297 2", name: "103 (Early Hints) is passed on",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9110 9.3.2", name: "the answer to HEAD has no body whatever it says",
		client: "HEAD / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "HEAD http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nContent-Length: 1000\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Length: 1000\n\n",
	},
	{
		rfc: "9110 15.4.5", name: "nor has 304",
		client: "GET / HTTP/1.1\nHost: origin.test\nIf-None-Match: \"x\"\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\nIf-None-Match: \"x\"\n\n",
		answer: "HTTP/1.1 304 Not Modified\nETag: \"x\"\nContent-Length: 1000\n\n",
		got:    "HTTP/1.1 304 Not Modified\nETag: \"x\"\nContent-Length: 1000\n\n",
	},
	{
		rfc: "9110 15.3.5", name: "nor has 204",
		client: "DELETE / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "DELETE http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 204 No Content\n\n",
		got:    "HTTP/1.1 204 No Content\n\n",
	},
	{
		rfc: "9112 7.1", name: "a chunked answer",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2;x\nok\n0\nX-Sum: 1\n\n",
		got:    "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-Sum: 1\n\n",
	},
	{
		rfc: "9112 7.1.3", name: "a chunked answer for an HTTP/1.0 client",
		client: "GET / HTTP/1.0\nHost: origin.test\nConnection: keep-alive\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n",
		got:    "HTTP/1.1 200 OK\nConnection: close\n\nok", closes: true,
	},
	{
		rfc: "9112 6.3", name: "an answer that ends with the connection",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\n\nall of it", hopCloses: true,
		got: "HTTP/1.1 200 OK\nConnection: close\n\nall of it", closes: true,
	},
	{
		rfc: "9112 9.3", name: "an HTTP/1.0 answer", hopCloses: true,
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.0 200 OK\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9112 9.6", name: "a client that asks for the close gets it",
		client: "GET / HTTP/1.1\nHost: origin.test\nConnection: close\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		got:    "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\n\nok", closes: true,
	},
	{
		rfc: "9110 7.6.1", name: "hop-by-hop fields of an answer end here",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nConnection: X-Hop\nX-Hop: 1\nKeep-Alive: timeout=5\nSet-Cookie: a\nSet-Cookie: b\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 OK\nSet-Cookie: a\nSet-Cookie: b\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9112 4", name: "a status line without a reason",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 \nContent-Length: 2\n\nok",
	},
	{
		rfc: "9112 5.1", name: "space before a colon of an answer goes",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nX-A : b\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 OK\nX-A: b\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9112 5.2", name: "a folded field of an answer is unfolded",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 200 OK\nX-A: b\n\tc\nContent-Length: 2\n\nok",
		got:    "HTTP/1.1 200 OK\nX-A: b \tc\nContent-Length: 2\n\nok",
	},
	{
		rfc: "9110 15.5.22", name: "426 says what to upgrade to",
		client: "GET / HTTP/1.1\nHost: origin.test\n\n",
		hop:    "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		answer: "HTTP/1.1 426 Upgrade Required\nConnection: Upgrade\nUpgrade: websocket\nContent-Length: 0\n\n",
		got:    "HTTP/1.1 426 Upgrade Required\nContent-Length: 0\nConnection: Upgrade\nUpgrade: websocket\n\n",
	},
	{
		rfc: "9110 7.8", name: "an upgrade",
		client: "GET /chat HTTP/1.1\nHost: origin.test\nConnection: keep-alive, Upgrade\nUpgrade: websocket\nSec-WebSocket-Key: a\n\nearly",
		hop:    "GET http://origin.test/chat HTTP/1.1\nHost: origin.test\nSec-WebSocket-Key: a\nConnection: Upgrade\nUpgrade: websocket\n\nearly",
		answer: "HTTP/1.1 101 Switching Protocols\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Accept: b\n\nlater", hopCloses: true, tunnel: true,
		got: "HTTP/1.1 101 Switching Protocols\nSec-WebSocket-Accept: b\nConnection: Upgrade\nUpgrade: websocket\n\nlater", closes: true,
	},
	{
		rfc: "9110 9.3.6", name: "CONNECT with the client's credential", kind: Passing,
		client: "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\nProxy-Authorization: Basic eHg6eHg=\n\nhello",
		hop:    "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\nProxy-Authorization: Basic eHg6eHg=\n\nhello",
		answer: "HTTP/1.1 200 Fine\nContent-Length: 7\n\nworld", hopCloses: true, tunnel: true,
		got: "HTTP/1.1 200 Fine\n\nworld", closes: true,
	},
	{
		rfc: "9110 9.3.6", name: "CONNECT with the gateway's", kind: Authenticating,
		client: "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\n\nhello",
		hop:    "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\n\nhello",
		answer: "HTTP/1.1 200 Fine\n\nworld", hopCloses: true, tunnel: true,
		got: "HTTP/1.1 200 Connection established\n\nworld", closes: true,
	},
}

// TestForms sends each form through the gateway.
func TestForms(t *testing.T) {
	if len(forms) < 40 {
		t.Fatalf("only %d forms", len(forms))
	}
	for _, f := range forms {
		t.Run(strings.ReplaceAll(f.rfc+" "+f.name, "/", "|"), func(t *testing.T) { f.test(t) })
	}
}

func (f exchangeForm) test(t *testing.T) {
	crlf := func(text string) string { return strings.ReplaceAll(text, "\n", "\r\n") }
	if f.answer == "" {
		f.answer = "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"
	}
	if f.got == "" {
		f.got = "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"
	}
	hop, got := crlf(f.hop), crlf(f.got)
	p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
		head := len(hop)
		if f.tunnel {
			head = strings.Index(hop, "\r\n\r\n") + len("\r\n\r\n")
		}
		if !p.read(conn, head) {
			return
		}
		io.WriteString(conn, crlf(f.answer))
		if f.hopCloses {
			conn.CloseWrite()
		}
		p.drain(conn)
	})
	w := newWorld(t, p, "", func(c *Config) { c.Via, c.ForwardedFor = f.via, f.via })
	client := w.client(t, f.kind)
	if _, err := io.WriteString(client, crlf(f.client)); err != nil {
		t.Fatal(err)
	}
	// One byte more than is expected shows what is too much, and a close.
	received := make([]byte, len(got)+1)
	n := 0
	var err error
	if f.closes {
		n, err = io.ReadFull(client, received)
		if err != io.ErrUnexpectedEOF {
			t.Errorf("behind the answer: %v, and not the end", err)
		}
	} else {
		n, err = io.ReadFull(client, received[:len(got)])
		if err != nil {
			t.Errorf("reading the answer: %v", err)
		}
	}
	if string(received[:n]) != got {
		t.Errorf("the client got %q,\nwant %q", received[:n], got)
	}
	client.CloseWrite()
	rest, err := io.ReadAll(client)
	if err != nil || len(rest) > 0 {
		t.Errorf("the client then got %q and %v, want the end", rest, err)
	}
	p.expect(t, hop)
}
