package sniff

import (
	"bufio"
	"bytes"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
)

func TestHTTP(t *testing.T) {
	var (
		found  = result{"www.example.org", Found}
		absent = result{"", Absent}
		more   = result{"", More}
	)
	for _, test := range []struct {
		name   string
		flight string
		want   result
	}{
		{"request", "GET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"HTTP/1.0", "GET / HTTP/1.0\r\nHost: www.example.org\r\n\r\n", found},
		{"line feeds alone", "GET / HTTP/1.1\nHost: www.example.org\n\n", found},
		{"end of the head not seen", "GET / HTTP/1.1\r\nHost: www.example.org\r\nA", found},
		{"not the first field", "POST /a?b HTTP/1.1\r\nAccept: */*\r\nX:\r\nhOsT:\t www.example.org \t\r\n\r\nbody", found},
		{"port", "GET / HTTP/1.1\r\nHost: www.example.org:8080\r\n\r\n", found},
		{"empty port", "GET / HTTP/1.1\r\nHost: www.example.org:\r\n\r\n", found},
		{"upper case, trailing dot", "GET / HTTP/1.1\r\nHost: WWW.Example.ORG.:80\r\n\r\n", found},
		{"asterisk form", "OPTIONS * HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"unusual method", "M-SEARCH! / HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"target with two slashes", "GET //other.example/ HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"URL in the path", "GET /http://other.example/ HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"target of other bytes", "GET /\xff\xfe\"<> HTTP/1.1\r\nHost: www.example.org\r\n\r\n", found},
		{"other field folded", "GET / HTTP/1.1\r\nA: b\r\n Host: other.example\r\nHost: www.example.org\r\n\r\n", found},
		{"first of two", "GET / HTTP/1.1\r\nHost: www.example.org\r\nHost: other.example\r\n\r\n", found},
		{"name in other fields", "GET / HTTP/1.1\r\nX-Host: other.example\r\nHosts: other.example\r\nHost: www.example.org\r\n\r\n", found},
		{"absolute form", "GET http://www.example.org/a HTTP/1.1\r\n", found},
		{"absolute form wins", "GET HTTP://www.example.org:80?a HTTP/1.1\r\nHost: other.example\r\n\r\n", found},
		{"absolute form, https", "GET https://www.example.org HTTP/1.1\r\n", found},

		{"nothing", "", more},
		{"method", "GET", more},
		{"target", "GET /", more},
		{"version", "GET / HTTP/1.", more},
		{"line break cut", "GET / HTTP/1.1\r", more},
		{"field name", "GET / HTTP/1.1\r\nHost", more},
		{"host cut", "GET / HTTP/1.1\r\nHost: www.example.or", more},
		{"host may be folded", "GET / HTTP/1.1\r\nHost: www.example.org\r\n", more},
		{"absolute form cut", "GET http://www.example.org/ HTTP/1.1", more},

		{"TLS", "\x16\x03\x01", absent},
		{"white space first", " ", absent},
		{"empty line first", "\r", absent},
		{"HTTP/2", "PRI * HTTP/2", absent},
		{"HTTP/0.9", "GET /\r", absent},
		{"HTTP/3.0", "GET / HTTP/3", absent},
		{"no digit", "GET / HTTP/1.x", absent},
		{"two digits", "GET / HTTP/1.10", absent},
		{"space after the version", "GET / HTTP/1.1 ", absent},
		{"two spaces", "GET  ", absent},
		{"two spaces before the version", "GET /  ", absent},
		{"lower-case version", "GET / h", absent},
		{"carriage return alone", "GET / HTTP/1.1\rH", absent},
		{"two carriage returns", "GET / HTTP/1.1\r\r", absent},
		{"tab", "GET\t", absent},
		{"control byte in the target", "GET /\x01", absent},
		{"SSH", "SSH-2.0-OpenSSH_9.9 Debian-1\r", absent},
		{"CONNECT", "CONNECT www.example.org:443 HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"other scheme", "GET ftp://www.example.org/ HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"no scheme", "GET www.example.org HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"user information", "GET http://user@www.example.org/ HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"absolute form without host", "GET http:///a HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"absolute form with an address", "GET http://192.0.2.1/ HTTP/1.1\r\nHost: www.example.org\r\n\r\n", absent},
		{"no host", "GET / HTTP/1.0\r\nAccept: */*\r\n\r\n", absent},
		{"no fields", "GET / HTTP/1.0\r\n\r\nHost: www.example.org\r\n", absent},
		{"empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n", absent},
		{"host folded", "GET / HTTP/1.1\r\nHost: www.example.org\r\n .evil.example\r\n\r\n", absent},
		{"host all on the next line", "GET / HTTP/1.1\r\nHost:\r\n\twww.example.org\r\n\r\n", absent},
		{"folded from the start", "GET / HTTP/1.1\r\n Host: www.example.org\r\n\r\n", absent},
		{"space before the colon", "GET / HTTP/1.1\r\nHost : www.example.org\r\n\r\n", absent},
		{"space before another colon", "GET / HTTP/1.1\r\nA : b\r\nHost: www.example.org\r\n\r\n", absent},
		{"no colon", "GET / HTTP/1.1\r\nHost www.example.org\r\n\r\n", absent},
		{"no field name", "GET / HTTP/1.1\r\n: b\r\nHost: www.example.org\r\n\r\n", absent},
		{"address", "GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", absent},
		{"IPv6 address", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", absent},
		{"localhost", "GET / HTTP/1.1\r\nHost: localhost:8080\r\n\r\n", absent},
		{"port of letters", "GET / HTTP/1.1\r\nHost: www.example.org:http\r\n\r\n", absent},
		{"two ports", "GET / HTTP/1.1\r\nHost: www.example.org:80:80\r\n\r\n", absent},
		{"two names", "GET / HTTP/1.1\r\nHost: www.example.org, other.example\r\n\r\n", absent},
		{"carriage return in the host", "GET / HTTP/1.1\r\nHost: www.example.org\rX\r\n\r\n", absent},
		{"zero byte", "GET / HTTP/1.1\r\nHost: www.example.org\x00\r\n\r\n", absent},
		{"endless method", strings.Repeat("A", MaxFlight), absent},
		{"endless target", "GET /" + strings.Repeat("a", MaxFlight), absent},
		{"endless field", "GET / HTTP/1.1\r\nA: " + strings.Repeat("a", MaxFlight), absent},
		{"endless fields", "GET / HTTP/1.1\r\n" + strings.Repeat("A: b\r\n", MaxFlight/6), absent},
		{"endless fold", "GET / HTTP/1.1\r\nA: b\r\n" + strings.Repeat(" \r\n", MaxFlight/3), absent},
		{"host beyond the end", "GET / HTTP/1.1\r\nA: " + strings.Repeat("a", MaxFlight) + "\r\nHost: www.example.org\r\n\r\n", absent},
		{"endless host", "GET / HTTP/1.1\r\nHost: " + strings.Repeat("a.", MaxFlight/4) + "\r\n\r\n", absent},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := cut[HTTP](t, []byte(test.flight)); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
}

func TestHTTPLongest(t *testing.T) {
	const start, end = "GET / HTTP/1.1\r\nA: ", "\r\nHost: www.example.org\r\n\r"
	fits := MaxFlight - len(start) - len(end)
	for _, test := range []struct {
		length int
		want   result
	}{
		{fits, result{"www.example.org", Found}},
		{fits + 2, result{"", Absent}},
	} {
		if got := cut[HTTP](t, []byte(start+strings.Repeat("a", test.length)+end)); got != test.want {
			t.Errorf("%d bytes ahead of the host: %v, want %v", test.length, got, test.want)
		}
	}
}

func TestHTTPAllocates(t *testing.T) {
	flight := []byte("GET / HTTP/1.1\r\nUser-Agent: curl/8.5.0\r\nHost: www.example.org\r\nAccept: */*\r\n\r\n")
	if n := testing.AllocsPerRun(100, func() { new(HTTP).Next(flight) }); n > 1 {
		t.Errorf("%v allocations, want that of the name", n)
	}
}

func TestHTTPLinear(t *testing.T) {
	fresh := func() sniffer { return new(HTTP) }
	for _, test := range []struct{ name, head, repeated string }{
		{"method", "", "A"},
		{"target", "GET /", "a"},
		{"field", "GET / HTTP/1.1\r\nA: ", "a"},
		{"fields", "GET / HTTP/1.1\r\n", "A: b\r\n"},
		{"fold", "GET / HTTP/1.1\r\nA: b\r\n", " \r\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			linear(t, fresh, func(n int) []byte {
				return []byte(test.head + strings.Repeat(test.repeated, (n-len(test.head))/len(test.repeated)))
			})
		})
	}
}

// foldedHost is a Host field that goes on in the next line.
var foldedHost = regexp.MustCompile(`(?i)\nHost:[^\n]*\n[ \t]`)

// readDifferently reports whether net/http reads something from a request that
// this package refuses to.
func readDifferently(flight []byte, request *http.Request) bool {
	target := request.URL
	switch {
	case len(flight) >= MaxFlight, request.ProtoMajor != 1, request.Method == http.MethodConnect:
		return true
	case target.Scheme != "" && (target.Scheme != "http" && target.Scheme != "https" || target.Host == "" || target.User != nil):
		return true
	case foldedHost.Match(flight):
		return true
	}
	for name := range request.Header {
		if strings.Contains(name, " ") { // white space before the colon
			return true
		}
	}
	return false
}

func FuzzHTTP(f *testing.F) {
	for _, flight := range []string{
		"GET / HTTP/1.1\r\nHost: www.example.org\r\n\r\n",
		"GET / HTTP/1.1\nAccept: */*\nhost:www.example.org:80\n\n",
		"POST http://www.example.org:80/a?b HTTP/1.1\r\nHost: other.example\r\nContent-Length: 3\r\n\r\nabc",
		"GET http://user:pass@www.example.org HTTP/1.1\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nA: b\r\n c\r\nHost: www.example.org\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: www.example.org\r\n folded\r\n\r\n",
		"GET / HTTP/1.1\r\nHost : www.example.org\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: [a-name]:80\r\n\r\n",
		"GET / HTTP/1.0\r\n\r\n",
		"CONNECT www.example.org:443 HTTP/1.1\r\nHost: www.example.org:443\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"\x16\x03\x01\x00\x05",
	} {
		f.Add([]byte(flight))
	}
	f.Fuzz(func(t *testing.T, flight []byte) {
		got := cut[HTTP](t, flight)
		request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(flight)))
		if err != nil || readDifferently(flight, request) {
			return
		}
		want := result{"", Absent}
		// What stands in brackets is an address, be it malformed (RFC 3986 section
		// 3.2.2), and no name; Hostname takes the brackets off unseen.
		if host := (&url.URL{Host: request.Host}).Hostname(); host != "" && !strings.HasPrefix(request.Host, "[") {
			if canonical, ok := ValidName(host); ok {
				want = result{canonical, Found}
			}
		}
		if got != want {
			t.Errorf("%v, but net/http reads the host %q\n%q", got, request.Host, flight)
		}
	})
}

func BenchmarkHTTP(b *testing.B) {
	flight := []byte("GET / HTTP/1.1\r\nUser-Agent: curl/8.5.0\r\nHost: www.example.org\r\nAccept: */*\r\n\r\n")
	b.ReportAllocs()
	for b.Loop() {
		var s HTTP
		if _, verdict := s.Next(flight); verdict != Found {
			b.Fatal(verdict)
		}
	}
}
