package forward

import (
	"bufio"
	"bytes"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// FuzzRequest sees that whatever is taken for a request leaves as one that package
// net/http reads the same way, with the same length, and that this parser would take
// again.
func FuzzRequest(f *testing.F) {
	for _, form := range forms {
		f.Add([]byte(strings.ReplaceAll(form.client, "\n", "\r\n")))
	}
	for _, c := range refused {
		f.Add([]byte(strings.ReplaceAll(c.request, "\n", "\r\n")))
	}
	for _, c := range bare {
		f.Add([]byte(c.request))
	}
	proxy, err := upstream.Parse("http://proxy.test:3128")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		end := endOfHead(text, 0)
		if end == 0 || end > maxHead {
			return
		}
		x := exchange{Session: &Session{server: NewServer(Config{})}, hop: new(hop)}
		if x.request.parse(text[:end]) != nil || x.request.form == authority {
			return
		}
		x.method = string(x.request.method)
		host, _ := x.request.host()
		if host == "" {
			host = "203.0.113.7"
		}
		for _, way := range []Way{
			{Proxy: proxy, Target: upstream.Target{Host: host, Port: 80}},
			{Target: upstream.Target{Host: host, Port: 80}},
		} {
			x.way = way
			sent := x.appendRequest(nil)
			if bytes.Count(sent, []byte("\r\n\r\n")) != 1 || bytes.Count(sent, []byte("\n")) != bytes.Count(sent, []byte("\r\n")) {
				t.Fatalf("%q leaves as %q", text[:end], sent)
			}
			var again request
			if err := again.parse(sent); err != nil {
				t.Fatalf("%q leaves as %q: %v", text[:end], sent, err)
			}
			if again.body != x.request.body || again.upgrade != x.request.upgrade || string(again.method) != x.method {
				t.Fatalf("%q leaves as %q", text[:end], sent)
			}
			read, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(sent)))
			if err != nil {
				continue // it is stricter about methods and URLs
			}
			if coded := len(read.TransferEncoding) > 0; coded != (x.request.body.kind == chunked) ||
				!coded && read.ContentLength != x.request.body.length {
				t.Fatalf("%q has a body of %+v, net/http reads %d %v", text[:end], x.request.body, read.ContentLength, read.TransferEncoding)
			}
			if read.Header.Get("Proxy-Authorization") != "" {
				t.Fatalf("%q leaves with a credential: %q", text[:end], sent)
			}
		}
	})
}

// FuzzResponse does the same for answers.
func FuzzResponse(f *testing.F) {
	for _, form := range forms {
		f.Add([]byte(strings.ReplaceAll(form.answer, "\n", "\r\n")), false)
	}
	f.Add([]byte("HTTP/1.1 200 OK\nX : y\n z\n\n"), true)
	f.Fuzz(func(t *testing.T, text []byte, head bool) {
		end := endOfHead(text, 0)
		if end == 0 || end > maxHead {
			return
		}
		method := "GET"
		if head {
			method = "HEAD"
		}
		x := exchange{Session: &Session{server: NewServer(Config{})}, method: method}
		x.request.minor = 1
		if x.response.parse(text[:end], method) != nil {
			return
		}
		sent := x.appendResponse(nil, x.response.body.kind != untilClose)
		if bytes.Count(sent, []byte("\r\n\r\n")) != 1 || bytes.Count(sent, []byte("\n")) != bytes.Count(sent, []byte("\r\n")) {
			t.Fatalf("%q leaves as %q", text[:end], sent)
		}
		var again response
		if err := again.parse(sent, method); err != nil {
			t.Fatalf("%q leaves as %q: %v", text[:end], sent, err)
		}
		if again.body != x.response.body || again.status != x.response.status {
			t.Fatalf("%q leaves as %q", text[:end], sent)
		}
		read, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(sent)), &http.Request{Method: method})
		if err != nil || x.response.interim() || x.response.status == 101 || head {
			return
		}
		if x.response.body.kind == sized && read.ContentLength != x.response.body.length && x.response.status != 304 {
			t.Fatalf("%q has a body of %+v, net/http reads %d", text[:end], x.response.body, read.ContentLength)
		}
	})
}

// FuzzChunkSize compares with the grammar of RFC 9112 section 7.1.
func FuzzChunkSize(f *testing.F) {
	for _, c := range chunks {
		line, _, _ := strings.Cut(c.body, "\r\n")
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		size, err := chunkSize(line)
		if err != nil {
			return
		}
		digits, _, _ := strings.Cut(string(line), ";")
		want, err := strconv.ParseInt(strings.TrimRight(digits, " \t"), 16, 64)
		if err != nil || size != want || strings.ContainsAny(digits, "+-_") {
			t.Fatalf("%q is %d, want %d, %v", line, size, want, err)
		}
	})
}
