package bypass

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func parse(t testing.TB, text string) *List {
	t.Helper()
	list, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestMatchAddr(t *testing.T) {
	for _, test := range []struct {
		list, in, out string // destinations that are exempt, and that are not
	}{
		{"", "", "192.0.2.1:80 [::1]:80 127.0.0.1:80"},
		{" ,\t,\n", "", "192.0.2.1:80"},
		{"192.0.2.1", "192.0.2.1:80 192.0.2.1:443 [::ffff:192.0.2.1]:80", "192.0.2.2:80 [::192.0.2.1]:80"},
		{"192.0.2.1:80", "192.0.2.1:80 [::ffff:192.0.2.1]:80", "192.0.2.1:443 192.0.2.2:80"},
		{"10.1.2.3/8", "10.0.0.0:1 10.255.255.255:1", "9.255.255.255:1 11.0.0.0:1"},
		{"10.0.0.0/8:443", "10.1.2.3:443", "10.1.2.3:80 11.0.0.1:443"},
		{"0.0.0.0/0", "192.0.2.1:80", "[2001:db8::1]:80"},
		{"::/0", "[2001:db8::1]:80", "192.0.2.1:80 [::ffff:192.0.2.1]:80"},
		{"2001:db8::1", "[2001:db8::1]:80 [2001:DB8:0::1%lan0]:443", "[2001:db8::2]:80"},
		{"[2001:db8::1]", "[2001:db8::1]:80", "[2001:db8::2]:80"},
		{"[2001:db8::1]:443", "[2001:db8::1]:443", "[2001:db8::1]:80"},
		{"2001:DB8:ffff::/32", "[2001:db8::1]:80", "[2001:db9::1]:80"},
		{"2001:db8::/32:443", "[2001:db8::1]:443", "[2001:db8::1]:80"},
		{"[2001:db8::]/32:443", "[2001:db8::1]:443", "[2001:db8::1]:80"},
		{"[2001:db8::/32]:443", "[2001:db8::1]:443", "[2001:db8::1]:80"},
		{"fe80::/10", "[fe80::1%lan0]:80", "[fec0::1]:80"},
		{"::ffff:192.0.2.1", "192.0.2.1:80 [::ffff:192.0.2.1]:80", "192.0.2.2:80"},
		{"::ffff:10.0.0.0/104", "10.1.2.3:80", "11.0.0.0:80"},
		{"10.0.0.0/8,192.0.2.1:80 2001:db8::/32\n198.51.100.0/24:443", "10.0.0.1:1 192.0.2.1:80 [2001:db8::]:1 198.51.100.7:443", "192.0.2.1:81 198.51.100.7:80"},
		{"*", "192.0.2.1:80 [2001:db8::1]:443", ""},
		{"*:443", "192.0.2.1:443 [2001:db8::1]:443", "192.0.2.1:80 [2001:db8::1]:80"},
		{"example.org,localhost", "", "127.0.0.1:80 [::1]:80"},
	} {
		list := parse(t, test.list)
		for _, destination := range strings.Fields(test.in) {
			if !list.MatchAddr(netip.MustParseAddrPort(destination)) {
				t.Errorf("%q does not exempt %s", test.list, destination)
			}
		}
		for _, destination := range strings.Fields(test.out) {
			if list.MatchAddr(netip.MustParseAddrPort(destination)) {
				t.Errorf("%q exempts %s", test.list, destination)
			}
		}
		if list.MatchAddr(netip.AddrPort{}) {
			t.Errorf("%q exempts no address at all", test.list)
		}
	}
}

func TestMatchName(t *testing.T) {
	long := strings.Repeat("a.", maxName/2) + "a"
	for _, test := range []struct {
		list, in, out string // names that are exempt at port 443, and that are not
	}{
		{"", "", "example.org localhost"},
		{"example.org", "example.org a.example.org a.b.example.org EXAMPLE.org. A.Example.Org", "notexample.org org example.com example.org.com"},
		{".example.org", "a.example.org a.b.example.org", "example.org notexample.org"},
		{"*.example.org", "a.example.org a.b.example.org", "example.org notexample.org"},
		{"*.example.org example.org:443", "a.example.org example.org", "notexample.org"},
		{"*.example.org example.org:80", "a.example.org", "example.org"},
		{"Example.ORG.", "example.org a.example.org", "notexample.org"},
		{"example.org:443", "example.org a.example.org", "example.com"},
		{"example.org.:443", "example.org", ""},
		{"example.org:80", "", "example.org a.example.org"},
		{"org", "org example.org", "example.com"},
		{"_x.a-b.example.org", "_x.a-b.example.org", "a-b.example.org"},
		{"*", "example.org localhost 192.0.2.1 " + long, long + "a"},
		{"*:443", "example.org", ""},
		{"*:80", "", "example.org"},
		{"192.0.2.1 2001:db8::1 0.0.0.0/0 ::/0", "", "192.0.2.1 2001:db8::1 example.org"},
		{"bücher.example", "xn--bcher-kva.example a.xn--bcher-kva.example", "bcher.example"},
		{"*.BÜCHER.example:443", "a.xn--bcher-kva.example", "xn--bcher-kva.example"},
		{"bücher。example。", "xn--bcher-kva.example", "example"},
		{"localhost", "localhost a.localhost", "notlocalhost"},
		{long, long, long + "a"},
	} {
		list := parse(t, test.list)
		for _, name := range strings.Fields(test.in) {
			if !list.MatchName(name, 443) {
				t.Errorf("%q does not exempt %s", test.list, name)
			}
		}
		for _, name := range append(strings.Fields(test.out), "", ".") {
			if list.MatchName(name, 443) {
				t.Errorf("%q exempts %q", test.list, name)
			}
		}
	}
}

func TestNoList(t *testing.T) {
	for _, list := range []*List{nil, {}} {
		if list.MatchAddr(netip.MustParseAddrPort("127.0.0.1:80")) || list.MatchName("localhost", 80) ||
			list.Prefixes() != nil || list.String() != "" {
			t.Errorf("%#v exempts something", list)
		}
	}
}

func TestPrefixes(t *testing.T) {
	for _, test := range []struct{ list, want string }{
		{"", ""},
		{"example.org 192.0.2.1:80 10.0.0.0/8:443 *:25", ""},
		{"2001:db8::1 192.0.2.1", "192.0.2.1/32 2001:db8::1/128"},
		{"10.0.0.0/9 10.128.0.0/9 10.1.2.3", "10.0.0.0/8"},
		{"10.0.0.0/8 ::ffff:11.0.0.0/104", "10.0.0.0/7"},
		{"240.0.0.0/4 192.0.2.9/24 ff00::/8", "192.0.2.0/24 240.0.0.0/4 ff00::/8"},
		{"255.255.255.255 ::", "255.255.255.255/32 ::/128"},
		{"*", "0.0.0.0/0 ::/0"},
		{"192.0.2.1 * 2001:db8::/32", "0.0.0.0/0 ::/0"},
	} {
		var got []string
		for _, prefix := range parse(t, test.list).Prefixes() {
			got = append(got, prefix.String())
		}
		if !slices.Equal(got, strings.Fields(test.want)) {
			t.Errorf("%q gives %v, want %v", test.list, got, test.want)
		}
	}
}

func TestString(t *testing.T) {
	const text = "Example.ORG.:80 .a.example, *.b.example 10.1.2.3/8 192.0.2.1/32 10.0.0.0/8:53 " +
		"[2001:DB8::1] [2001:db8::1]:443 2001:db8::9/32:22 ::ffff:192.0.2.7 bücher.example * *:25"
	const want = "example.org:80,*.a.example,*.b.example,10.0.0.0/8,192.0.2.1,10.0.0.0/8:53," +
		"2001:db8::1,[2001:db8::1]:443,[2001:db8::/32]:22,192.0.2.7,xn--bcher-kva.example,*,*:25"
	for _, text := range []string{text, want} {
		if got := parse(t, text).String(); got != want {
			t.Errorf("%q comes out as\n%q, want\n%q", text, got, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	label := strings.Repeat("a", maxLabel)
	for _, test := range []struct{ entry, remedy string }{
		{"10.0.0.0/33", "0 to 32"},
		{"10.0.0.0/-1", "0 to 32"},
		{"10.0.0.0/", "0 to 32"},
		{"2001:db8::/129", "0 to 128"},
		{"2001:db8::/x", "0 to 128"},
		{"10.0.0/8", "10.0.0.0/8"},
		{"10.0.0.256", "four numbers from 0 to 255"},
		{"10.0.0.0.1", "four numbers from 0 to 255"},
		{"127.1", "four numbers from 0 to 255"},
		{"8080", "four numbers from 0 to 255"},
		{"2001:db8::1::2", "2001:db8::1"},
		{"2001:db8::12345", "2001:db8::1"},
		{"[2001:db8::1", "closing bracket"},
		{"[2001:db8::1]443", "behind the bracket"},
		{"[2001:db8::/32]/32", "0 to 128"},
		{"[example.org]:80", "without them"},
		{"[*]", "without them"},
		{"[]:80", "without them"},
		{"fe80::1%lan0", "zone"},
		{"fe80::%lan0/64", "zone"},
		{"example.org:0", "1 to 65535"},
		{"example.org:99999", "1 to 65535"},
		{"example.org:", "1 to 65535"},
		{"example.org:080", "1 to 65535"},
		{"example.org:+80", "1 to 65535"},
		{"example.org:https", "1 to 65535"},
		{"*:0", "1 to 65535"},
		{"[2001:db8::1]:65536", "1 to 65535"},
		{"10.0.0.0/8:65536", "1 to 65535"},
		{":80", "empty label"},
		{".", "empty label"},
		{"*.", "empty label"},
		{"..example.org", "empty label"},
		{"example..org", "empty label"},
		{"example.org..", "empty label"},
		{"foo*bar", "*.example.org"},
		{"*example.org", "*.example.org"},
		{"**", "*.example.org"},
		{"*.*.example.org", "*.example.org"},
		{"a.*.example.org", "*.example.org"},
		{"http://example.org", "without scheme"},
		{"example.org/path", "without path"},
		{"example.org:80/path", "without path"},
		{"user@example.org", "letters, digits"},
		{"a.example;b.example", "separate entries with commas"},
		{"\"example.org\"", "letters, digits"},
		{"example\x00.org", "letters, digits"},
		{"example\x1b[0m.org", "letters, digits"},
		{"\xff.example", "xn--"},
		{"a\u200d.example", "xn--"},
		{"１.２.３.４", "four numbers"},
		{label + "a.example", "63 bytes"},
		{strings.Repeat(label+".", 4) + "example", "253 bytes"},
		{strings.Repeat("a", maxEntry+1), "1024 bytes"},
		{strings.Repeat("ü", maxEntry/2+1), "1024 bytes"},
	} {
		_, err := Parse("example.com, " + test.entry + ",example.net")
		if err == nil {
			t.Errorf("%q is accepted", test.entry)
			continue
		}
		named := fmt.Sprintf("%.*q", maxEntry, test.entry)
		if !strings.Contains(err.Error(), named) || !strings.Contains(err.Error(), test.remedy) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: the error is to name it, say %q and be one line:\n%v", test.entry, test.remedy, err)
		}
	}
}

// many makes a list of that many entries of each kind, none of which can be merged.
func many(count int) string {
	var text strings.Builder
	for i := range count {
		fmt.Fprintf(&text, "10.%d.%d.0/25,2001:db8:%x::/49,n%d.example.org,192.0.2.1:%d\n", i>>8, i&0xff, i, i, i+1)
	}
	return text.String()
}

func TestMatchAllocates(t *testing.T) {
	list := parse(t, many(100))
	destination := netip.MustParseAddrPort("10.0.99.1:443")
	if !list.MatchAddr(destination) || !list.MatchName("www.n99.example.org", 443) {
		t.Fatal("not exempt")
	}
	if n := testing.AllocsPerRun(100, func() { list.MatchAddr(destination) }); n != 0 {
		t.Errorf("MatchAddr: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { list.MatchName("www.n99.example.org", 443) }); n != 0 {
		t.Errorf("MatchName: %v allocations", n)
	}
}

func BenchmarkParse(b *testing.B) {
	text := many(10000)
	for b.Loop() {
		parse(b, text)
	}
}

func BenchmarkMatch(b *testing.B) {
	destination := netip.MustParseAddrPort("203.0.113.1:443")
	for _, count := range []int{10, 100, 1000, 10000} {
		list := parse(b, many(count))
		b.Run(fmt.Sprintf("addr/entries=%d", count), func(b *testing.B) {
			for b.Loop() {
				list.MatchAddr(destination)
			}
		})
		b.Run(fmt.Sprintf("name/entries=%d", count), func(b *testing.B) {
			for b.Loop() {
				list.MatchName("www.example.com", 443)
			}
		})
	}
}

func TestSuffixes(t *testing.T) {
	list, err := Parse("b.test, .a.test, 10.0.0.0/8, c.test:8080, .b.test, *:443")
	if err != nil {
		t.Fatal(err)
	}
	want := []Suffix{{"", true}, {"a.test", true}, {"b.test", false}, {"c.test", false}}
	if got := list.Suffixes(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := (*List)(nil).Suffixes(); len(got) > 0 {
		t.Errorf("no list has %v", got)
	}
}
