//go:build interop

package interop

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// anyServers are addresses that clients may have in their settings: public ones, one
// that nobody has, and that of the private server itself.
var anyServers = []netip.Addr{
	netip.MustParseAddr("203.0.113.53"), netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("10.99.0.1"), lab.Neighbour4,
	netip.MustParseAddr("2001:db8:3::53"), netip.MustParseAddr("2606:4700:4700::1111"), netip.MustParseAddr("fd00:99::1"), lab.Neighbour6,
}

// TestDNSRecipes: each way to the public names, with CONNECT allowed to the one port
// that it needs; whatever dig asks, at whatever server.
func TestDNSRecipes(t *testing.T) {
	for _, recipe := range []struct {
		name    string
		port    int // that CONNECT is allowed to
		flags   string
		connect string // in squid's log
	}{
		{"over HTTPS", 443, "--dns-over-https-enabled", "CONNECT dns.google:443"},
		{"over HTTPS with the ancestor's endpoint", 443, "--dns-over-https-enabled --dns-over-https-endpoint https://dns.google/resolve", "CONNECT dns.google:443"},
		{"over TCP", 53, "--public-dns 203.0.113.7", "CONNECT 203.0.113.7:53"},
		{"over TCP to IPv6", 53, "--public-dns 2001:db8:3::7", "CONNECT [2001:db8:3::7]:53"},
		{"over TLS", 853, "--dns-over-tls dns.public.test", "CONNECT dns.public.test:853"},
		{"over TLS to an address", 853, "--dns-over-tls dns.public.test@203.0.113.7", "CONNECT 203.0.113.7:853"},
	} {
		t.Run(recipe.name, func(t *testing.T) {
			w := newDNSWorld(t, recipe.port)
			g := w.gateway(append(strings.Fields(recipe.flags), "--dns-ca", w.certificate.chain)...)
			w.wantAnswers("public")
			w.wantSplit(g, w.public, w.direct)
			w.squid.wantLog(t, recipe.connect)
			if log := w.squid.log(t); w.squid.demands(t) > 1 || strings.Contains(log, "/403") {
				t.Errorf("squid refused something:\n%s", log)
			}
		})
	}
}

// TestDNSDirectly: with --dns-over-tcp-disabled the public server is asked past squid.
func TestDNSDirectly(t *testing.T) {
	w := newDNSWorld(t, 443)
	g := w.gateway("--public-dns", lab.Origin4.String(), "--dns-over-tcp-disabled")
	w.wantAnswers("direct")
	w.wantSplit(g, w.direct, w.public)
	if log := w.squid.log(t); strings.Contains(log, "CONNECT") {
		t.Errorf("squid was asked for a tunnel:\n%s", log)
	}
}

// TestDNSOfAnotherRecipe: a way that squid does not allow fails at once, for the
// public names alone.
func TestDNSOfAnotherRecipe(t *testing.T) {
	w := newDNSWorld(t, 443)
	w.gateway("--public-dns", lab.Origin4.String())
	w.want("SERVFAIL", "@1.1.1.1 www.public.test")
	w.want("198.51.100.80", "@1.1.1.1 +short www.corp.test")
	if log := w.squid.log(t); !strings.Contains(log, "TCP_DENIED/403") {
		t.Errorf("squid's log has no refusal:\n%s", log)
	}
}

// TestDNSRoute: one more zone has a server of its own.
func TestDNSRoute(t *testing.T) {
	w := newDNSWorld(t, 53)
	lan := startDnsmasq(t, w.Server, lab.Server4, "--host-record=www.lan.public.test,192.0.2.80")
	g := w.gateway("--public-dns", lab.Origin4.String(), "--dns-route", "LAN.public.test="+lab.Server4.String())
	w.want("192.0.2.80", "@1.1.1.1 +short www.lan.public.test")
	w.want("203.0.113.80", "@1.1.1.1 +short www.public.test")
	w.want("NXDOMAIN", "@1.1.1.1 vlan.public.test")
	must(t, g.end(syscall.SIGTERM))
	if asked := lan.asked(t); len(asked) != 1 || asked[0] != "www.lan.public.test A" {
		t.Errorf("the zone's server was asked for %q", asked)
	}
	if asked := below(w.public.asked(t), "lan.public.test"); len(asked) > 0 {
		t.Errorf("the public server was asked for %q", asked)
	}
}

// TestDNSBesideAnotherServer: port 53 of the gateway is dnsmasq's, at every address.
func TestDNSBesideAnotherServer(t *testing.T) {
	w := newDNSWorld(t, 443)
	startDnsmasq(t, w.Gateway, lab.Gateway4, "--txt-record=label.public.test,holder")
	output, err := run(t, w.Gateway, "ss", "-Hlnut", "sport = :53")
	if err != nil || strings.Count(output, "0.0.0.0:53") != 2 || strings.Count(output, "[::]:53") != 2 {
		t.Fatalf("dnsmasq is not everywhere on port 53: %v:\n%s", err, output)
	}
	g := w.gateway("--dns-over-https-enabled", "--dns-ca", w.certificate.chain)
	for _, own := range []netip.Addr{lab.Gateway4, lab.Gateway6} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			w.want(`"holder"`, "@%s %s +short label.public.test TXT", own, transport)
		}
	}
	w.wantAnswers("public")
	for _, own := range []netip.Addr{lab.Gateway4, lab.Gateway6} {
		w.want(`"holder"`, "@%s +short label.public.test TXT", own)
	}
	w.wantSplit(g, w.public, w.direct)
}

// TestDNSAsOrdinaryResolver: --dns-proxy-listen serves the gateway's clients, at the
// gateway's own addresses, and nobody else.
func TestDNSAsOrdinaryResolver(t *testing.T) {
	w := newDNSWorld(t, 443)
	w.gateway("--dns-over-https-enabled", "--dns-ca", w.certificate.chain, "--dns-proxy-listen", ":53")
	for _, own := range []netip.Addr{lab.Gateway4, lab.Gateway6} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			w.want("203.0.113.80", "@%s %s +short www.public.test", own, transport)
			w.want("198.51.100.80", "@%s %s +short www.corp.test", own, transport)
		}
	}
	for _, own := range []string{"127.0.0.1", "::1"} {
		if output := dig(t, w.Gateway, netip.MustParseAddr(own), "+short", "www.public.test"); output != "203.0.113.80\n" {
			t.Errorf("the gateway itself asks at %s:\n%s", own, output)
		}
	}
	for _, uplink := range []netip.Addr{lab.Uplink4, lab.Uplink6} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			output := dig(t, w.Neighbour, uplink, transport, "www.public.test")
			if strings.Contains(output, "NOERROR") || strings.Contains(output, "203.0.113.80") {
				t.Errorf("a stranger asks at %s:\n%s", uplink, output)
			}
		}
	}
}

// want runs dig on the client with the arguments, and wants a text in its output.
func (w *dnsWorld) want(text, format string, values ...any) {
	w.t.Helper()
	arguments := fmt.Sprintf(format, values...)
	output, err := run(w.t, w.Client, "dig", append([]string{"+tries=1", "+time=3"}, strings.Fields(arguments)...)...)
	if err != nil || !strings.Contains(output, text) {
		w.t.Errorf("dig %s: %v: no %q in:\n%s", arguments, err, text, output)
	}
}

// wantAnswers asks everything that a client may ask. The label is that of the public
// server that is reached.
func (w *dnsWorld) wantAnswers(label string) {
	w.t.Helper()
	for _, server := range anyServers {
		for _, transport := range []string{"+notcp", "+tcp"} {
			at := "@" + server.String() + " " + transport
			w.want(`"`+label+`"`, "%s +short label.public.test TXT", at)
			w.want("203.0.113.80", "%s +short www.public.test", at)
			w.want("2001:db8:3::80", "%s +short www.public.test AAAA", at)
			w.want("198.51.100.80", "%s +short www.corp.test", at)
			w.want("2001:db8:2::80", "%s +short WWW.Corp.TEST AAAA", at)
		}
	}
	// Each of these at one server of either family, with both transports.
	for _, at := range []string{"@1.1.1.1 +notcp", "@1.1.1.1 +tcp", "@2606:4700:4700::1111 +notcp", "@2606:4700:4700::1111 +tcp"} {
		w.want("203.0.113.81", "%s +short notcorp.test", at)
		w.want("203.0.113.82", "%s +short www.notcorp.test", at)
		w.want("198.51.100.79", "%s +short corp.test", at)
		w.want("status: NXDOMAIN", "%s nothing.public.test", at)
		w.want("status: NXDOMAIN", "%s nothing.corp.test", at)
		w.want("ANSWER: 0", "%s www.public.test MX", at)
		w.want(`\# 4 01020304`, "%s +short odd.public.test TYPE65280", at)
		w.want(`\# 4 01020304`, "%s +short odd.corp.test TYPE65280", at)
		w.want("www.public.test.", "%s +short -x 203.0.113.80", at)
		w.want("www.public.test.", "%s +short -x 2001:db8:3::80", at)
		w.want("www.corp.test.", "%s +short -x 198.51.100.80", at)
		w.want("www.corp.test.", "%s +short -x 2001:db8:2::80", at)
		w.want("WwW.pUbLiC.tEsT.\t", "%s +noall +question +answer WwW.pUbLiC.tEsT", at)
		w.wantSigned(at)
		w.wantBig(at)
	}
}

// wantBig asks for answers that do not fit into 512 bytes.
func (w *dnsWorld) wantBig(at string) {
	w.t.Helper()
	for _, name := range []string{"big.public.test", "big.corp.test"} {
		whole := bigText + "\n"
		// By UDP without EDNS there is room for 512 bytes (RFC 1035 section 2.3.4); dig
		// then asks by TCP, unless it is told not to.
		flags := "flags: qr tc rd ra;"
		if strings.Contains(at, "+tcp") {
			flags = "flags: qr rd ra;"
		}
		w.wantFlags(flags, "%s +noedns +ignore %s TXT", at, name)
		w.wantFlags(flags, "%s +bufsize=600 +ignore %s TXT", at, name)
		w.want(whole, "%s +noedns +short %s TXT", at, name)
		w.wantFlags("flags: qr rd ra;", "%s +bufsize=1232 +ignore %s TXT", at, name)
		w.want(whole, "%s +bufsize=1232 +ignore +short %s TXT", at, name)
	}
	// 4,000 bytes; a server that is asked by UDP sends them by TCP alone.
	for _, name := range []string{"huge.public.test", "huge.corp.test"} {
		w.want(hugeText+"\n", "%s +short %s TXT", at, name)
	}
}

// wantFlags is want for the flags of the answer, with AA left out: an answer that
// comes from a cache is not authoritative.
func (w *dnsWorld) wantFlags(flags, format string, values ...any) {
	w.t.Helper()
	arguments := fmt.Sprintf(format, values...)
	output, err := run(w.t, w.Client, "dig", append([]string{"+tries=1", "+time=3"}, strings.Fields(arguments)...)...)
	if err != nil || !strings.Contains(strings.ReplaceAll(output, " aa", ""), flags) {
		w.t.Errorf("dig %s: %v: no %q in:\n%s", arguments, err, flags, output)
	}
}

// wantSigned wants signatures when they are asked for, and then so untouched that
// delv can validate them.
func (w *dnsWorld) wantSigned(at string) {
	w.t.Helper()
	arguments := strings.Fields(at + " +noall +answer +comments www.signed.test")
	plain, err := run(w.t, w.Client, "dig", arguments...)
	if err != nil || strings.Contains(plain, "RRSIG") || !strings.Contains(plain, "203.0.113.83") {
		w.t.Errorf("dig %q: %v:\n%s", arguments, err, plain)
	}
	signed, err := run(w.t, w.Client, "dig", append(arguments, "+dnssec")...)
	if err != nil || !strings.Contains(signed, "RRSIG\tA 13 3 300 ") || !strings.Contains(signed, "flags: do;") {
		w.t.Errorf("dig +dnssec %q: %v:\n%s", arguments, err, signed)
	}
	anchor := filepath.Join(w.t.TempDir(), "anchor")
	must(w.t, os.WriteFile(anchor, []byte(w.anchor), 0o600))
	server, transport, _ := strings.Cut(at, " ")
	output, err := run(w.t, w.Client, "delv", server, transport, "-a", anchor, "+root=signed.test", "www.signed.test")
	if err != nil || !strings.Contains(output, "; fully validated") {
		w.t.Errorf("delv %s: %v:\n%s", at, err, output)
	}
}
