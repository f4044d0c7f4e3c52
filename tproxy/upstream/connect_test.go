package upstream_test

import (
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// httpProxy is that of the scripts.
const httpProxy = "http://us%20er:p%40ss@proxy:3128"

// httpRequest is what it is asked.
const httpRequest = "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\nProxy-Authorization: Basic dXMgZXI6cEBzcw==\r\n\r\n"

func TestConnectRequest(t *testing.T) {
	const authorization = "Proxy-Authorization: Basic dXMgZXI6cEBzcw==\r\n"
	for _, test := range []struct {
		proxy  string
		target upstream.Target
		want   string
	}{
		{"us%20er:p%40ss@proxy", upstream.Target{Host: "example.org", Port: 443}, "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n" + authorization + "\r\n"},
		{"proxy", upstream.Target{Host: "a_b.example.org.", Port: 22}, "CONNECT a_b.example.org.:22 HTTP/1.1\r\nHost: a_b.example.org.:22\r\n\r\n"},
		{"proxy", upstream.Target{Host: "192.0.2.1", Port: 65535}, "CONNECT 192.0.2.1:65535 HTTP/1.1\r\nHost: 192.0.2.1:65535\r\n\r\n"},
		{"proxy", upstream.Target{Host: "2001:db8::1", Port: 80}, "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n"},
		{"proxy", upstream.Target{Host: "::ffff:192.0.2.1", Port: 80}, "CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n"},
	} {
		proxy, err := parseBasic(test.proxy)
		if err != nil {
			t.Fatal(err)
		}
		handshake, err := proxy.Handshake(test.target, acquire(t, proxy))
		if err != nil {
			t.Errorf("%+v: %v", test.target, err)
		} else if request := string(handshake.Hello()); request != test.want {
			t.Errorf("%+v:\n got %q\nwant %q", test.target, request, test.want)
		}
	}
}

// connectScripts are answers to a CONNECT.
func connectScripts() []script {
	long := strings.Repeat("x", 16<<10)
	scripts := []script{
		{name: "plain", legs: answer("HTTP/1.1 200 Connection established\r\n\r\n")},
		{name: "1.0", legs: answer("HTTP/1.0 200 OK\r\nVia: 1.1 proxy\r\n\r\n")},
		{name: "no reason", legs: answer("HTTP/1.1 200\r\n\r\n")},
		{name: "empty reason", legs: answer("HTTP/1.1 200 \r\n\r\n")},
		{name: "bare LF", legs: answer("HTTP/1.1 200 OK\nVia: x\n\nearly"), rest: "early"},
		{name: "other 2xx", legs: answer("HTTP/1.1 299 Fine\r\n\r\n")},
		{name: "early bytes", legs: answer("HTTP/1.1 200 OK\r\n\r\nSSH-2.0-OpenSSH\r\n"), rest: "SSH-2.0-OpenSSH\r\n"},
		{name: "early bytes like a reply", legs: answer("HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 407 No\r\n\r\n"), rest: "HTTP/1.1 407 No\r\n\r\n"},
		{name: "length ignored", legs: answer("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly bytes"), rest: "early bytes"},
		{name: "chunks ignored", legs: answer("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly"), rest: "5\r\nearly"},
		{name: "odd fields", legs: answer("HTTP/1.1 200 OK\r\nno colon\r\n folded\r\n: \r\n\r\n")},
		{name: "interim", legs: answer("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nearly"), rest: "early"},
		{name: "five interim", legs: answer(strings.Repeat("HTTP/1.1 102\r\n\r\n", 5) + "HTTP/1.1 200\r\n\r\n")},
		{name: "longest head", legs: answer("HTTP/1.1 200 OK\r\nX: " + long[:16<<10-24] + "\r\n\r\nearly"), rest: "early"},

		{
			name: "credential refused", refused: 407, reason: "Proxy Authentication Required", schemes: []string{"Basic"}, says: "refuses the user name or the password",
			legs: answer("HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"a, b\"\r\nContent-Length: 4\r\n\r\nbody"),
		},
		{
			name: "other schemes", refused: 407, reason: "No", schemes: []string{"Negotiate", "NTLM", "Digest"}, says: "by Negotiate, NTLM, Digest, and --upstream-auth basic",
			legs: answer("HTTP/1.1 407 No\r\nproxy-authenticate: Negotiate\r\nPROXY-AUTHENTICATE:NTLM TlRMTVNTUAAC==, Digest realm=\"\\\", Basic x\", nonce = \"x\",qop=auth\r\nProxy-Authenticate: ntlm\r\n\r\n"),
		},
		{
			name: "malformed challenges", refused: 407, schemes: []string{"Basic"},
			legs: answer("HTTP/1.1 407\r\nProxy-Authenticate: , ,=,\"x\", " + long[:33] + ", a\x00b, Basic realm=\"open\r\n\r\n"),
		},
		{
			name: "many challenges", refused: 407, schemes: []string{"a", "b", "c", "d", "e", "f", "g", "h"},
			legs: answer("HTTP/1.1 407\r\nProxy-Authenticate: a,b,c,d,e,f,g,h,i,j\r\n\r\n"),
		},
		{name: "forbidden", legs: answer("HTTP/1.1 403 Forbidden\r\n\r\n"), refused: 403, reason: "Forbidden", says: "forbids this destination or port"},
		{name: "unreachable", legs: answer("HTTP/1.1 503 Service Unavailable\r\n\r\n"), refused: 503, reason: "Service Unavailable", says: "cannot reach the destination"},
		{name: "log-in page", legs: answer("HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n"), refused: 302, reason: "Found", says: "redirects"},
		{name: "web server", legs: answer("HTTP/1.1 405 Not Allowed\r\n\r\n"), refused: 405, reason: "Not Allowed", says: "CONNECT"},
		{name: "protocol switched", legs: answer("HTTP/1.1 101 Switching Protocols\r\n\r\n"), refused: 101, reason: "Switching Protocols"},
		{name: "status out of range", legs: answer("HTTP/1.1 999\r\n\r\n"), refused: 999},
		{name: "refused after interim", legs: answer("HTTP/1.1 100\r\nProxy-Authenticate: x\r\n\r\nHTTP/1.1 407\r\n\r\n"), refused: 407},
		{name: "hostile reason", legs: answer("HTTP/1.1 502 \x1b[31mä\x00\r\r\n\r\n"), refused: 502, reason: "?[31m???"},
		{name: "long reason", legs: answer("HTTP/1.1 502 " + long[:100] + "\r\n\r\n"), refused: 502, reason: long[:80]},

		{name: "another protocol", legs: answer("SSH-2.0-OpenSSH_9.6\r\n"), says: "not HTTP/1"},
		{name: "one wrong byte", legs: answer("\x15"), says: "not HTTP/1"},
		{name: "leading empty line", legs: answer("\r\nHTTP/1.1 200 OK\r\n\r\n"), says: "not HTTP/1"},
		{name: "HTTP/2", legs: answer("HTTP/2 200\r\n\r\n"), says: "not HTTP/1"},
		{name: "endless garbage", legs: answer(long + long), says: "not HTTP/1"},
		{name: "garbage after interim", legs: answer("HTTP/1.1 100\r\n\r\nHTTP/0.9 200\r\n\r\n"), says: "not HTTP/1"},
		{name: "no status", legs: answer("HTTP/1.1\r\n\r\n"), says: "malformed status line"},
		{name: "short status", legs: answer("HTTP/1.1 20\r\n\r\n"), says: "malformed status line"},
		{name: "long status", legs: answer("HTTP/1.1 2000 OK\r\n\r\n"), says: "malformed status line"},
		{name: "zero status", legs: answer("HTTP/1.1 000 OK\r\n\r\n"), says: "malformed status line"},
		{name: "signed status", legs: answer("HTTP/1.1 +20 OK\r\n\r\n"), says: "malformed status line"},
		{name: "odd version", legs: answer("HTTP/1.x 200 OK\r\n\r\n"), says: "malformed status line"},
		{name: "long version", legs: answer("HTTP/1.10 200 OK\r\n\r\n"), says: "malformed status line"},
		{name: "tab", legs: answer("HTTP/1.1\t200 OK\r\n\r\n"), says: "malformed status line"},
		{name: "endless status line", legs: answer("HTTP/1.1 200 " + long + "\r\n\r\n"), says: "longer than 16384 bytes"},
		{name: "endless field", legs: answer("HTTP/1.1 200 OK\r\nX: " + long), says: "longer than 16384 bytes"},
		{name: "endless fields", legs: answer("HTTP/1.1 200 OK\r\n" + strings.Repeat("X: x\r\n", 4<<10)), says: "longer than 16384 bytes"},
		{name: "one byte too long", legs: answer("HTTP/1.1 200 OK\r\nX: " + long[:16<<10-23] + "\r\n\r\n"), says: "longer than 16384 bytes"},
		{name: "too many interim", legs: answer(strings.Repeat("HTTP/1.1 100\r\n\r\n", 6) + "HTTP/1.1 200\r\n\r\n"), says: "interim"},
		{name: "long interim", legs: answer("HTTP/1.1 100\r\nX: " + long[:10<<10] + "\r\n\r\nHTTP/1.1 200 OK\r\nX: " + long[:10<<10] + "\r\n\r\n"), says: "longer than 16384 bytes"},

		{name: "nothing", legs: answer(""), incomplete: true},
		{name: "half a version", legs: answer("HTT"), incomplete: true},
		{name: "half a status line", legs: answer("HTTP/1.1 200 O"), incomplete: true},
		{name: "no empty line", legs: answer("HTTP/1.1 200 OK\r\nVia: x\r\n"), incomplete: true},
		{name: "CR at the end", legs: answer("HTTP/1.1 200 OK\r\n\r"), incomplete: true},
		{name: "interim only", legs: answer("HTTP/1.1 100 Continue\r\n\r\n"), incomplete: true},
		{name: "half a refusal", legs: answer("HTTP/1.1 407 No\r\n"), incomplete: true, after: isRefused},
	}
	for i := range scripts {
		s := &scripts[i]
		s.name, s.proxy = "http/"+s.name, httpProxy
		if s.after == "" {
			s.after = isUnknown
		}
		switch {
		case s.refused == 407:
			s.denied, s.after = true, isRefused
		case s.refused == 0 && s.says == "" && !s.incomplete:
			s.after = isAccepted
		}
	}
	return scripts
}

// answer is a conversation of the one request and its answer.
func answer(says string) []leg { return []leg{{httpRequest, says}} }

func TestReplyInOnePieceIsNotCopied(t *testing.T) {
	reply := []byte("HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy (squid/6.6)\r\n\r\n")
	const rounds = 100
	fresh := make([]upstream.Handshake, 0, rounds+1)
	proxy, first, _ := begin(t, httpProxy)
	first.Settle(nil)
	for range cap(fresh) {
		handshake, err := proxy.Handshake(target, acquire(t, proxy))
		if err != nil {
			t.Fatal(err)
		}
		fresh = append(fresh, handshake)
	}
	if allocations := testing.AllocsPerRun(rounds, func() {
		_, _, done, err := fresh[0].Feed(reply)
		if fresh = fresh[1:]; !done || err != nil {
			t.Fatal(done, err)
		}
	}); allocations > 0 {
		t.Errorf("%v allocations", allocations)
	}
}
