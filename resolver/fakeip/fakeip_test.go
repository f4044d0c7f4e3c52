package fakeip

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

var (
	ipv4 = netip.MustParsePrefix("198.18.0.0/15")
	ipv6 = netip.MustParsePrefix("fd0f:a4e1:b0d5:c0de::/64")
)

// open returns a pool that the test closes at its end.
func open(t testing.TB, config Config) *Pool {
	t.Helper()
	if !config.IPv4.IsValid() && !config.IPv6.IsValid() {
		config.IPv4, config.IPv6 = ipv4, ipv6
	}
	p, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// lookup returns the IPv4 address of a name, or the IPv6 one if there is none.
func lookup(t testing.TB, p *Pool, name string) netip.Addr {
	t.Helper()
	ipv4, ipv6, err := p.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	if ipv4.IsValid() {
		return ipv4
	}
	return ipv6
}

// wantName checks what an address stands for; "" for nothing. It is a use.
func wantName(t testing.TB, p *Pool, address netip.Addr, want string) {
	t.Helper()
	if name, ok := p.Name(address); name != want || ok != (want != "") {
		t.Errorf("%s stands for %q, %v, want %q", address, name, ok, want)
	}
}

func TestNameGetsTheSameNumberInBothFamilies(t *testing.T) {
	p := open(t, Config{})
	for i, name := range []string{"example.org", "a", "_dmarc.example.org", "r3---sn-4g5e6nz7.example.net"} {
		for range 2 {
			got4, got6, err := p.Lookup(name)
			if err != nil {
				t.Fatal(err)
			}
			want4 := netip.AddrFrom4([4]byte{198, 18, 0, byte(2 + i)})
			want6 := netip.MustParseAddr(fmt.Sprintf("fd0f:a4e1:b0d5:c0de::%x", 2+i))
			if got4 != want4 || got6 != want6 {
				t.Errorf("%s has %s and %s, want %s and %s", name, got4, got6, want4, want6)
			}
			wantName(t, p, got4, name)
			wantName(t, p, got6, name)
			wantName(t, p, netip.AddrFrom16(got4.As16()), name)
		}
	}
}

func TestOneFamily(t *testing.T) {
	p4 := open(t, Config{IPv4: ipv4})
	if v4, v6, err := p4.Lookup("a.test"); err != nil || !v4.Is4() || v6.IsValid() {
		t.Errorf("IPv4 alone: %v, %v, %v", v4, v6, err)
	}
	p6 := open(t, Config{IPv6: ipv6})
	if v4, v6, err := p6.Lookup("a.test"); err != nil || v4.IsValid() || !v6.Is6() {
		t.Errorf("IPv6 alone: %v, %v, %v", v4, v6, err)
	}
}

func TestAddressesThatWereNotGivenOutHaveNoName(t *testing.T) {
	p := open(t, Config{})
	lookup(t, p, "a.test")
	for address, contained := range map[string]bool{
		"198.18.0.0": true, "198.18.0.1": true, "198.18.0.3": true, "198.19.255.255": true,
		"198.17.255.255": false, "198.20.0.0": false, "0.0.0.0": false,
		"fd0f:a4e1:b0d5:c0de::": true, "fd0f:a4e1:b0d5:c0de::1": true, "fd0f:a4e1:b0d5:c0de::3": true,
		"fd0f:a4e1:b0d5:c0de:1::2": true, "fd0f:a4e1:b0d5:c0df::2": false, "::": false,
	} {
		address := netip.MustParseAddr(address)
		wantName(t, p, address, "")
		if got := p.Contains(address); got != contained {
			t.Errorf("Contains(%s) is %v", address, got)
		}
	}
	wantName(t, p, netip.Addr{}, "")
	if p.Contains(netip.Addr{}) || !p.Contains(netip.MustParseAddr("::ffff:198.18.0.0")) {
		t.Error("Contains is wrong about the zero Addr or a mapped one")
	}
}

func TestOldestUnusedIsReusedFirst(t *testing.T) {
	p := open(t, Config{Max: 3})
	a, b, c := lookup(t, p, "a.test"), lookup(t, p, "b.test"), lookup(t, p, "c.test")
	lookup(t, p, "a.test")
	wantName(t, p, b, "b.test") // the flow makes it newer than c
	if d := lookup(t, p, "d.test"); d != c {
		t.Errorf("d.test has %s, want that of c.test", d)
	}
	wantName(t, p, c, "d.test")
	if e := lookup(t, p, "c.test"); e != a {
		t.Errorf("c.test has %s, want that of a.test", e)
	}
	wantName(t, p, b, "b.test")
}

func TestSmallestPrefixBoundsThePool(t *testing.T) {
	for prefix, size := range map[string]int{"198.18.0.0/30": 1, "198.18.0.0/29": 5, "198.18.0.128/25": 125} {
		prefix := netip.MustParsePrefix(prefix)
		p := open(t, Config{IPv4: prefix, IPv6: ipv6, Max: 1000})
		given := make(map[netip.Addr]bool)
		for i := range 2 * size {
			given[lookup(t, p, fmt.Sprintf("%d.test", i))] = true
		}
		if len(given) != size {
			t.Errorf("%s gave %d addresses, want %d", prefix, len(given), size)
		}
		for address := range given {
			last := !prefix.Contains(address.Next())
			if !prefix.Contains(address) || address == prefix.Addr() || address == prefix.Addr().Next() || last {
				t.Errorf("%s gave %s", prefix, address)
			}
		}
	}
}

func TestConfigurationThatCannotWorkIsRefused(t *testing.T) {
	for _, config := range []Config{
		{},
		{IPv4: ipv6},
		{IPv6: ipv4},
		{IPv6: netip.PrefixFrom(netip.MustParseAddr("::ffff:198.18.0.0"), 112)},
		{IPv4: netip.MustParsePrefix("198.18.0.0/31")},
		{IPv4: ipv4, IPv6: netip.MustParsePrefix("fd00::/128")},
		{IPv4: ipv4, Max: -1},
	} {
		if p, err := Open(config); err == nil {
			p.Close()
			t.Errorf("%+v opened", config)
		}
	}
}

func TestOddNamesAreRefused(t *testing.T) {
	p := open(t, Config{})
	label := strings.Repeat("a", 63)
	long := strings.Join([]string{label, label, label, label[:61]}, ".")
	for _, name := range []string{long, "-a.test", "a-.b-", "1.2.3.com", "xn--bcher-kva.example", "0x.test", "a.0y"} {
		if _, _, err := p.Lookup(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{
		"", ".", "a.", ".a", "a..b", "A.test", "a b", "a\nb", "a\x00b", "a\\b", "a*b", "bücher.example", "a/b", "a:1",
		long + "a", label + "a.test",
		"127.0.0.1", "127.1", "2130706433", "0x7f000001", "a.0x7f", "a.0x", "017", "::1",
		"localhost", "x.localhost",
	} {
		if v4, v6, err := p.Lookup(name); !errors.Is(err, ErrName) || v4.IsValid() || v6.IsValid() {
			t.Errorf("%q: %v, %v, %v", name, v4, v6, err)
		}
	}
}

func TestKnownNamesAndAddressesDoNotAllocate(t *testing.T) {
	p := open(t, Config{Store: filepath.Join(t.TempDir(), "store")})
	lookup(t, p, "other.test")
	v4, v6, err := p.Lookup("a.test")
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		p.Lookup("other.test")
		p.Lookup("a.test")
		p.Name(v4)
		p.Name(v6)
		p.Contains(v6)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestNameIsNotKeptInTheCallersBuffer(t *testing.T) {
	p := open(t, Config{})
	message := strings.Repeat("x", 1<<10) + "a.test"
	a := lookup(t, p, message[1<<10:])
	name, _ := p.Name(a)
	if name != "a.test" || len(p.table.places[0].name) != len(name) {
		t.Errorf("got %q", name)
	}
}

// TestConcurrentUse is for the race detector as well: names are reused and the
// store is written anew all the time, and at the end it holds what the pool does.
func TestConcurrentUse(t *testing.T) {
	config := Config{IPv4: ipv4, IPv6: ipv6, Max: 32, Store: filepath.Join(t.TempDir(), "store")}
	config.StoreFailed = func(err error) { t.Error(err) }
	p, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	rounds := 3000
	if testing.Short() {
		rounds = 1000
	}
	var running sync.WaitGroup
	for worker := range 8 {
		running.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 0))
			for range rounds {
				name := fmt.Sprintf("%d.test", random.IntN(48))
				v4, v6, err := p.Lookup(name)
				if err != nil {
					t.Error(err)
					return
				}
				offset4, ok4 := p.ranges.offset(v4)
				offset6, ok6 := p.ranges.offset(v6)
				if !ok4 || !ok6 || offset4 != offset6 || offset4 >= 32 {
					t.Errorf("%s has %s and %s", name, v4, v6)
				}
				p.Name(v4)
				if random.IntN(100) == 0 {
					select {
					case p.grown <- struct{}{}: // a part of the goroutine's work is due
					default:
					}
				}
			}
		})
	}
	running.Wait()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	wantWhole(t, p) // nothing else changes it any more
	again := open(t, config)
	if len(again.Notes()) > 0 {
		t.Error(again.Notes())
	}
	wantSame(t, again, p)
}

func BenchmarkLookupOfKnownName(b *testing.B) {
	p := open(b, Config{})
	names := make([]string, 1<<16)
	for i := range names {
		names[i] = fmt.Sprintf("host-%d.example.org", i)
		lookup(b, p, names[i])
	}
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := rand.IntN(len(names)); pb.Next(); i++ {
			p.Lookup(names[i*7919&(len(names)-1)])
		}
	})
}

func BenchmarkLookupOfNewName(b *testing.B) {
	p := open(b, Config{Max: 10_000, Store: filepath.Join(b.TempDir(), "store")})
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		lookup(b, p, fmt.Sprintf("host-%d.example.org", i))
	}
}
