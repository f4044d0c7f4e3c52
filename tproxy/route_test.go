package tproxy

import (
	"net/netip"
	"testing"
)

func TestRefusedDestinations(t *testing.T) {
	own := netip.MustParseAddr("192.0.2.1")
	policy := Policy{Local: func(address netip.Addr) bool { return address == own }}
	for address, refused := range map[string]bool{
		"127.0.0.1":                true,
		"127.8.8.8":                true,
		"::1":                      true,
		"0.0.0.0":                  true,
		"::":                       true,
		"169.254.169.254":          true, // the metadata service of clouds
		"fe80::1":                  true,
		"224.0.0.1":                true,
		"ff02::1":                  true,
		"192.0.2.1":                true, // own
		"::ffff:192.0.2.1":         true, // own, mapped (RFC 4291 section 2.5.5.2)
		"::ffff:127.0.0.1":         true,
		"64:ff9b::192.0.2.1":       true, // own, behind NAT64 (RFC 6052)
		"64:ff9b::127.0.0.1":       true,
		"64:ff9b::169.254.169.254": true,
		"192.0.2.2":                false,
		"10.0.0.1":                 false,
		"2001:db8::1":              false,
		"64:ff9b::198.51.100.1":    false,
	} {
		if got := policy.refuses(netip.MustParseAddr(address)); got != refused {
			t.Errorf("%s: refused %t, want %t", address, got, refused)
		}
	}
}
