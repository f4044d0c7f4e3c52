package upstream_test

import (
	"bufio"
	"crypto/md5"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// origin is where the tunnels of these tests go.
var origin = upstream.Target{Host: "origin.test", Port: 443}

// talk has a proxy answer each request of a handshake by answers, in turn, cut into pieces of
// size bytes (0: whole); it returns the requests.
func talk(t testing.TB, proxy *upstream.Proxy, size int, answers ...string) (requests []*http.Request, rest string, err error) {
	t.Helper()
	lease, err := proxy.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	handshake, err := proxy.Handshake(origin, lease)
	if err != nil {
		t.Fatal(err)
	}
	out := string(handshake.Hello())
	for i, answer := range answers {
		request, err := http.ReadRequest(bufio.NewReader(strings.NewReader(out)))
		if err != nil || request.Method != http.MethodConnect || request.Host != "origin.test:443" {
			t.Fatalf("request %d is %q: %v", i, out, err)
		}
		requests, out = append(requests, request), ""
		for len(answer) > 0 {
			n := len(answer)
			if size > 0 {
				n = min(n, size)
			}
			more, rest, done, err := handshake.Feed([]byte(answer[:n]))
			out, answer = out+string(more), answer[n:]
			if err != nil || done {
				lease.Settle(err)
				return requests, string(rest) + answer, err
			}
		}
	}
	t.Fatalf("the handshake wants more after %d requests: %q", len(requests), out)
	return nil, "", nil
}

// proof returns what a request authenticates itself by.
func proof(request *http.Request) string { return request.Header.Get("Proxy-Authorization") }

const (
	opened      = "HTTP/1.1 200 Connection established\r\n\r\nearly"
	wantsDigest = "HTTP/1.1 407 No\r\nProxy-Authenticate: Digest realm=\"r\", nonce=\"n%d\", qop=\"auth\"%s\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 4\r\n\r\nbody"
	chunkedBody = "Transfer-Encoding: chunked\r\n\r\n4;x=y\r\nHTTP\r\n0a\r\n/1.1 200\r\n\r\r\n0\r\nTrailer: x\r\n\r\n"
	wantsNTLM   = "HTTP/1.1 407 No\r\nproxy-authenticate: NTLM%s, Basic realm=\"a, NTLM\"\r\n" + chunkedBody
)

func md5Hex(text string) string {
	sum := md5.Sum([]byte(text))
	return hex.EncodeToString(sum[:])
}

// wantDigest computes the answer to a challenge by itself (RFC 7616 section 3.4.1).
func wantDigest(t *testing.T, request *http.Request, nonce string, count int) {
	t.Helper()
	challenge := auth.AppendChallenges(nil, []byte(proof(request)))
	if len(challenge) != 1 || !challenge[0].Is("Digest") {
		t.Fatalf("sent %q", proof(request))
	}
	get := challenge[0].Param
	nc := fmt.Sprintf("%08x", count)
	want := md5Hex(md5Hex("user:r:pass") + ":" + nonce + ":" + nc + ":" + get("cnonce") + ":auth:" + md5Hex("CONNECT:origin.test:443"))
	if get("response") != want || get("nc") != nc || get("nonce") != nonce || get("uri") != "origin.test:443" || get("username") != "user" {
		t.Errorf("sent %q, want response %s", proof(request), want)
	}
}

// TestDigestHandshake finds out in one connection what the proxy wants, in every cut, and has
// the next ones send it without being asked; a nonce that is stale is no refusal.
func TestDigestHandshake(t *testing.T) {
	first := fmt.Sprintf(wantsDigest, 1, "")
	for size := range 60 {
		proxy := unknown(t)
		requests, rest, err := talk(t, proxy, size, first, opened)
		if err != nil || rest != "early" || proof(requests[0]) != "" {
			t.Fatalf("pieces of %d: %v, %q, %q first", size, err, rest, proof(requests[0]))
		}
		wantDigest(t, requests[1], "n1", 1)
		if _, ok := proxy.Standing(); !ok {
			t.Fatal("the next flow would have to wait")
		}
		requests, _, err = talk(t, proxy, size, opened)
		if err != nil {
			t.Fatal(err)
		}
		wantDigest(t, requests[0], "n1", 2)
		requests, _, err = talk(t, proxy, size, fmt.Sprintf(wantsDigest, 2, ", stale=TRUE"), opened)
		if err != nil {
			t.Fatal(err)
		}
		wantDigest(t, requests[0], "n1", 3)
		wantDigest(t, requests[1], "n2", 1)
		requests, _, err = talk(t, proxy, size, opened)
		if err != nil {
			t.Fatal(err)
		}
		wantDigest(t, requests[0], "n2", 2)
		if _, _, err = talk(t, proxy, size, fmt.Sprintf(wantsDigest, 3, "")); !upstream.Denied(err) || !strings.Contains(err.Error(), "sent by Digest") {
			t.Fatalf("the password changed: %v", err)
		}
		if _, _, err := try(proxy); !errors.Is(err, upstream.ErrCredentialRefused) {
			t.Fatalf("after a refusal: %v", err)
		}
	}
}

// unknown is a proxy of which nothing is known.
func unknown(t testing.TB) *upstream.Proxy {
	t.Helper()
	proxy, err := upstream.Parse("http://user:pass@proxy.test:3128")
	if err != nil {
		t.Fatal(err)
	}
	return proxy
}

// ntlmChallenge is the second message of [MS-NLMP] section 4.2.4.3.
var ntlmChallenge = "TlRMTVNTUAACAAAADAAMADgAAAAzgoriASNFZ4mrze8AAAAAAAAAACQAJABEAAAABgBwFwAAAA9TAGUAcgB2AGUAcgACAAwARABvAG0AYQBpAG4AAQAMAFMAZQByAHYAZQByAAAAAAA="

func TestNTLMHandshake(t *testing.T) {
	for size := range 60 {
		proxy := unknown(t)
		for i, want := range []int{3, 2} { // the second goes without the bare request
			answers := []string{fmt.Sprintf(wantsNTLM, ""), fmt.Sprintf(wantsNTLM, " "+ntlmChallenge), opened}
			requests, rest, err := talk(t, proxy, size, answers[i:]...)
			if err != nil || rest != "early" || len(requests) != want {
				t.Fatalf("pieces of %d: %v, %q, %d requests", size, err, rest, len(requests))
			}
			for j, kind := range []byte{1, 3} {
				message, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(proof(requests[want-2+j]), "NTLM "))
				if err != nil || len(message) < 32 || string(message[:8]) != "NTLMSSP\x00" || message[8] != kind {
					t.Fatalf("message %d: %q, %v", kind, message, err)
				}
			}
		}
		_, _, err := talk(t, proxy, size, fmt.Sprintf(wantsNTLM, " "+ntlmChallenge), fmt.Sprintf(wantsNTLM, ""))
		if !upstream.Denied(err) || !strings.Contains(err.Error(), "sent by NTLM") {
			t.Fatalf("the password changed: %v", err)
		}
	}
}

// TestReconnect: a proxy that closes after its 407 is asked on another connection, and what
// it said is known there; NTLM cannot be done with one that closes in its middle.
func TestReconnect(t *testing.T) {
	for _, end := range []string{
		"Content-Length: 4\r\nConnection: close\r\n\r\n", "\r\n", "Content-Length: 99999\r\n\r\n",
		"Content-Length: 4\r\nContent-Length: 4\r\n\r\n", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
		"Transfer-Encoding: gzip, chunked\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\nx\r\n", "Transfer-Encoding: chunked\r\n\r\n4\r\nfive!",
		"Transfer-Encoding: chunked\r\n\r\nfffff\r\n", "Transfer-Encoding: chunked\r\n\r\n1;" + strings.Repeat("x", 1<<16),
	} {
		for _, size := range []int{0, 1} {
			proxy := unknown(t)
			head := "HTTP/1.1 407 No\r\nProxy-Authenticate: Digest realm=\"r\", nonce=\"n1\", qop=\"auth\"\r\n"
			if _, _, err := talk(t, proxy, size, head+end); !errors.Is(err, upstream.ErrReconnect) {
				t.Fatalf("%.60q: %v", end, err)
			}
			requests, _, err := talk(t, proxy, size, opened)
			if err != nil {
				t.Fatal(err)
			}
			wantDigest(t, requests[0], "n1", 1)
		}
	}
	proxy := unknown(t)
	middle := "HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM " + ntlmChallenge + "\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
	if _, _, err := talk(t, proxy, 0, fmt.Sprintf(wantsNTLM, ""), middle); err == nil || errors.Is(err, upstream.ErrReconnect) || !strings.Contains(err.Error(), "middle of NTLM") {
		t.Errorf("closed in the middle of NTLM: %v", err)
	}
}

// TestNotAsked: a proxy that opens tunnels to those who say nothing is told nothing, until it
// asks: then the flow is sent again.
func TestNotAsked(t *testing.T) {
	proxy := unknown(t)
	if requests, _, err := talk(t, proxy, 0, opened); err != nil || proof(requests[0]) != "" {
		t.Fatal(err, proof(requests[0]))
	}
	if lease, ok := proxy.Standing(); lease != nil || !ok {
		t.Fatalf("the next flow has a lease: %v, %t", lease, ok)
	}
	if _, _, err := talk(t, proxy, 0, fmt.Sprintf(wantsDigest, 1, "")); !errors.Is(err, upstream.ErrReconnect) {
		t.Fatal(err)
	}
	requests, _, err := talk(t, proxy, 0, fmt.Sprintf(wantsDigest, 1, ""), opened)
	if err != nil {
		t.Fatal(err)
	}
	wantDigest(t, requests[1], "n1", 1)
}

// TestWhatIsOffered: the strongest that can be used is chosen; what cannot be is named, with
// what to do about it.
func TestWhatIsOffered(t *testing.T) {
	const answer = "HTTP/1.1 407 No\r\nProxy-Authenticate: %s\r\nContent-Length: 0\r\n\r\n"
	md5Only, sha := `Digest realm=r, nonce=n, qop=auth`, `Digest realm=r, nonce=n, qop="auth-int, auth", algorithm=SHA-256`
	for _, test := range []struct {
		offered string
		pinned  auth.Method
		chosen  string // the beginning of the proof
		says    string
	}{
		{"Basic realm=x", auth.Auto, "Basic ", ""},
		{"Basic realm=x, " + md5Only, auth.Auto, "Digest ", ""},
		{md5Only + ", " + sha + ", Basic realm=x", auth.Auto, "Digest ", "SHA-256"},
		{sha + ", NTLM, Negotiate", auth.Auto, "NTLM ", ""},
		{"Negotiate", auth.Auto, "", "Kerberos"},
		{"Bearer, Kerberos", auth.Auto, "", "Bearer, Kerberos"},
		{"NTLM, Basic realm=x", auth.Digest, "", "--upstream-auth digest"},
		{"Digest realm=r, nonce=n, qop=auth-int", auth.Auto, "", "none of which"},
		{"Digest realm=r, nonce=n, algorithm=MD4", auth.Auto, "", "none of which"},
	} {
		proxy := unknown(t)
		if err := proxy.Login(nil, test.pinned); err != nil {
			t.Fatal(err)
		}
		answers := []string{fmt.Sprintf(answer, test.offered)}
		if test.chosen != "" {
			answers = append(answers, opened)
		}
		requests, _, err := talk(t, proxy, 0, answers...)
		switch {
		case test.chosen == "":
			if err == nil || upstream.Denied(err) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v, want %q", test.offered, err, test.says)
			}
		case err != nil:
			t.Errorf("%s: %v", test.offered, err)
		default:
			if last := proof(requests[len(requests)-1]); !strings.HasPrefix(last, test.chosen) || !strings.Contains(last, test.says) {
				t.Errorf("%s: sent %q", test.offered, last)
			}
		}
	}
}

// TestBounded: a proxy that asks for ever is left.
func TestBounded(t *testing.T) {
	for _, answer := range []string{fmt.Sprintf(wantsDigest, 1, ", stale=true"), fmt.Sprintf(wantsNTLM, " "+ntlmChallenge)} {
		proxy := unknown(t)
		requests, _, err := talk(t, proxy, 0, answer, answer, answer, answer, answer, answer, answer)
		if err == nil || len(requests) > 5 {
			t.Errorf("%d requests, %v", len(requests), err)
		}
	}
}

// TestReplacedAccount: a new password is tried at once, and alone.
func TestReplacedAccount(t *testing.T) {
	proxy := unknown(t)
	if _, _, err := talk(t, proxy, 0, fmt.Sprintf(wantsDigest, 1, ""), fmt.Sprintf(wantsDigest, 2, "")); !upstream.Denied(err) {
		t.Fatal(err)
	}
	wantRefused(t, proxy)
	for _, password := range []string{"pass", "other"} {
		if err := proxy.Login(auth.NewAccount("user", password, nil), auth.Auto); err != nil {
			t.Fatal(err)
		}
		if password == "pass" {
			wantRefused(t, proxy)
		}
	}
	if _, _, err := talk(t, proxy, 0, fmt.Sprintf(wantsDigest, 3, ""), opened); err != nil {
		t.Fatal(err)
	}
	if err := proxy.Login(auth.NewAccount("user", "a\r\nb", nil), auth.Auto); err == nil {
		t.Error("a line break went into a field")
	}
}
