package pac

import (
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"testing"
)

// FuzzResult: whatever a script returns, the choices are few, in the order of the
// answer, and each is a URL that names a host and a port and nothing else.
func FuzzResult(f *testing.F) {
	for _, seed := range []string{
		"", ";", "DIRECT", "PROXY a:1; DIRECT", "proxy\ta:1 ;HTTPS [::1]:2;SOCKS5 ::1", "PROXY a:0", "PROXY a:b:1",
		"PROXY user:pass@h:1", "PROXY h:1/path", "PROXY [::1%25eth0]:1", "PROXY ä:1", "DIRECT x", "SOCKS4 [1.2.3.4]", "PROXY " + strings.Repeat("a", 300),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, result string) {
		choices, err := parseResult(result)
		if err != nil {
			if choices != nil || strings.Contains(err.Error(), "\n") {
				t.Fatalf("%q: %v, %v", result, choices, err)
			}
			return
		}
		if len(choices) == 0 || len(choices) > maxChoices {
			t.Fatalf("%q: %d choices", result, len(choices))
		}
		rest := strings.ToLower(result)
		for _, choice := range choices {
			if choice.Direct {
				if choice.Proxy != "" {
					t.Fatalf("%q: %+v", result, choice)
				}
				continue
			}
			parsed, err := url.Parse(choice.Proxy)
			if err != nil || parsed.User != nil || parsed.Path+parsed.RawQuery+parsed.Fragment != "" || parsed.Opaque != "" {
				t.Fatalf("%q: %q is no proxy: %v", result, choice.Proxy, err)
			}
			host, port, err := net.SplitHostPort(parsed.Host)
			number, err2 := strconv.ParseUint(port, 10, 16)
			if err != nil || err2 != nil || number == 0 || host == "" {
				t.Fatalf("%q: %q names no host and port", result, choice.Proxy)
			}
			if _, err := netip.ParseAddr(host); err == nil {
				continue // in its short form, not the script's
			}
			_, behind, found := strings.Cut(rest, strings.ToLower(host))
			if !found {
				t.Fatalf("%q: %q is not of the answer, or not in its order", result, host)
			}
			rest = behind
		}
	})
}
