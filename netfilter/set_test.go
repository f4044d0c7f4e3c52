package netfilter

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

func TestPrefixElements(t *testing.T) {
	for _, test := range []struct {
		name     string
		prefixes []netip.Prefix
		want     []string
	}{
		{"none", nil, nil},
		{"twice", prefixes("10.0.0.0/8", "10.0.0.0/8"), []string{"10.0.0.0/8"}},
		{"one in another", prefixes("10.1.2.0/24", "10.0.0.0/8", "10.1.0.0/16"), []string{"10.0.0.0/8"}},
		{"halves", prefixes("10.0.1.0/24", "10.0.0.0/24"), []string{"10.0.0.0/23"}},
		{"neighbours", prefixes("10.0.0.0/24", "10.0.1.0/25"), []string{"10.0.0.0-10.0.1.127"}},
		{"host bits", prefixes("10.1.2.3/8"), []string{"10.0.0.0/8"}},
		{"one address", prefixes("10.1.2.3/32"), []string{"10.1.2.3"}},
		{"everything", prefixes("0.0.0.0/0", "10.0.0.0/8"), []string{"0.0.0.0/0"}},
		{"both ends", prefixes("255.255.255.255/32", "0.0.0.0/8"), []string{"0.0.0.0/8", "255.255.255.255"}},
		{"mapped", prefixes("::ffff:10.0.0.0/104"), []string{"10.0.0.0/8"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, e := range families()[0].elements(ranges(test.prefixes)) {
				got = append(got, e.text)
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
			if six := families()[1].elements(ranges(test.prefixes)); six != nil {
				t.Errorf("IPv6 has %v", six)
			}
		})
	}
}

func TestPortElements(t *testing.T) {
	for _, test := range []struct {
		ports []PortRange
		want  string
	}{
		{nil, ""},
		{[]PortRange{{443, 443}, {22, 22}, {80, 80}, {22, 22}}, "22 80 443"},
		{[]PortRange{{80, 90}, {85, 100}, {101, 101}, {103, 104}}, "80-101 103-104"},
		{[]PortRange{{0, 65535}, {22, 22}}, "0-65535"},
		{[]PortRange{{65535, 65535}, {0, 0}}, "0 65535"},
	} {
		var got []string
		for _, e := range portElements(test.ports) {
			got = append(got, e.text)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%v gave %q, want %q", test.ports, got, test.want)
		}
	}
}

// TestSetsInKernel asks the kernel which addresses and ports the sets contain.
func TestSetsInKernel(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		c := testConfig()
		c.Bypass = prefixes("240.0.0.0/4", "10.0.0.0/24", "10.0.1.0/25", "10.0.0.128/25", "0.0.0.0/32", "ff00::/8", "2001:db8::/64")
		c.Ports = []PortRange{{22, 22}, {60000, 65535}}
		mustApply(t, h, c)

		port := func(number uint16) []byte { return binary.BigEndian.AppendUint16(nil, number) }
		address := func(text string) []byte { return netip.MustParseAddr(text).AsSlice() }
		for _, test := range []struct {
			set  string
			key  []byte
			want bool
		}{
			{"bypass4", address("0.0.0.0"), true},
			{"bypass4", address("0.0.0.1"), false},
			{"bypass4", address("9.255.255.255"), false},
			{"bypass4", address("10.0.0.255"), true},
			{"bypass4", address("10.0.1.127"), true},
			{"bypass4", address("10.0.1.128"), false},
			{"bypass4", address("239.255.255.255"), false},
			{"bypass4", address("255.255.255.255"), true},
			{"bypass6", address("2001:db8::ffff:ffff:ffff:ffff"), true},
			{"bypass6", address("2001:db8:0:1::"), false},
			{"bypass6", address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), true},
			{"ports", port(21), false},
			{"ports", port(22), true},
			{"ports", port(23), false},
			{"ports", port(59999), false},
			{"ports", port(65535), true},
		} {
			table := table{name: c.Table}.library()
			found, err := (&nftables.Conn{}).FindSetElements(
				&nftables.Set{Table: table, Name: test.set}, []nftables.SetElement{{Key: test.key}})
			if got := err == nil && len(found) > 0; got != test.want {
				t.Errorf("%s contains %x: %v (%v)", test.set, test.key, got, err)
			}
		}
	})
}

// TestManyPrefixes stays with 10,000 IPv4 prefixes below the send buffer that an ordinary user gets by default, 425,984
// bytes (twice net.core.wmem_max); root is not bound to it.
func TestManyPrefixes(t *testing.T) {
	const count = 10_000
	random := rand.New(rand.NewPCG(1, 1))
	ipv4, ipv6 := make([]netip.Prefix, count), make([]netip.Prefix, count)
	for i := range count {
		var bytes [16]byte
		binary.BigEndian.PutUint64(bytes[:], random.Uint64()|1<<63)
		ipv4[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte(bytes[:4])), 28)
		ipv6[i] = netip.PrefixFrom(netip.AddrFrom16(bytes), 64)
	}
	for _, test := range []struct {
		name       string
		prefixes   []netip.Prefix
		failClosed bool
	}{
		{"IPv4", ipv4, false},
		{"IPv4 and IPv6, twice", slices.Concat(ipv4, ipv6), true},
	} {
		t.Run(test.name, func(t *testing.T) {
			within(t, func() {
				h := mustOpen(t)
				c := testConfig()
				c.FailClosed = test.failClosed
				for _, c.Bypass = range [][]netip.Prefix{test.prefixes, nil, test.prefixes} {
					err := h.Apply(c)
					if test.failClosed && errors.Is(err, unix.EMSGSIZE) {
						t.Skip("net.core.wmem_max of this host is too small for a test without root")
					}
					if err != nil {
						t.Fatal(err)
					}
					wantIntact(t, h, c)
				}
			})
		})
	}
}
