package forward

import (
	"io"
	"net"
	"strings"
	"testing"
)

// refused are requests that two readers could take for different ones, or that are
// none. \n stands for CRLF.
var refused = []struct{ name, request string }{
	{"both lengths", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 5\nTransfer-Encoding: chunked\n\n0\n\n"},
	{"both lengths, the other way round", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: chunked\nContent-Length: 5\n\n0\n\n"},
	{"two lengths", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 5\nContent-Length: 6\n\nhello"},
	{"two lengths that agree", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 5\nContent-Length: 5\n\nhello"},
	{"a list of lengths", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 5, 5\n\nhello"},
	{"a signed length", "POST / HTTP/1.1\nHost: a.test\nContent-Length: +5\n\nhello"},
	{"a negative length", "POST / HTTP/1.1\nHost: a.test\nContent-Length: -5\n\nhello"},
	{"a hexadecimal length", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 0x5\n\nhello"},
	{"a length with an underscore", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 1_0\n\nhello"},
	{"an empty length", "POST / HTTP/1.1\nHost: a.test\nContent-Length:\n\nhello"},
	{"a length that does not fit", "POST / HTTP/1.1\nHost: a.test\nContent-Length: 18446744073709551621\n\nhello"},
	{"another coding", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: gzip, chunked\n\n0\n\n"},
	{"chunked not last", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: chunked, identity\n\n0\n\n"},
	{"chunked twice", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n0\n\n"},
	{"almost chunked", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: xchunked\n\n0\n\n"},
	{"quoted chunked", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: \"chunked\"\n\n0\n\n"},
	{"vertical tab before chunked", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding: \vchunked\n\n0\n\n"},
	{"chunked in HTTP/1.0", "POST / HTTP/1.0\nHost: a.test\nTransfer-Encoding: chunked\n\n0\n\n"},
	{"obs-fold", "POST / HTTP/1.1\nHost: a.test\nX-A: b\n c\n\n"},
	{"obs-fold with a tab", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding:\n\tchunked\n\n0\n\n"},
	{"white space before the first field", "GET / HTTP/1.1\n Host: a.test\n\n"},
	{"space before a colon", "POST / HTTP/1.1\nHost: a.test\nContent-Length : 5\n\nhello"},
	{"tab before a colon", "POST / HTTP/1.1\nHost: a.test\nTransfer-Encoding\t: chunked\n\n0\n\n"},
	{"no colon", "GET / HTTP/1.1\nHost: a.test\nX-A\n\n"},
	{"no field name", "GET / HTTP/1.1\nHost: a.test\n: b\n\n"},
	{"a field name that is no token", "GET / HTTP/1.1\nHost: a.test\nX(A): b\n\n"},
	{"CR within a field", "GET / HTTP/1.1\nHost: a.test\rX\n\n"},
	{"NUL in a value", "GET / HTTP/1.1\nHost: a.test\nX-A: b\x00c\n\n"},
	{"no Host", "GET / HTTP/1.1\nX-A: b\n\n"},
	{"two Hosts", "GET / HTTP/1.1\nHost: a.test\nHost: b.test\n\n"},
	{"two Hosts in HTTP/1.0", "GET / HTTP/1.0\nHost: a.test\nHost: b.test\n\n"},
	{"two Hosts in one", "GET / HTTP/1.1\nHost: a.test, b.test\n\n"},
	{"user information in Host", "GET / HTTP/1.1\nHost: x@a.test\n\n"},
	{"a path in Host", "GET / HTTP/1.1\nHost: a.test/b\n\n"},
	{"space in Host", "GET / HTTP/1.1\nHost: a.test b.test\n\n"},
	{"a port that is none", "GET / HTTP/1.1\nHost: a.test:80x\n\n"},
	{"two ports", "GET / HTTP/1.1\nHost: a.test:80:81\n\n"},
	{"an address that is none", "GET / HTTP/1.1\nHost: [::1\n\n"},
	{"two spaces in the request line", "GET  / HTTP/1.1\nHost: a.test\n\n"},
	{"a space in the target", "GET /a b HTTP/1.1\nHost: a.test\n\n"},
	{"a method that is no token", "G@T / HTTP/1.1\nHost: a.test\n\n"},
	{"a control character in the target", "GET /\x01 HTTP/1.1\nHost: a.test\n\n"},
	{"a target of no form", "GET a.test HTTP/1.1\nHost: a.test\n\n"},
	{"a target with user information", "GET http://x:y@a.test/ HTTP/1.1\nHost: a.test\n\n"},
	{"another scheme", "GET ftp://a.test/ HTTP/1.1\nHost: a.test\n\n"},
	{"HTTP/2", "GET / HTTP/2.0\nHost: a.test\n\n"},
	{"HTTP/0.9", "GET /\n\n"},
	{"a version that is longer", "GET / HTTP/1.10\nHost: a.test\n\n"},
	{"a CONNECT with a body", "CONNECT a.test:443 HTTP/1.1\nHost: a.test:443\nContent-Length: 5\n\nhello"},
	{"CONNECT to a server", "CONNECT a.test:443 HTTP/1.1\nHost: a.test:443\n\n"},
}

// bare are those in which it matters that \n is LF alone.
var bare = []struct{ name, request string }{
	{"LF for every line break", "GET / HTTP/1.1\nHost: a.test\n\n"},
	{"LF behind the request line", "GET / HTTP/1.1\nHost: a.test\r\n\r\n"},
	{"LF behind a field", "GET / HTTP/1.1\r\nHost: a.test\nX-A: b\r\n\r\n"},
	{"LF for the empty line", "GET / HTTP/1.1\r\nHost: a.test\r\n\n"},
	{"CR in a field", "GET / HTTP/1.1\r\nHost: a.test\r\nX-A: b\rContent-Length: 5\r\n\r\nhello"},
}

// TestRefused sends each and sees that it is answered with 400, that the connection
// ends, and that the next hop does not even see a connection.
func TestRefused(t *testing.T) {
	p := newPeer(t, func(_ *peer, conn *net.TCPConn, _ int) { conn.Close() })
	w := newWorld(t, p, "", nil)
	try := func(name, request, status string) {
		t.Run(name, func(t *testing.T) {
			client := w.client(t, Captured)
			io.WriteString(client, request+"GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n")
			answer, err := io.ReadAll(client)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+status) {
				t.Errorf("answered %.100q, %v", answer, err)
			}
			if strings.Count(string(answer), "\r\nProxy-Status: ") != 1 {
				t.Errorf("more than one answer: %q", answer)
			}
			if !strings.Contains(string(answer), "\r\nProxy-Status: transproxy-tproxy; error=http_request_error; ") {
				t.Errorf("no Proxy-Status in %q", answer)
			}
		})
	}
	for _, c := range refused {
		status := "400"
		if c.name == "CONNECT to a server" {
			status = "405"
		}
		try(c.name, strings.ReplaceAll(c.request, "\n", "\r\n"), status)
	}
	for _, c := range bare {
		try(c.name, c.request, "400")
	}
	try("a head that does not end", "GET / HTTP/1.1\r\nHost: a.test\r\nX: "+strings.Repeat("x", maxHead)+"\r\n", "431")
	try("too many fields", "GET / HTTP/1.1\r\nHost: a.test\r\n"+strings.Repeat("X: y\r\n", maxFields)+"\r\n", "400")
	if p.connections() > 0 || p.saw() != "" {
		t.Errorf("the next hop saw %d connections and %q", p.connections(), p.saw())
	}
}

// chunks are bodies that are refused once their request is under way.
var chunks = []struct{ name, body string }{
	{"no number", "x\r\nhello\r\n0\r\n\r\n"},
	{"a sign", "+5\r\nhello\r\n0\r\n\r\n"},
	{"a prefix", "0x5\r\nhello\r\n0\r\n\r\n"},
	{"an empty size", "\r\nhello\r\n0\r\n\r\n"},
	{"space before the size", " 5\r\nhello\r\n0\r\n\r\n"},
	{"a size that does not fit", "10000000000000005\r\nhello\r\n0\r\n\r\n"},
	{"LF behind the size", "5\nhello\r\n0\r\n\r\n"},
	{"more data than said", "5\r\nhello!\r\n0\r\n\r\n"},
	{"a control character in an extension", "5;a\x00\r\nhello\r\n0\r\n\r\n"},
	{"an extension without an end", "5;" + strings.Repeat("a", 2*maxChunkLine)},
	{"a malformed trailer", "0\r\nX : y\r\n\r\n"},
	{"an endless trailer", "0\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 70)},
}

// TestRefusedChunks sees that a malformed chunk ends the request at the next hop
// without the end of its body, and that nothing behind it gets there.
func TestRefusedChunks(t *testing.T) {
	for _, c := range chunks {
		t.Run(c.name, func(t *testing.T) {
			p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
				data := make([]byte, 1<<16)
				for {
					n, err := conn.Read(data)
					if err != nil {
						return
					}
					if strings.Contains(string(data[:n]), "0\r\n\r\n") {
						t.Errorf("the next hop got the end of the body: %q", data[:n])
					}
					if strings.Contains(string(data[:n]), "smuggled") {
						t.Errorf("the next hop got what is behind: %q", data[:n])
					}
				}
			})
			w := newWorld(t, p, "", nil)
			client := w.client(t, Captured)
			io.WriteString(client, "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"+c.body+
				"GET /smuggled HTTP/1.1\r\nHost: a.test\r\n\r\n")
			answer, err := io.ReadAll(client)
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
				t.Errorf("answered %.200q, %v", answer, err)
			}
		})
	}
}
