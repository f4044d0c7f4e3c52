package upstream_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// handshake returns a handshake that sends a credential.
func handshake(t testing.TB) upstream.Handshake {
	t.Helper()
	proxy, err := upstream.Parse("http://us%20er:p%40ss@proxy:3128")
	if err != nil {
		t.Fatal(err)
	}
	handshake, err := proxy.Handshake(upstream.Target{Host: "example.org", Port: 443})
	if err != nil {
		t.Fatal(err)
	}
	return handshake
}

func TestRequest(t *testing.T) {
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
		proxy, err := upstream.Parse(test.proxy)
		if err != nil {
			t.Fatal(err)
		}
		handshake, err := proxy.Handshake(test.target)
		if err != nil {
			t.Errorf("%+v: %v", test.target, err)
		} else if request := string(handshake.Hello()); request != test.want {
			t.Errorf("%+v:\n got %q\nwant %q", test.target, request, test.want)
		}
	}
}

func TestHostileTarget(t *testing.T) {
	proxy, err := upstream.Parse("proxy")
	if err != nil {
		t.Fatal(err)
	}
	hosts := []string{
		"", ".", "..", "a..b", "[::1]", "::1%eth0", "fe80::1%a\r\nb", "1.2.3", "256.1.1.1", "example.org:443", "exämple.org",
		strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a", strings.Repeat("x", 1<<20),
	}
	for c := range 256 {
		if c := byte(c); !strings.ContainsRune("-_.", rune(c)) && (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') {
			hosts = append(hosts, "a"+string([]byte{c})+"b")
		}
	}
	for _, host := range hosts {
		if _, err := proxy.Handshake(upstream.Target{Host: host, Port: 443}); err == nil {
			t.Errorf("%q is taken for a host", host)
		} else if text := err.Error(); strings.ContainsAny(text, "\r\n") || len(text) > 2000 {
			t.Errorf("%.100q: %q is no line for a log", host, text)
		}
	}
	if _, err := proxy.Handshake(upstream.Target{Host: "example.org"}); err == nil {
		t.Error("port 0 is taken")
	}
}

// reply is an answer to a CONNECT and what is to become of it.
type reply struct {
	name, bytes string
	rest        string   // after a tunnel: what belongs to it
	refused     int      // status of the RefusedError
	reason      string   // its reason
	schemes     []string // its schemes
	says        string   // part of the error's text
	incomplete  bool     // the proxy closes before the end of the head
}

func replies() []reply {
	long := strings.Repeat("x", 16<<10)
	return []reply{
		{name: "plain", bytes: "HTTP/1.1 200 Connection established\r\n\r\n"},
		{name: "1.0", bytes: "HTTP/1.0 200 OK\r\nVia: 1.1 proxy\r\n\r\n"},
		{name: "no reason", bytes: "HTTP/1.1 200\r\n\r\n"},
		{name: "empty reason", bytes: "HTTP/1.1 200 \r\n\r\n"},
		{name: "bare LF", bytes: "HTTP/1.1 200 OK\nVia: x\n\nearly", rest: "early"},
		{name: "other 2xx", bytes: "HTTP/1.1 299 Fine\r\n\r\n"},
		{name: "early bytes", bytes: "HTTP/1.1 200 OK\r\n\r\nSSH-2.0-OpenSSH\r\n", rest: "SSH-2.0-OpenSSH\r\n"},
		{name: "early bytes like a reply", bytes: "HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 407 No\r\n\r\n", rest: "HTTP/1.1 407 No\r\n\r\n"},
		{name: "length ignored", bytes: "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly bytes", rest: "early bytes"},
		{name: "chunks ignored", bytes: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly", rest: "5\r\nearly"},
		{name: "odd fields", bytes: "HTTP/1.1 200 OK\r\nno colon\r\n folded\r\n: \r\n\r\n"},
		{name: "interim", bytes: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nearly", rest: "early"},
		{name: "five interim", bytes: strings.Repeat("HTTP/1.1 102\r\n\r\n", 5) + "HTTP/1.1 200\r\n\r\n"},
		{name: "longest head", bytes: "HTTP/1.1 200 OK\r\nX: " + long[:16<<10-24] + "\r\n\r\nearly", rest: "early"},

		{
			name: "credential refused", refused: 407, reason: "Proxy Authentication Required", schemes: []string{"Basic"}, says: "refuses the user name or the password",
			bytes: "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"a, b\"\r\nContent-Length: 4\r\n\r\nbody",
		},
		{
			name: "other schemes", refused: 407, reason: "No", schemes: []string{"Negotiate", "NTLM", "Digest"}, says: "by Negotiate, NTLM, Digest, and only Basic",
			bytes: "HTTP/1.1 407 No\r\nproxy-authenticate: Negotiate\r\nPROXY-AUTHENTICATE:NTLM TlRMTVNTUAAC==, Digest realm=\"\\\", Basic x\", nonce = \"x\",qop=auth\r\nProxy-Authenticate: ntlm\r\n\r\n",
		},
		{
			name: "malformed challenges", refused: 407, schemes: []string{"Basic"},
			bytes: "HTTP/1.1 407\r\nProxy-Authenticate: , ,=,\"x\", " + long[:33] + ", a\x00b, Basic realm=\"open\r\n\r\n",
		},
		{
			name: "many challenges", refused: 407, schemes: []string{"a", "b", "c", "d", "e", "f", "g", "h"},
			bytes: "HTTP/1.1 407\r\nProxy-Authenticate: a,b,c,d,e,f,g,h,i,j\r\n\r\n",
		},
		{name: "forbidden", bytes: "HTTP/1.1 403 Forbidden\r\n\r\n", refused: 403, reason: "Forbidden", says: "forbids this destination or port"},
		{name: "unreachable", bytes: "HTTP/1.1 503 Service Unavailable\r\n\r\n", refused: 503, reason: "Service Unavailable", says: "cannot reach the destination"},
		{name: "log-in page", bytes: "HTTP/1.1 302 Found\r\nLocation: x\r\n\r\n", refused: 302, reason: "Found", says: "redirects"},
		{name: "web server", bytes: "HTTP/1.1 405 Not Allowed\r\n\r\n", refused: 405, reason: "Not Allowed", says: "CONNECT"},
		{name: "protocol switched", bytes: "HTTP/1.1 101 Switching Protocols\r\n\r\n", refused: 101, reason: "Switching Protocols"},
		{name: "status out of range", bytes: "HTTP/1.1 999\r\n\r\n", refused: 999},
		{name: "refused after interim", bytes: "HTTP/1.1 100\r\nProxy-Authenticate: x\r\n\r\nHTTP/1.1 407\r\n\r\n", refused: 407},
		{name: "hostile reason", bytes: "HTTP/1.1 502 \x1b[31mä\x00\r\r\n\r\n", refused: 502, reason: "?[31m???"},
		{name: "long reason", bytes: "HTTP/1.1 502 " + long[:100] + "\r\n\r\n", refused: 502, reason: long[:80]},

		{name: "another protocol", bytes: "SSH-2.0-OpenSSH_9.6\r\n", says: "not HTTP/1"},
		{name: "one wrong byte", bytes: "\x15", says: "not HTTP/1"},
		{name: "leading empty line", bytes: "\r\nHTTP/1.1 200 OK\r\n\r\n", says: "not HTTP/1"},
		{name: "HTTP/2", bytes: "HTTP/2 200\r\n\r\n", says: "not HTTP/1"},
		{name: "endless garbage", bytes: long + long, says: "not HTTP/1"},
		{name: "garbage after interim", bytes: "HTTP/1.1 100\r\n\r\nHTTP/0.9 200\r\n\r\n", says: "not HTTP/1"},
		{name: "no status", bytes: "HTTP/1.1\r\n\r\n", says: "malformed status line"},
		{name: "short status", bytes: "HTTP/1.1 20\r\n\r\n", says: "malformed status line"},
		{name: "long status", bytes: "HTTP/1.1 2000 OK\r\n\r\n", says: "malformed status line"},
		{name: "zero status", bytes: "HTTP/1.1 000 OK\r\n\r\n", says: "malformed status line"},
		{name: "signed status", bytes: "HTTP/1.1 +20 OK\r\n\r\n", says: "malformed status line"},
		{name: "odd version", bytes: "HTTP/1.x 200 OK\r\n\r\n", says: "malformed status line"},
		{name: "long version", bytes: "HTTP/1.10 200 OK\r\n\r\n", says: "malformed status line"},
		{name: "tab", bytes: "HTTP/1.1\t200 OK\r\n\r\n", says: "malformed status line"},
		{name: "endless status line", bytes: "HTTP/1.1 200 " + long + "\r\n\r\n", says: "longer than 16384 bytes"},
		{name: "endless field", bytes: "HTTP/1.1 200 OK\r\nX: " + long, says: "longer than 16384 bytes"},
		{name: "endless fields", bytes: "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: x\r\n", 4<<10), says: "longer than 16384 bytes"},
		{name: "one byte too long", bytes: "HTTP/1.1 200 OK\r\nX: " + long[:16<<10-23] + "\r\n\r\n", says: "longer than 16384 bytes"},
		{name: "too many interim", bytes: strings.Repeat("HTTP/1.1 100\r\n\r\n", 6) + "HTTP/1.1 200\r\n\r\n", says: "interim"},
		{name: "long interim", bytes: "HTTP/1.1 100\r\nX: " + long[:10<<10] + "\r\n\r\nHTTP/1.1 200 OK\r\nX: " + long[:10<<10] + "\r\n\r\n", says: "longer than 16384 bytes"},

		{name: "nothing", bytes: "", incomplete: true},
		{name: "half a version", bytes: "HTT", incomplete: true},
		{name: "half a status line", bytes: "HTTP/1.1 200 O", incomplete: true},
		{name: "no empty line", bytes: "HTTP/1.1 200 OK\r\nVia: x\r\n", incomplete: true},
		{name: "CR at the end", bytes: "HTTP/1.1 200 OK\r\n\r", incomplete: true},
		{name: "interim only", bytes: "HTTP/1.1 100 Continue\r\n\r\n", incomplete: true},
		{name: "half a refusal", bytes: "HTTP/1.1 407 No\r\n", incomplete: true},
	}
}

// check compares how a handshake ended with what the table wants. rest is all that
// follows the head.
func (r reply) check(t *testing.T, rest string, done bool, err error) {
	t.Helper()
	if r.incomplete {
		if done || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("done %v, error %v of an incomplete reply", done, err)
		}
		return
	}
	if tunnel := r.refused == 0 && r.says == ""; tunnel != done || tunnel != (err == nil) || rest != r.rest {
		t.Fatalf("done %v, error %v, rest %q", done, err, rest)
	}
	var refused *upstream.RefusedError
	if errors.As(err, &refused) != (r.refused != 0) {
		t.Fatalf("error %v", err)
	}
	if refused != nil && (refused.Status != r.refused || refused.Reason != r.reason || !slices.Equal(refused.Schemes, r.schemes)) {
		t.Fatalf("refused by %#v", refused)
	}
	if err != nil && (!strings.Contains(err.Error(), r.says) || strings.ContainsAny(err.Error(), "\r\n")) {
		t.Fatalf("error %q", err)
	}
}

// feed gives the pieces to a new handshake one by one, each in a buffer that is
// overwritten afterwards, as the engine does.
func feed(t testing.TB, pieces ...[]byte) (rest string, done bool, err error) {
	h := handshake(t)
	for i, piece := range pieces {
		buffer := slices.Clone(piece)
		out, after, done, err := h.Feed(buffer)
		if len(out) > 0 {
			t.Fatalf("CONNECT sends %q after its request", out)
		}
		if done && err == nil {
			return string(after) + string(bytes.Join(pieces[i+1:], nil)), true, nil
		}
		if len(after) > 0 {
			t.Fatalf("rest %q without a tunnel", after)
		}
		if err != nil {
			return "", done, err
		}
		for i := range buffer {
			buffer[i] = '#'
		}
	}
	return "", false, nil
}

// single cuts bytes into pieces of one.
func single(bytes []byte) [][]byte {
	return slices.Collect(slices.Chunk(bytes, 1))
}

func TestReplies(t *testing.T) {
	for _, r := range replies() {
		t.Run(r.name, func(t *testing.T) {
			all := []byte(r.bytes)
			rest, done, err := feed(t, all)
			r.check(t, rest, done, err)
			rest, done, err = feed(t, single(all)...)
			r.check(t, rest, done, err)
			step := 1 + len(all)/512 // every cut, but of the few long ones
			for cut := 1; cut < len(all); cut += step {
				rest, done, err := feed(t, all[:cut], all[cut:])
				r.check(t, rest, done, err)
			}
		})
	}
}

func TestReplyInOnePieceIsNotCopied(t *testing.T) {
	reply := []byte("HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy (squid/6.6)\r\n\r\n")
	const rounds = 100
	fresh := make([]upstream.Handshake, 0, rounds+1)
	for range cap(fresh) {
		fresh = append(fresh, handshake(t))
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
