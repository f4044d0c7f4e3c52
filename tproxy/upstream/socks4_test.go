package upstream_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// The proxy of the scripts, and what it is told.
const (
	socks4Proxy   = "socks4a://us%20er@proxy"
	socks4Request = "\x04\x01\x01\xbb\x00\x00\x00\x01us er\x00example.org\x00"

	socks4Granted = "\x00\x5a\x04\x38\xc0\x00\x02\x01"
)

// socks4Scripts are conversations with SOCKS4a proxies.
func socks4Scripts() []script {
	var scripts []script
	for _, answer := range []struct {
		name, says     string // by the proxy
		rest           string
		refused        int
		reason, advice string
		incomplete     bool
	}{
		{name: "granted", says: socks4Granted},
		{name: "early bytes", says: socks4Granted + "SSH-2.0-OpenSSH\r\n", rest: "SSH-2.0-OpenSSH\r\n"},
		{name: "early bytes like a reply", says: socks4Granted + socks4Granted, rest: socks4Granted},
		{name: "nonsense for an address", says: "\x00\x5a\xff\xff\xff\xff\xff\xffearly", rest: "early"},

		{name: "rejected", says: "\x00\x5b\x00\x00\x00\x00\x00\x00", refused: 91, reason: "Request rejected or failed", advice: "does not say why"},
		{name: "no identd", says: "\x00\x5c\x00\x00\x00\x00\x00\x00", refused: 92, reason: "Cannot connect to identd on the client", advice: "run an identd here"},
		{
			name: "another user", says: "\x00\x5d\x00\x00\x00\x00\x00\x00",
			refused: 93, reason: "Client program and identd report different user-ids", advice: "socks4a://user@host:port",
		},
		{name: "rejected and closed at once", says: "\x00\x5b", refused: 91, reason: "Request rejected or failed", advice: "does not say why"},

		{name: "unassigned", says: "\x00\x5e\x00\x00\x00\x00\x00\x00", advice: "unknown code 94"},
		{name: "zeros", says: "\x00\x00\x00\x00\x00\x00\x00\x00", advice: "unknown code 0"},
		{name: "SOCKS5", says: "\x05\xff", advice: "use socks5://"},
		{name: "HTTP", says: "HTTP/1.1 400 Bad Request\r\n\r\n", advice: "not SOCKS4"},
		{name: "version of the request", says: "\x04\x5a", advice: "not SOCKS4"},
		{name: "endless garbage", says: strings.Repeat("x", 32<<10), advice: "not SOCKS4"},
		{name: "one wrong octet", says: "\x01", advice: "not SOCKS4"},

		{name: "nothing", incomplete: true},
		{name: "half an answer", says: "\x00", incomplete: true},
		{name: "no address", says: socks4Granted[:2], incomplete: true},
		{name: "half an address", says: socks4Granted[:len(socks4Granted)-1], incomplete: true},
	} {
		scripts = append(scripts, script{
			name: "socks4a/" + answer.name, proxy: socks4Proxy, legs: []leg{{socks4Request, answer.says}},
			rest: answer.rest, refused: answer.refused, reason: answer.reason, says: answer.advice,
			incomplete: answer.incomplete, after: isNotNeeded,
		})
	}
	return scripts
}

func TestSOCKS4Request(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 62)+".", 4) // 252 bytes
	for _, test := range []struct {
		url    string
		target upstream.Target
		want   string
	}{
		{"socks4a://proxy", upstream.Target{Host: "example.org", Port: 443}, "\x04\x01\x01\xbb\x00\x00\x00\x01\x00example.org\x00"},
		{socks4Proxy, upstream.Target{Host: "a_b.example.org.", Port: 22}, "\x04\x01\x00\x16\x00\x00\x00\x01us er\x00a_b.example.org.\x00"},
		{"socks4a://proxy", upstream.Target{Host: long + "a.", Port: 256}, "\x04\x01\x01\x00\x00\x00\x00\x01\x00" + long + "a.\x00"},
		{"socks4a://proxy", upstream.Target{Host: "192.0.2.1", Port: 65535}, "\x04\x01\xff\xff\xc0\x00\x02\x01\x00"},
		{socks4Proxy, upstream.Target{Host: "::ffff:192.0.2.1", Port: 80}, "\x04\x01\x00\x50\xc0\x00\x02\x01us er\x00"},
		{"socks4a://" + long255 + "@proxy", upstream.Target{Host: "192.0.2.1", Port: 80}, "\x04\x01\x00\x50\xc0\x00\x02\x01" + long255 + "\x00"},
	} {
		handshake, err := parse(t, test.url).Handshake(test.target, nil)
		if err != nil {
			t.Errorf("%+v: %v", test.target, err)
			continue
		}
		if got := string(handshake.Hello()); got != test.want {
			t.Errorf("%+v:\n got %q\nwant %q", test.target, got, test.want)
		}
	}
}

// TestSOCKS4Targets: what the protocol has no words for is not asked for, and no proxy is
// connected to for it.
func TestSOCKS4Targets(t *testing.T) {
	proxy := parse(t, "socks4a://127.0.0.1:1") // where nothing listens
	for host, says := range map[string]string{
		"2001:db8::1": "use a socks5:// or http:// upstream for IPv6",
		"0.0.0.1":     "0.0.0.0/8",
		"0.0.0.255":   "0.0.0.0/8",
		"0.1.2.3":     "0.0.0.0/8",
		"::ffff:0:1":  "0.0.0.0/8",
	} {
		target := upstream.Target{Host: host, Port: 443}
		if _, err := proxy.Handshake(target, nil); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", host, err)
		}
		_, _, err := new(upstream.Dialer).Tunnel(t.Context(), proxy, target)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", host, err)
		}
	}
}

// TestSOCKS4Join: the user id tells two upstreams apart.
func TestSOCKS4Join(t *testing.T) {
	if parse(t, "socks4a://one@proxy").Join(parse(t, "socks4a://two@proxy")) {
		t.Error("two users are taken for one")
	}
	if !parse(t, "socks4a://one@proxy").Join(parse(t, "socks4a://one@proxy:1080")) {
		t.Error("one user is taken for two")
	}
}

// FuzzSOCKS4Reply: no panic, the same end however the bytes are cut and whoever drives, and
// a tunnel for the one answer that opens it.
func FuzzSOCKS4Reply(f *testing.F) {
	for _, s := range socks4Scripts() {
		f.Add([]byte(s.stream()), uint16(len(s.stream())/2), uint16(7))
	}
	e := startEngine(f)
	f.Fuzz(func(t *testing.T, stream []byte, cut, second uint16) {
		got := e.sameEverywhere(t, socks4Proxy, stream, int(cut), int(second))
		granted := len(stream) >= len(socks4Granted) && stream[0] == 0 && stream[1] == 90
		if got.done != granted || granted && (got.err != nil || got.rest != string(stream[len(socks4Granted):])) {
			t.Fatalf("%+v", got)
		}
		refused, ok := errors.AsType[*upstream.RefusedError](got.err)
		if said := len(stream) > 1 && stream[0] == 0 && stream[1] >= 91 && stream[1] <= 93; said != ok || ok && refused.Code != int(stream[1]) {
			t.Fatalf("%+v", got)
		}
	})
}

// TestSOCKS4Login: an account of a file is not sent as a user id.
func TestSOCKS4Login(t *testing.T) {
	err := parse(t, socks4Proxy).Login(auth.NewAccount("user", "password", nil), auth.Auto)
	if err == nil || !strings.Contains(err.Error(), "takes no account") || strings.Contains(err.Error(), "password") {
		t.Errorf("error %v", err)
	}
}
