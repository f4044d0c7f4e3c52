package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestDNSFlags(t *testing.T) {
	s, err := parseFlags(options(), []string{
		"-private-dns", "192.168.0.100,[2001:db8::53]:5353", "--dns-route", "a.test=10.0.0.1;b.test.=10.0.0.2,10.0.0.3",
		"--dns-route", "C.test=10.0.0.4", "--dns-over-https-endpoint", "https://dns.google/resolve",
		"--dns-over-tls", "dns.example.org@192.0.2.53:8853", "--dns-proxy-listen", ":53,192.0.2.1:5353",
		"--fake-ip-range", "10.99.0.0/16", "--dns-cache", "2MiB", "--dns-udp=false",
	})
	if err != nil {
		t.Fatal(err)
	}
	dns := s.dns
	address := netip.MustParseAddrPort
	if want := []netip.AddrPort{address("192.168.0.100:53"), address("[2001:db8::53]:5353")}; !slices.Equal(dns.private, want) {
		t.Errorf("private servers %v", dns.private)
	}
	var zones []string
	for _, route := range dns.routes {
		zones = append(zones, route.suffix)
	}
	if !slices.Equal(zones, []string{"a.test", "b.test", "c.test"}) || len(dns.routes[1].servers) != 2 {
		t.Errorf("routes %v", dns.routes)
	}
	if dns.endpoint.String() != "https://dns.google/dns-query" {
		t.Errorf("endpoint %v", dns.endpoint)
	}
	if want := (dnsOverTLS{"dns.example.org", "192.0.2.53", 8853}); dns.tls != want {
		t.Errorf("DNS over TLS %+v", dns.tls)
	}
	if want := []netip.AddrPort{address("0.0.0.0:53"), address("[::]:53"), address("192.0.2.1:5353")}; !slices.Equal(dns.listen, want) {
		t.Errorf("listeners %v", dns.listen)
	}
	if !slices.Equal(dns.fakeRange, []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}) || dns.cacheBytes != 2<<20 || dns.udp || !dns.tcp {
		t.Errorf("%+v", dns)
	}
}

func TestDNSOverTLSNames(t *testing.T) {
	for value, want := range map[string]dnsOverTLS{
		"dns.test":                 {"dns.test", "dns.test", 853},
		"dns.test:8853":            {"dns.test", "dns.test", 8853},
		"192.0.2.53":               {"192.0.2.53", "192.0.2.53", 853},
		"dns.test@[2001:db8::53]":  {"dns.test", "2001:db8::53", 853},
		"dns.test@2001:db8::53":    {"dns.test", "2001:db8::53", 853},
		"dns.test@192.0.2.53:8853": {"dns.test", "192.0.2.53", 8853},
	} {
		s := new(settings)
		if err := setDNSOverTLS(s, value); err != nil || s.dns.tls != want {
			t.Errorf("%s: %+v, %v", value, s.dns.tls, err)
		}
	}
}

// TestDNSFlagsAreRefused: each message names the value and says what to write.
func TestDNSFlagsAreRefused(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, arguments := range [][]string{
		{"--private-dns", "dns.test"},
		{"--private-dns", "0.0.0.0"},
		{"--public-dns", "192.0.2.1:0"},
		{"--dns-route", "corp.test"},
		{"--dns-route", "corp.test="},
		{"--dns-route", "*.a,b.test=192.0.2.1"},
		{"--dns-over-https-endpoint", "http://dns.test/dns-query"},
		{"--dns-over-https-endpoint", "https://dns.test:0/dns-query"},
		{"--dns-over-tls", "dns.test@elsewhere.test"},
		{"--dns-over-tls", "dns.test:0"},
		{"--dns-over-tls", "under/score"},
		{"--dns-ca", empty},
		{"--dns-ca", empty + ".missing"},
		{"--fake-ip-range", "198.18.0.0/15,198.51.100.0/24"},
		{"--dns-proxy-listen", "53"},
		{"--dns-cache", "lots"},
		{"--dns-tproxy-listen", "0"},
	} {
		if _, err := parseFlags(options(), arguments); err == nil || !strings.Contains(err.Error(), arguments[0]) {
			t.Errorf("%v: %v", arguments, err)
		}
	}
}

func TestDNSFlagsThatContradict(t *testing.T) {
	for _, arguments := range []string{
		"--dns-over-tcp-disabled",
		"--dns-over-https-enabled --dns-over-tls dns.test",
		"--public-dns 192.0.2.1 --dns-over-tcp-disabled --dns-over-https-enabled",
		"--fake-ip --public-dns 192.0.2.1",
		"--dns-proxy-listen :53",
		"--fake-ip-store names --private-dns 192.0.2.1",
		"--fake-ip --no-proxy corp.test",
	} {
		s, err := parseFlags(options(), strings.Fields(arguments))
		if err != nil {
			t.Fatalf("%s: %v", arguments, err)
		}
		if err := s.validateDNS(); err == nil || !strings.HasPrefix(err.Error(), "--") {
			t.Errorf("%s: %v", arguments, err)
		}
	}
}
