package resolver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/miekg/dns"
)

// wayFunc is a way that is a function.
type wayFunc func(ctx context.Context, query []byte) ([]byte, error)

func (f wayFunc) Exchange(ctx context.Context, query []byte) ([]byte, error) { return f(ctx, query) }
func (f wayFunc) String() string                                             { return "way" }

func TestLongestZone(t *testing.T) {
	z := newZones([]Zone{
		{Suffix: ""}, {Suffix: "Corp.TEST."}, {Suffix: "lab.corp.test", Below: true}, {Suffix: "b.lab.corp.test"}, {Suffix: "corp.test", Below: true},
	})
	for name, want := range map[string]string{
		"":                  "",
		"test":              "",
		"notcorp.test":      "",
		"corp.test":         "Corp.TEST.",
		"a.corp.test":       "Corp.TEST.",
		"lab.corp.test":     "Corp.TEST.",
		"a.lab.corp.test":   "lab.corp.test",
		"b.lab.corp.test":   "b.lab.corp.test",
		"c.b.lab.corp.test": "b.lab.corp.test",
		"corp.test.org":     "",
	} {
		if found := z.of(name); found == nil || found.Suffix != want {
			t.Errorf("%q is in %+v and not in %q", name, found, want)
		}
	}
	if found := newZones([]Zone{{Suffix: "a.test"}}).of("b.test"); found != nil {
		t.Errorf("b.test is in %+v", found)
	}
}

func TestReverseZones(t *testing.T) {
	for prefix, want := range map[string][]string{
		"10.0.0.0/8":         {"10.in-addr.arpa"},
		"192.168.7.0/24":     {"7.168.192.in-addr.arpa"},
		"192.0.2.1/32":       {"1.2.0.192.in-addr.arpa"},
		"0.0.0.0/0":          {"in-addr.arpa"},
		"172.16.0.0/14":      {"16.172.in-addr.arpa", "17.172.in-addr.arpa", "18.172.in-addr.arpa", "19.172.in-addr.arpa"},
		"128.0.0.0/7":        {"128.in-addr.arpa", "129.in-addr.arpa"},
		"2001:db8::/32":      {"8.b.d.0.1.0.0.2.ip6.arpa"},
		"fd00::/7":           {"c.f.ip6.arpa", "d.f.ip6.arpa"},
		"::/0":               {"ip6.arpa"},
		"2001:db8:abcd::/46": {"c.c.b.a.8.b.d.0.1.0.0.2.ip6.arpa", "d.c.b.a.8.b.d.0.1.0.0.2.ip6.arpa", "e.c.b.a.8.b.d.0.1.0.0.2.ip6.arpa", "f.c.b.a.8.b.d.0.1.0.0.2.ip6.arpa"},
	} {
		if got := ReverseZones(netip.MustParsePrefix(prefix)); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", prefix, got, want)
		}
	}
	// Every address of a prefix is in one of its zones, and the next one is not.
	for _, text := range []string{"10.32.0.0/11", "192.0.2.128/25", "2001:db8::/33", "2001:db8::8/126"} {
		prefix := netip.MustParsePrefix(text)
		var all []Zone
		for _, zone := range ReverseZones(prefix) {
			all = append(all, Zone{Suffix: zone})
		}
		z := newZones(all)
		last := prefix.Addr()
		for step := prefix.Addr(); prefix.Contains(step); step = step.Next() {
			last = step
			if step != prefix.Addr() {
				break
			}
		}
		for _, address := range []netip.Addr{prefix.Addr(), last, prefix.Addr().Prev()} {
			name, err := dns.ReverseAddr(address.String())
			if err != nil {
				t.Fatal(err)
			}
			if found := z.of(name[:len(name)-1]) != nil; found != prefix.Contains(address) {
				t.Errorf("%s of %s: found %t", address, prefix, found)
			}
		}
	}
}

func TestReversed(t *testing.T) {
	for _, text := range []string{"192.0.2.1", "255.0.1.9", "2001:db8::1", "fe80::abcd:1234"} {
		name, _ := dns.ReverseAddr(text)
		if got, ok := reversed(name[:len(name)-1]); !ok || got.String() != text {
			t.Errorf("%s: %s, %t", text, got, ok)
		}
	}
	for _, name := range []string{"", "in-addr.arpa", "2.0.192.in-addr.arpa", "x.2.0.192.in-addr.arpa", "1.1.2.0.192.in-addr.arpa", "1.ip6.arpa", fmt.Sprintf("%063d.ip6.arpa", 0)} {
		if got, ok := reversed(name); ok {
			t.Errorf("%q is %s", name, got)
		}
	}
}
