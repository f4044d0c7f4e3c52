package main

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// probing are the settings of a command line of probe.
func probing(t *testing.T, arguments ...string) *settings {
	t.Helper()
	t.Setenv("no_proxy", "")
	t.Setenv("NO_PROXY", "")
	s, err := parseFlags(options(), append([]string{"--upstream", "http://user:s3cret@proxy.test:3128"}, arguments...))
	if err == nil {
		err = s.resolve()
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// found is a report in which these checks said yes, and all others no.
func found(yes ...probe.Check) *probe.Report {
	r := &probe.Report{Proxy: "http://proxy.test:3128", Usable: true, Issuer: "\"Company\""}
	for _, check := range slices.Concat(nameWays, []probe.Check{
		probe.Reachable, probe.Protocol, probe.Authentication, probe.AbsoluteForm, probe.IntactTLS,
		probe.Tunnel(443, probe.ByName), probe.Tunnel(443, probe.ByAddress), probe.Tunnel(443, probe.ByIPv6), probe.Tunnel(80, probe.ByName), probe.Tunnel(22, probe.ByName),
	}) {
		verdict := probe.No
		if slices.Contains(yes, check) {
			verdict = probe.Yes
		}
		r.Findings = append(r.Findings, probe.Finding{Check: check, Asked: string(check), Verdict: verdict, Proof: "seen"})
	}
	return r
}

var nameWays = []probe.Check{probe.SystemDNS, probe.DirectDNS, probe.TCPDNS, probe.HTTPSDNS, probe.TLSDNS}

// TestAdvice: the flags of each of the README's environments.
func TestAdvice(t *testing.T) {
	company := system{servers: []netip.AddrPort{netip.MustParseAddrPort("192.168.0.100:53")}, search: []string{"corp.test"}}
	usual := []probe.Check{probe.AbsoluteForm, probe.IntactTLS, probe.Tunnel(443, probe.ByAddress)}
	const internal = " --no-proxy corp.test --private-dns 192.168.0.100"
	for _, test := range []struct {
		name        string
		system      system
		yes         []probe.Check
		arguments   []string
		environment string
		flags       string
	}{
		{"names resolve", company, []probe.Check{probe.SystemDNS, probe.DirectDNS, probe.TCPDNS}, nil, namesResolve, ""},
		{"two servers", company, []probe.Check{probe.DirectDNS, probe.TCPDNS}, nil, namesDirect, internal + " --public-dns 1.1.1.1 --dns-over-tcp-disabled"},
		{"CONNECT to 53", company, []probe.Check{probe.TCPDNS, probe.HTTPSDNS}, nil, namesOverTCP, internal + " --public-dns 1.1.1.1"},
		{"CONNECT to 443", company, []probe.Check{probe.HTTPSDNS, probe.TLSDNS}, nil, namesHTTPS, internal + " --dns-over-https-enabled"},
		{"CONNECT to 853", company, []probe.Check{probe.TLSDNS}, nil, namesOverTLS, internal + " --dns-over-tls one.one.one.one"},
		{"nothing", company, nil, nil, namesFromFake, internal + " --fake-ip"},
		{"nothing is known", system{}, nil, nil, namesFromFake, " --fake-ip"},
		{
			"the user's servers", company,
			[]probe.Check{probe.TCPDNS},
			[]string{"--public-dns", "8.8.8.8:5353", "--private-dns", "10.0.0.1,fd00::1", "--no-proxy", "10.0.0.0/8,.lab.test"},
			namesOverTCP,
			" --no-proxy '10.0.0.0/8,*.lab.test' --private-dns 10.0.0.1,fd00::1 --public-dns 8.8.8.8:5353",
		},
		{
			"another endpoint", company,
			[]probe.Check{probe.HTTPSDNS},
			[]string{"--dns-over-https-endpoint", "https://dns.test/q?a=b&c"},
			namesHTTPS,
			internal + " --dns-over-https-enabled --dns-over-https-endpoint 'https://dns.test/q?a=b&c'",
		},
		{
			"internal names that nobody resolves", system{}, nil, []string{"--no-proxy", "corp.test"}, namesFromFake, " --fake-ip",
		},
	} {
		s := probing(t, test.arguments...)
		a := s.advise(found(slices.Concat(usual, test.yes)...), test.system)
		if want := "--upstream http://proxy.test:3128" + test.flags; commandLine(a.Flags) != want || a.Environment != test.environment {
			t.Errorf("%s: %s: %s\nwant %s: %s", test.name, a.Environment, commandLine(a.Flags), test.environment, want)
		}
	}

	// Of what else is found only this changes the flags.
	for _, test := range []struct {
		yes   []probe.Check
		flags string
	}{
		{[]probe.Check{probe.SystemDNS, probe.AbsoluteForm, probe.Tunnel(443, probe.ByAddress)}, ""},
		{[]probe.Check{probe.SystemDNS, probe.AbsoluteForm, probe.Tunnel(80, probe.ByName)}, " --private-dns 192.168.0.100"},
		{[]probe.Check{probe.SystemDNS, probe.Tunnel(80, probe.ByName), probe.Tunnel(443, probe.ByAddress)}, " --http-ports off"},
		{[]probe.Check{probe.SystemDNS, probe.Tunnel(443, probe.ByAddress)}, ""},
	} {
		a := probing(t).advise(found(test.yes...), company)
		if want := "--upstream http://proxy.test:3128" + test.flags; commandLine(a.Flags) != want {
			t.Errorf("%v: %s, want %s", test.yes, commandLine(a.Flags), want)
		}
	}
}

// TestAdviceIsACommandLine: whatever was found, the program takes its own advice.
func TestAdviceIsACommandLine(t *testing.T) {
	certificate := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(certificate, []byte(authority), 0o600); err != nil {
		t.Fatal(err)
	}
	checks := slices.Concat(nameWays, []probe.Check{probe.AbsoluteForm, probe.Tunnel(80, probe.ByName), probe.Tunnel(443, probe.ByAddress), probe.IntactTLS})
	systems := []system{{}, {servers: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.53:53")}, search: []string{"corp.test", "lab.test"}}}
	tried := 0
	for _, arguments := range [][]string{
		nil,
		{"--no-proxy", "*.corp.test:8443,[2001:db8::]/32,10.0.0.1:80"},
		{"--no-proxy", "*", "--private-dns", "[2001:db8::53]:5353"},
		{"--dns-ca", certificate, "--dns-over-tls", "dns.test@192.0.2.53:8853", "--dns-over-https-endpoint", "https://dns.test:8443/dns-query"},
		{"--dns-over-tls", "dns.test@[2001:db8::53]:8853", "--public-dns", "2001:db8::53"},
		{"--dns-over-tls", "192.0.2.53"},
	} {
		s := probing(t, arguments...)
		for set := range 1 << len(checks) {
			var yes []probe.Check
			for i, check := range checks {
				if set&(1<<i) != 0 {
					yes = append(yes, check)
				}
			}
			for _, system := range systems {
				a := s.advise(found(yes...), system)
				advised, err := parseFlags(options(), a.Flags)
				if err == nil {
					err = advised.resolve()
				}
				if err == nil {
					err = advised.validateDNS()
				}
				if err == nil {
					err = errors.Join(advised.http.validate(), advised.validateTLS())
				}
				if err != nil {
					t.Fatalf("%v, %v found: %s: %v", arguments, yes, commandLine(a.Flags), err)
				}
				tried++
			}
		}
	}
	t.Logf("%d command lines", tried)
}

// TestProbeShowsNoSecret: neither table nor advice.
func TestProbeShowsNoSecret(t *testing.T) {
	s := probing(t)
	for _, usable := range []bool{true, false} {
		r := found(probe.Reachable, probe.Protocol)
		r.Usable = usable
		var text strings.Builder
		if err := (probed{r, s.advise(r, system{})}).write(&text, true); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(text.String(), "s3cret") || usable != strings.Contains(text.String(), "sudo transproxy-tproxy --upstream http://proxy.test:3128 ") {
			t.Error(text.String())
		}
	}
}

func TestProbeTable(t *testing.T) {
	p := probed{&probe.Report{Findings: []probe.Finding{
		{Asked: "connect", Verdict: probe.Yes, Proof: "there"},
		{Asked: "CONNECT a:443", Verdict: probe.No, Proof: "403 Forbidden"},
		{Asked: "a", Verdict: probe.Skipped, Proof: "not asked"},
		{Asked: "b", Verdict: probe.Unclear, Proof: "no answer in time"},
		{Asked: "c", Verdict: probe.Skipped, Proof: "not asked"},
	}}, advice{Notes: []string{"look at it"}}}
	var plain, marked strings.Builder
	p.write(&plain, false)
	p.write(&marked, true)
	want := `  yes      connect         there
  no       CONNECT a:443   403 Forbidden
  unclear  b               no answer in time
  skipped  2 other checks  not asked

The proxy cannot be used:

  - look at it
`
	if plain.String() != want {
		t.Errorf("%s\nwant\n%s", plain.String(), want)
	}
	if !strings.Contains(marked.String(), "  ✗ no       CONNECT a:443   403 Forbidden\n") {
		t.Error(marked.String())
	}
}

func TestResolvConf(t *testing.T) {
	got := parseResolvConf("# nameserver 10.9.9.9\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver x\nsearch home.test\nsearch corp.test. local sub.corp.test\noptions ndots:2\nnameserver\n")
	if list(got.servers) != "10.0.0.1,fe80::1%eth0" || !slices.Equal(got.search, []string{"corp.test", "sub.corp.test"}) {
		t.Errorf("%+v", got)
	}
	dir := t.TempDir()
	stub, real := filepath.Join(dir, "stub"), filepath.Join(dir, "real")
	os.WriteFile(stub, []byte("nameserver 127.0.0.53\n"), 0o600)
	if got := systemNames(stub, real); list(got.servers) != "127.0.0.53" {
		t.Errorf("%+v", got)
	}
	os.WriteFile(real, []byte("nameserver 10.0.0.1\n"), 0o600)
	if got := systemNames(stub, real); list(got.servers) != "10.0.0.1" {
		t.Errorf("%+v", got)
	}
}

func TestProbeTargets(t *testing.T) {
	for _, arguments := range [][]string{
		{"--probe-host", "192.0.2.1"},
		{"--probe-host", "a b"},
		{"--probe-host", "*.x.test"},
		{"--probe-host", ""},
		{"--probe-address", "192.0.2.1,192.0.2.2"},
		{"--probe-address", "x"},
		{"--probe-address", "fe80::1%eth0"},
		{"--probe-ports", "0"},
		{"--probe-ports", "1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17"},
		{"--idle", "x"},
	} {
		if _, err := parseFlags(options(), arguments); err == nil {
			t.Errorf("%q is taken", arguments)
		}
	}
	s := probing(t, "--probe-address", "2001:db8::7", "--probe-host", "a.test.")
	if s.probe.host != "a.test" || s.probe.address.IsValid() || s.probe.ipv6 != netip.MustParseAddr("2001:db8::7") {
		t.Errorf("%+v", s.probe)
	}
}

// authority is a certificate, of which nothing is asked but that it can be read.
const authority = `-----BEGIN CERTIFICATE-----
MIIBgTCCASegAwIBAgIUIFXFXLrOxHrZaFQemKdQdbeLRVYwCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKcHJvYmUgdGVzdDAgFw0yNjExMjMxMjU0MDZaGA8yMTI2MTAz
MDEyNTQwNlowFTETMBEGA1UEAwwKcHJvYmUgdGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABDCrk7TjHdF1FocsB1n7vMfOhRGMpBYuS6dPOp9aMKasJH1vfmg1
JteHKpoXHPEO/7niqx3uttY+rZ7+syXkb4yjUzBRMB0GA1UdDgQWBBSkfv9vgWYp
we6M/XIiybkHpDTu9TAfBgNVHSMEGDAWgBSkfv9vgWYpwe6M/XIiybkHpDTu9TAP
BgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIQCUiFUFXwXE7SZKwBVG
jet1Rt3WRvcTWoPMflMWfKDAggIgCIsNFNa+aAONb3H+f1RxOlhP/ef95vYtrxEy
vpvJetM=
-----END CERTIFICATE-----
`
