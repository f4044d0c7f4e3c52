package bypass

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http/httpproxy"
)

// oracle asks httpproxy whether a host, a name or an address, is exempt.
func oracle(t *testing.T, entries []string, host string, port uint16) bool {
	t.Helper()
	const proxy = "http://proxy.invalid:3128"
	config := httpproxy.Config{HTTPProxy: proxy, NoProxy: strings.Join(entries, ",")}
	use, err := config.ProxyFunc()(&url.URL{Scheme: "http", Host: net.JoinHostPort(host, strconv.Itoa(int(port)))})
	if err != nil {
		t.Fatal(err)
	}
	return use == nil
}

// Where httpproxy reads an entry differently on purpose or by omission:
var (
	// It knows no port behind a prefix or *, and takes such entries for names.
	prefixOrAllWithPort = regexp.MustCompile(`^\*:|/[^:]*:[0-9]+$|\]/`)
	// It knows brackets only together with a port.
	bracketsAlone = regexp.MustCompile(`^\[([^]]*)\]$`)
	// It takes the dot at the end for a part of the name.
	dotAtEnd = regexp.MustCompile(`[.。．｡](:[0-9]+)?$`)
)

// translate returns the entries of a list that httpproxy knows, as they are and in
// its notation.
func translate(text string) (ours, theirs []string) {
	for _, entry := range strings.FieldsFunc(text, separates) {
		if !prefixOrAllWithPort.MatchString(entry) {
			ours = append(ours, entry)
			entry = bracketsAlone.ReplaceAllString(entry, "$1")
			theirs = append(theirs, dotAtEnd.ReplaceAllString(entry, "$1"))
		}
	}
	return ours, theirs
}

// asciiName is what a name can be that comes out of a sniffer.
var asciiName = regexp.MustCompile(`^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?$`)

// compare fails the test when the list and httpproxy disagree on a host. Hosts that
// httpproxy always exempts are left out: localhost and loopback addresses.
func compare(t *testing.T, text, host string, port uint16) {
	t.Helper()
	ours, theirs := translate(text)
	list := parse(t, strings.Join(ours, " "))
	address, err := netip.ParseAddr(host)
	var got, want bool
	switch {
	case err == nil && !address.Unmap().IsLoopback():
		got = list.MatchAddr(netip.AddrPortFrom(address, port))
		want = oracle(t, theirs, address.String(), port)
	case err != nil && asciiName.MatchString(host) && len(host) <= maxName:
		host = strings.TrimSuffix(host, ".")
		if host == "localhost" {
			return
		}
		got = list.MatchName(host+".", port)
		want = oracle(t, theirs, host, port)
	default:
		return
	}
	if got != want {
		t.Errorf("%q exempts %s port %d: %v, httpproxy says %v", text, host, port, got, want)
	}
}

// consistent fails the test when a parsed list is not what it should be whatever is in it.
func consistent(t *testing.T, text string, list *List) {
	t.Helper()
	again := parse(t, list.String())
	if again.String() != list.String() {
		t.Errorf("%q is written %q, and that %q", text, list, again)
	}
	prefixes := list.Prefixes()
	if !slices.Equal(again.Prefixes(), prefixes) {
		t.Errorf("%q: prefixes %v, and written and read again %v", text, prefixes, again.Prefixes())
	}
	for i, prefix := range prefixes {
		if prefix != prefix.Masked() || prefix.Addr().Is4In6() {
			t.Errorf("%q: prefix %v", text, prefix)
		}
		if i > 0 && (prefix.Overlaps(prefixes[i-1]) || !prefixes[i-1].Addr().Less(prefix.Addr())) {
			t.Errorf("%q: %v after %v", text, prefix, prefixes[i-1])
		}
		if !list.MatchAddr(netip.AddrPortFrom(prefix.Addr(), 1)) {
			t.Errorf("%q: %v is not exempt", text, prefix)
		}
	}
}

// TestLikeHTTPProxy makes lists of well-formed entries, none of which may be
// refused, from a vocabulary so small that they often match.
func TestLikeHTTPProxy(t *testing.T) {
	hosts := []string{
		"example.org", "a.example.org", "b.a.example.org", "notexample.org", "org", "EXAMPLE.org.", "xn--bcher-kva.example", "example",
		"192.0.2.1", "192.0.2.2", "192.1.0.0", "10.0.0.1", "::ffff:192.0.2.1", "2001:db8::1", "2001:db8::2", "2001:dead::", "fe80::1",
	}
	names := []string{"example.org", "Example.ORG", "a.example.org", "org", "example.org.", "bücher.example", "localhost", "_a.-.example"}
	addresses := []string{"192.0.2.1", "10.0.0.1", "::ffff:192.0.2.1", "2001:DB8::1", "2001:db8:0::2", "fe80::", "::"}
	ports := []string{"", "", ":80", ":443", ":65535"}
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(from []string) string { return from[random.IntN(len(from))] }
	for range 3000 {
		var text strings.Builder
		for range 1 + random.IntN(4) {
			switch address, port := netip.MustParseAddr(pick(addresses)), pick(ports); random.IntN(8) {
			case 0, 1, 2:
				text.WriteString(pick([]string{"", "", ".", "*."}) + pick(names) + port)
			case 3, 4:
				if text.WriteString(address.String()); address.Is4() {
					text.WriteString(port)
				}
			case 5:
				fmt.Fprintf(&text, "[%s]%s", address, port)
			case 6:
				fmt.Fprintf(&text, "%s/%d%s", address, random.IntN(address.BitLen()+1), pick([]string{"", port}))
			case 7:
				if random.IntN(4) == 0 {
					text.WriteString("*" + port)
				}
			}
			text.WriteString(pick([]string{",", ", ", " ", "\n", ",,"}))
		}
		list := parse(t, text.String())
		consistent(t, text.String(), list)
		for range 4 {
			compare(t, text.String(), pick(hosts), []uint16{80, 443, 8080}[random.IntN(3)])
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []struct {
		text, host string
		port       uint16
	}{
		{"example.org,.example.net *.example.com:443", "a.example.org", 443},
		{"192.0.2.1,10.1.2.3/8;2001:db8::/32", "10.0.0.1", 80},
		{"10.0.0.0/33", "10.0.0.1", 80},
		{"::ffff:10.0.0.0/104,[2001:db8::1]:443,[::1]", "2001:db8::1", 443},
		{"10.0.0.0/8:443 [2001:db8::]/32:80 *:25", "::ffff:10.0.0.1", 443},
		{"*", "example.org", 1},
		{"bücher.example.", "xn--bcher-kva.example", 80},
		{"foo*bar,example..org,example.org:99999,http://example.org", "example.org", 80},
		{"fe80::1%lan0", "fe80::1", 80},
	} {
		f.Add(seed.text, seed.host, seed.port)
	}
	f.Fuzz(func(t *testing.T, text, host string, port uint16) {
		list, err := Parse(text)
		if err != nil {
			if list != nil || strings.ContainsAny(err.Error(), "\r\n") || !strings.HasPrefix(err.Error(), `entry "`) {
				t.Errorf("%q: %v, %q", text, list, err)
			}
			return
		}
		consistent(t, text, list)
		compare(t, text, host, port)
	})
}
