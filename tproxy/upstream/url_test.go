package upstream_test

import (
	"bytes"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// long255 is the longest user name or password that SOCKS5 can send.
var long255 = strings.Repeat("x", 255)

func TestParse(t *testing.T) {
	for _, test := range []struct {
		raw, host, text, credential string
		port                        uint16
	}{
		{raw: "http://proxy.example.org:8080", host: "proxy.example.org", port: 8080, text: "http://proxy.example.org:8080"},
		{raw: "http://proxy.example.org:8080/", host: "proxy.example.org", port: 8080, text: "http://proxy.example.org:8080"},
		{raw: "HTTP://proxy", host: "proxy", port: 3128, text: "http://proxy:3128"},
		{raw: "http://proxy:", host: "proxy", port: 3128, text: "http://proxy:3128"},
		{raw: "proxy:8080", host: "proxy", port: 8080, text: "http://proxy:8080"},
		{raw: "proxy", host: "proxy", port: 3128, text: "http://proxy:3128"},
		{raw: "us_er.proxy-1.example.", host: "us_er.proxy-1.example.", port: 3128, text: "http://us_er.proxy-1.example.:3128"},
		{raw: "http://192.0.2.7:1", host: "192.0.2.7", port: 1, text: "http://192.0.2.7:1"},
		{raw: "http://[2001:DB8::1]:65535", host: "2001:db8::1", port: 65535, text: "http://[2001:db8::1]:65535"},
		{raw: "[::1]", host: "::1", port: 3128, text: "http://[::1]:3128"},
		{raw: "http://[fe80::1%25eth0]:8080", host: "fe80::1%eth0", port: 8080, text: "http://[fe80::1%25eth0]:8080"},
		{raw: "http://[fe80::1%eth0]:8080", host: "fe80::1%eth0", port: 8080, text: "http://[fe80::1%25eth0]:8080"},

		{raw: "http://user:pass@proxy", host: "proxy", port: 3128, credential: "user:pass", text: "http://proxy:3128"},
		{raw: "user:pass@proxy:8080", host: "proxy", port: 8080, credential: "user:pass", text: "http://proxy:8080"},
		{raw: "http://us%20er:p%40ss%3A%2Fw@proxy", host: "proxy", port: 3128, credential: "us er:p@ss:/w", text: "http://proxy:3128"},
		{raw: "http://us%20er:p%40ss%3Aw%2Fo%25rd@[::1]:3129", host: "::1", port: 3129, credential: "us er:p@ss:w/o%rd", text: "http://[::1]:3129"},
		{raw: "http://a+b:c+d@proxy", host: "proxy", port: 3128, credential: "a+b:c+d", text: "http://proxy:3128"},
		{raw: "http://user:pa:ss!$&'()*,;=~@proxy", host: "proxy", port: 3128, credential: "user:pa:ss!$&'()*,;=~", text: "http://proxy:3128"},
		{raw: "http://user:p%C3%A4ss@proxy", host: "proxy", port: 3128, credential: "user:päss", text: "http://proxy:3128"},
		{raw: "http://user@proxy", host: "proxy", port: 3128, credential: "user:", text: "http://proxy:3128"},
		{raw: "http://:pass@proxy", host: "proxy", port: 3128, credential: ":pass", text: "http://proxy:3128"},
		{raw: "socks5://proxy", host: "proxy", port: 1080, text: "socks5://proxy:1080"},
		{raw: "socks5h://proxy/", host: "proxy", port: 1080, text: "socks5://proxy:1080"},
		{raw: "SOCKS5://[2001:db8::1]:9050", host: "2001:db8::1", port: 9050, text: "socks5://[2001:db8::1]:9050"},
		{raw: "socks5://us%20er:p%40ss%3Aw%2Fo%25rd@proxy:1081", host: "proxy", port: 1081, credential: "us er:p@ss:w/o%rd", text: "socks5://proxy:1081"},
		{raw: "socks5://us%3Aer:pass%0a@proxy", host: "proxy", port: 1080, credential: "us:er:pass\n", text: "socks5://proxy:1080"},
		{raw: "socks5://user@proxy", host: "proxy", port: 1080, credential: "user:", text: "socks5://proxy:1080"},
		{raw: "socks5://:@proxy", host: "proxy", port: 1080, text: "socks5://proxy:1080"},
		{raw: "socks5://" + long255 + ":" + long255 + "@proxy", host: "proxy", port: 1080, credential: long255 + ":" + long255, text: "socks5://proxy:1080"},
		{raw: "socks4a://proxy", host: "proxy", port: 1080, text: "socks4a://proxy:1080"},
		{raw: "SOCKS4A://us%3Aer%0a@192.0.2.7:1081/", host: "192.0.2.7", port: 1081, credential: "us:er\n", text: "socks4a://192.0.2.7:1081"},
		{raw: "socks4a://user:@proxy", host: "proxy", port: 1080, credential: "user", text: "socks4a://proxy:1080"},
		{raw: "http+unix:///run/proxy.sock", text: "http+unix:///run/proxy.sock"},
		{raw: "HTTP+UNIX://user:p%40ss@/run/a%2cb%40c%20d.sock", credential: "user:p@ss", text: "http+unix:///run/a%2Cb%40c%20d.sock"},
		{raw: "socks5h+unix://us%20er:pass@%2Frun%2Fproxy.sock", credential: "us er:pass", text: "socks5+unix:///run/proxy.sock"},
		{raw: "socks4a+unix://user@/run/proxy.sock", credential: "user", text: "socks4a+unix:///run/proxy.sock"},
		{raw: "http+unix:///" + strings.Repeat("a", 106), text: "http+unix:///" + strings.Repeat("a", 106)},
		{raw: "http://:@proxy", host: "proxy", port: 3128, text: "http://proxy:3128"},
		{raw: "http://@proxy", host: "proxy", port: 3128, text: "http://proxy:3128"},
	} {
		proxy, err := parseBasic(test.raw)
		if err != nil {
			t.Errorf("%s: %v", test.raw, err)
			continue
		}
		if proxy.Host() != test.host || proxy.Port() != test.port || proxy.String() != test.text {
			t.Errorf("%s: %s, %d, %s", test.raw, proxy.Host(), proxy.Port(), proxy)
		}
		if sent := credentialOf(t, proxy); sent != test.credential {
			t.Errorf("%s: sends the credential %q, want %q", test.raw, sent, test.credential)
		}
	}
}

// credentialOf returns what a handshake with the proxy tells it, decoded; "" for
// nothing.
func credentialOf(t *testing.T, proxy *upstream.Proxy) string {
	t.Helper()
	handshake, err := proxy.Handshake(upstream.Target{Host: "example.org", Port: 443}, acquire(t, proxy))
	if err != nil {
		t.Fatal(err)
	}
	hello := handshake.Hello()
	if hello[0] == 4 {
		userID, _, _ := bytes.Cut(hello[8:], []byte{0})
		return string(userID)
	}
	if hello[0] == 5 {
		if !bytes.Contains(hello[2:], []byte{2}) {
			return ""
		}
		message, _, _, err := handshake.Feed([]byte{5, 2})
		if err != nil || message[0] != 1 {
			t.Fatalf("%q, %v", message, err)
		}
		user, after := message[2:2+int(message[1])], message[2+int(message[1]):]
		if len(after) != 1+int(after[0]) {
			t.Fatalf("a message of the wrong length: %q", message)
		}
		return string(user) + ":" + string(after[1:])
	}
	_, after, found := strings.Cut(string(hello), "\r\nProxy-Authorization: Basic ")
	if !found {
		return ""
	}
	encoded, _, _ := strings.Cut(after, "\r\n")
	plain, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

func TestParseErrors(t *testing.T) {
	const (
		encode  = "percent-encode"
		use     = "use http://host:port"
		bracket = "http://[2001:db8::1]:3128"
	)
	for _, test := range []struct{ raw, shown, says string }{
		{"ftp://x", "ftp://x: ", `scheme "ftp" is not supported: use http://host:port, https://host:port, socks5://host:port, socks4a://host:port or direct://`},
		{"quic://proxy:443", "quic://proxy:443: ", `scheme "quic" is not supported`},
		{"socks4://user:S3cr3t@proxy", "socks4://***@proxy: ", "cannot be asked for names: use socks4a://host:port"},
		{"socks4a://user:S3cr3t@proxy", "socks4a://***@proxy: ", "no password"},
		{"socks4a://:S3cr3t@proxy", "socks4a://***@proxy: ", "no password"},
		{"socks4a://S3cr3t%00@proxy", "socks4a://***@proxy: ", "%00"},
		{"socks4a://S3cr3t" + long255 + "@proxy", "socks4a://***@proxy: ", "255 bytes"},
		{"socks4a://S3cr3t%zz@proxy", "socks4a://***@proxy: ", "%25"},
		{"socks4a://user:S3cr3t/x@proxy", "socks4a://***@proxy: ", encode},
		{"unix:///run/proxy.sock", "unix:///***: ", "use http+unix:///run/proxy.sock, or socks5+unix"},
		{"unix:/run/proxy.sock", "unix:***: ", "use http+unix:///run/proxy.sock, or socks5+unix"},
		{"https+unix:///run/proxy.sock", "https+unix:///run/proxy.sock: ", "use http+unix:///run/proxy.sock, or socks5+unix"},
		{"+unix:///run/proxy.sock", "+unix:///run/proxy.sock: ", "use http+unix:///run/proxy.sock"},
		{"http+unix://", "http+unix://: ", "slash"},
		{"http+unix://run/proxy.sock", "http+unix://run/***: ", "slash"},
		{"http+unix://user:S3cr3t@", "http+unix://***@: ", "slash"},
		{"http+unix://user:S3cr3t/run/proxy.sock", "http+unix://user:***: ", "slash"},
		{"http+unix://user:S3cr3t/x@/run/proxy.sock", "http+unix://***@/run/proxy.sock: ", encode},
		{"http+unix://user:S3cr3t@/run/pro@xy.sock", "http+unix://***@xy.sock: ", encode},
		{"http+unix:///run/", "http+unix:///run/: ", "slash"},
		{"http+unix:///run/pro xy.sock", `"http+unix:///run/pro xy.sock": `, encode},
		{"http+unix:///run/pro,xy.sock", "http+unix:///run/pro,xy.sock: ", "%2C"},
		{"http+unix:///run/proxy%0a.sock", "http+unix:///run/proxy%0a.sock: ", "control characters"},
		{"http+unix:///run/proxy%zz", "http+unix:///run/proxy%zz: ", "%25"},
		{"http+unix:///run/proxy?x", "http+unix:///run/proxy?x: ", encode},
		{"http+unix:///" + strings.Repeat("a", 107), "", "107 bytes"},
		{"socks4a+unix://user:S3cr3t@/run/proxy.sock", "socks4a+unix://***@/run/proxy.sock: ", "no password"},
		{"socks4a://", "socks4a://: ", "use socks4a://host:port"},
		{"socks5://", "socks5://: ", "use socks5://host:port"},
		{"socks5://:S3cr3t@proxy", "socks5://***@proxy: ", "user name"},
		{"socks5://user:S3cr3t" + long255 + "@proxy", "socks5://***@proxy: ", "255 bytes"},
		{"socks5://S3cr3t" + long255 + ":x@proxy", "socks5://***@proxy: ", "255 bytes"},
		{"socks5://user:S3cr3t/x@proxy:80", "socks5://***@proxy:80: ", encode},
		{"socks5h://user:S3cr3t", "socks5h://user:***: ", "use socks5://host:port"},
		{"socks5://proxy/path", "socks5://proxy/***: ", "use socks5://host:port"},
		{"socks5://proxy:1080x", "socks5://proxy:***: ", "use socks5://host:port"},
		{"socks5://pr..xy", "socks5://pr..xy: ", "use socks5://host:port"},
		{"socks5://2001:db8::1", "socks5://2001:***: ", "socks5://[2001:db8::1]:1080"},
		{"socks5://[2001:db8::1", "", "socks5://[2001:db8::1]:1080"},
		{"socks5://[x]", "", "socks5://[2001:db8::1]:1080"},
		{"", `"": `, use},
		{"http://", "http://: ", use},
		{"http://:3128", "http://:3128: ", use},
		{"http://user:S3cr3t@", "http://***@: ", use},
		{"http://user:S3cr3t@:80", "http://***@:80: ", use},

		{"http://user:S3cr3t/x@proxy:80", "http://***@proxy:80: ", encode},
		{"http://user:S3cr3t#x@proxy:80", "http://***@proxy:80: ", encode},
		{"http://user:S3cr3t?x@proxy:80", "http://***@proxy:80: ", encode},
		{"http://user:S3cr3t@x@proxy:80", "http://***@proxy:80: ", encode},
		{"http://us er:S3cr3t@proxy", "http://***@proxy: ", encode},
		{"http://user:S3cr3t\"@proxy", "http://***@proxy: ", encode},
		{"http://user:S3cr3t\x00@proxy", "http://***@proxy: ", encode},
		{"http://user:S3cr3t\r\n@proxy", "http://***@proxy: ", encode},
		{"http://user:S3cr3tä@proxy", "http://***@proxy: ", encode},
		{"http://user:S3cr3t%@proxy", "http://***@proxy: ", "%25"},
		{"http://user:S3cr3t%zz@proxy", "http://***@proxy: ", "%25"},
		{"http://us%zzer:S3cr3t@proxy", "http://***@proxy: ", "%25"},
		{"http://us%3Aer:S3cr3t@proxy", "http://***@proxy: ", "colon"},
		{"http://us%0Aer:S3cr3t@proxy", "http://***@proxy: ", "control characters"},
		{"http://user:S3cr3t%0d%0aX@proxy", "http://***@proxy: ", "control characters"},
		{"http://user:S3cr3t%7F@proxy", "http://***@proxy: ", "control characters"},

		// The host forgotten: what looks like a port or a path is a password.
		{"http://user:S3cr3t", "http://user:***: ", use},
		{"user:S3cr3t/", "user:***: ", use},
		{"http://user:12/S3cr3t", "http://user:***: ", encode},
		{"http://user:12#S3cr3t", "http://user:***: ", encode},
		{"user:S3cr3t]:5", "user:***: ", use},

		{"http://proxy:3128/path", "http://proxy:***: ", use},
		{"http://proxy/path", "http://proxy/***: ", use},
		{"http://proxy?query", "http://proxy?***: ", use},
		{"http://proxy#fragment", "http://proxy#***: ", use},
		{"http://proxy//", "http://proxy//: ", use},
		{"http://proxy:0", "http://proxy:0: ", "1 to 65535"},
		{"http://proxy:65536", "http://proxy:65536: ", "1 to 65535"},
		{"http://proxy:+80", "http://proxy:***: ", "1 to 65535"},
		{"http://proxy:80:80", "http://proxy:***: ", "more than one colon"},
		{"http://2001:db8::1", "http://2001:***: ", bracket},
		{"http://[2001:db8::1", "", bracket},
		{"http://[2001:db8::x]:80", "http://[2001:db8::x]:80: ", bracket},
		{"http://[192.0.2.1]:80", "http://[192.0.2.1]:80: ", bracket},
		{"http://[fe80::1%25]:80", "http://[fe80::1%25]:80: ", bracket},
		{"http://[fe80::1%a\nb]:80", `"http://[fe80::1%a\nb]:80": `, bracket},
		{"http://[::1]80", "http://[::1]80: ", use},
		{"http://pro xy", `"http://pro xy": `, use},
		{"http://proxy\n", `"http://proxy\n": `, use},
		{"http://pröxy", `"http://pr\u00f6xy": `, "xn--"},
		{"http://pro%78y", "http://pro%78y: ", use},
		{"http://pro..xy", "http://pro..xy: ", use},
		{"http://256.0.0.1", "http://256.0.0.1: ", use},
		{"http://" + strings.Repeat("a", 64), "", use},
		{"http://" + strings.Repeat("a.", 2500), "", "4096 bytes"},
	} {
		proxy, err := upstream.Parse(test.raw)
		if err == nil {
			t.Errorf("%q: taken as %s", test.raw, proxy)
			continue
		}
		text := err.Error()
		if !strings.HasPrefix(text, test.shown) || !strings.Contains(text, test.says) {
			t.Errorf("%q:\n got %s\nwant %s...%s", test.raw, text, test.shown, test.says)
		}
		if strings.Contains(text, "S3cr3t") {
			t.Errorf("%q: the password is in %s", test.raw, text)
		}
		if strings.ContainsAny(text, "\r\n") || len(text) > 700 {
			t.Errorf("%q: not one line of bearable length: %q", test.raw, text)
		}
	}
}

// FuzzParse looks for a way to have a password shown.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{"", "@proxy", "@proxy:80/", "/x@proxy", "]:5", "%zz@[::1]", "\n@x", "://x", "@[::1]:x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, after string) {
		for _, before := range []string{"http://user:", "user:", "ftp://user:", "http://user:1", "[user:", "socks5://user:", "socks4a://user:", "http+unix://user:"} {
			proxy, err := upstream.Parse(before + "S3cr3t" + after)
			switch {
			case err == nil:
				if strings.Contains(proxy.String(), "S3cr3t") {
					t.Errorf("%q is shown as %s", before+after, proxy)
				}
			case strings.ContainsAny(err.Error(), "\r\n"):
				t.Errorf("more than one line: %q", err)
			case strings.Contains(err.Error(), "S3cr3t") && before != "[user:":
				t.Errorf("%q: %v", before+after, err)
			}
		}
	})
}
