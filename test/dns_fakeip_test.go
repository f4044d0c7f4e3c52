package test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// Where fake addresses come from if nothing is said.
var fakeRanges = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("fd0f:a4e1:b0d5:c0de::/64")}

// kinds are the types of addresses, one a family.
var kinds = []string{"A", "AAAA"}

// TestFakeIP: names that no DNS server knows are carried to the proxy as names, from
// question to answer, on every port.
func TestFakeIP(t *testing.T) {
	w := newDNSWorld(t)
	g := w.gateway("--fake-ip")
	var targets, requests []string
	given := make(map[netip.Addr]string)
	for _, name := range []string{"origin.test", "six.test"} {
		for i, kind := range kinds {
			address := resolve(t, w.Client, name, kind)
			if !fakeRanges[i].Contains(address) || given[address] != "" {
				t.Fatalf("%s is %s", name, address)
			}
			given[address] = name
			if again := resolve(t, w.Server, strings.ToUpper(name), kind); again != address {
				t.Errorf("%s is %s at first and then %s", name, address, again)
			}
			client := lab.HTTPClient(w.Client, map[string]netip.Addr{name: address}, w.origin.Roots())
			client.Timeout = questionLimit
			for _, scheme := range []string{"https", "http"} {
				response, err := client.Get(scheme + "://" + name + "/")
				if err != nil {
					t.Errorf("%s to %s at %s: %v", scheme, name, address, err)
					continue
				}
				body, _ := io.ReadAll(response.Body)
				response.Body.Close()
				if want := "origin " + scheme + "://" + name + "/\n"; string(body) != want {
					t.Errorf("%s at %s: %q", name, address, body)
				}
			}
			w.handshakeWithoutName(address)
			wantBanner(t, w.Client, address)
			echo(t, w.Client, address, lab.PortEcho) // not among the captured ports
			for _, port := range []int{443, 443, 22, lab.PortEcho} {
				targets = append(targets, fmt.Sprintf("%s:%d", name, port))
			}
			requests = append(requests, "GET http://"+name+"/")
		}
	}
	w.wantTargets(targets...)
	if got := w.proxy.Requests(); !slices.Equal(got, requests) {
		t.Errorf("the proxy saw the requests %q and not %q", got, requests)
	}
	for _, f := range g.waitFlows(len(targets) + len(requests)) {
		if f.Message == "request" {
			continue
		}
		destination := netip.MustParseAddrPort(f.Destination)
		if f.Name != given[destination.Addr()] || f.Way != "upstream" {
			t.Errorf("access line %+v", f)
		}
		if destination.Port() == 22 && f.NameFrom != "fake-ip" {
			t.Errorf("access line %+v", f)
		}
	}
	w.wantNothingPast()
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
}

// handshakeWithoutName makes a TLS connection without SNI.
func (w *dnsWorld) handshakeWithoutName(address netip.Addr) {
	w.t.Helper()
	conn := tls.Client(w.dial(address, 443), &tls.Config{InsecureSkipVerify: true})
	defer conn.Close()
	if err := conn.Handshake(); err != nil {
		w.t.Errorf("TLS without SNI to %s: %v", address, err)
	}
}

// TestFakeIPAnswers: short-lived addresses, their names, and nothing else that a
// client would prefer.
func TestFakeIPAnswers(t *testing.T) {
	w := newDNSWorld(t)
	w.gateway("--fake-ip", "--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test")
	for i, kind := range kinds {
		for _, server := range anywhere {
			for _, network := range networks {
				answer, err := ask(t, w.Client, network, server, "name.test", kind)
				if err != nil || len(answer.Answer) != 1 || answer.Answer[0].Header().Ttl > 300 {
					t.Fatalf("%s: %v, %v", kind, answer, err)
				}
			}
		}
		address := resolve(t, w.Client, "name.test", kind)
		wantAnswer(t, w.Client, "tcp", anywhere[i], reverse(t, address.String()), "PTR", "name.test.")
		// QUIC, and whatever else: the client is to take TCP at once.
		for _, port := range []uint16{443, 3478} {
			wantPortUnreachable(t, w.Client, netip.AddrPortFrom(address, port))
		}
	}
	for _, kind := range []string{"HTTPS", "SVCB", "MX", "TXT", "NS"} {
		answer, err := ask(t, w.Client, "udp", anywhere[0], "name.test", kind)
		if err != nil || answer.Rcode != dns.RcodeSuccess || len(answer.Answer) > 0 || len(answer.Ns) != 1 || answer.Ns[0].Header().Rrtype != dns.TypeSOA {
			t.Errorf("%s: %v, %v", kind, answer, err)
		}
	}
	// Names of no_proxy have their own addresses.
	wantAnswer(t, w.Client, "udp", anywhere[0], "host.corp.test", "A", fromPrivate4)
	wantAnswer(t, w.Client, "udp", anywhere[0], "host.corp.test", "AAAA", fromPrivate6)
	if got := names(w.private.Asked()); !slices.Equal(got, []string{"host.corp.test"}) {
		t.Errorf("the private server was asked for %q", got)
	}
	// An address that nobody was told is nobody's: the proxy could not reach it.
	for _, stranger := range []string{"198.19.77.77", "fd0f:a4e1:b0d5:c0de::7777"} {
		if got, err := banner(t, w.Client, netip.MustParseAddr(stranger), 22); err == nil {
			t.Errorf("%s: %q", stranger, got)
		}
	}
	w.wantTargets()
	w.wantNothingPast()
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
}

// TestFakeIPRange: other ranges, and one family alone.
func TestFakeIPRange(t *testing.T) {
	for _, test := range []struct{ name, ranges, ipv4, ipv6 string }{
		{"both", "10.200.0.0/16,fd00:1::/64", "10.200.0.0/16", "fd00:1::/64"},
		{"IPv4", "198.19.7.0/24", "198.19.7.0/24", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newDNSWorld(t)
			w.gateway("--fake-ip", "--fake-ip-range", test.ranges)
			for kind, within := range map[string]string{"A": test.ipv4, "AAAA": test.ipv6} {
				if within == "" {
					wantRcode(t, w.Client, "origin.test", kind, dns.RcodeSuccess)
					continue
				}
				address := resolve(t, w.Client, "origin.test", kind)
				if !netip.MustParsePrefix(within).Contains(address) {
					t.Errorf("%s is not in %s", address, within)
				}
				wantBanner(t, w.Client, address)
			}
			if targets := w.proxy.Targets(); len(targets) == 0 || targets[0] != "origin.test:22" {
				t.Errorf("the proxy saw %q", targets)
			}
		})
	}
}

// TestFakeIPsSurviveRestarts, orderly ones and others: clients keep addresses for
// longer than they were told.
func TestFakeIPsSurviveRestarts(t *testing.T) {
	w := newDNSWorld(t)
	arguments := []string{"--fake-ip", "--fake-ip-store", filepath.Join(t.TempDir(), "fake-ips")}
	known := make(map[string]netip.Addr) // by name and type
	order := []string{"a.test", "origin.test", "b.test", "six.test"}
	for round, end := range []func(*gateway){(*gateway).stop, (*gateway).kill, nil} {
		g := w.gateway(arguments...)
		if round > 0 { // before anybody has asked
			wantBanner(t, w.Client, known["origin.test A"])
			wantBanner(t, w.Client, known["six.test AAAA"])
			w.wantTargets(slices.Repeat([]string{"origin.test:22", "six.test:22"}, round)...)
		}
		// Another order each time, and a name more.
		order = append([]string{fmt.Sprintf("new-%d.test", round)}, order...)
		taken := make(map[netip.Addr]string)
		for _, name := range order {
			for _, kind := range kinds {
				address := resolve(t, w.Client, name, kind)
				if before, isKnown := known[name+" "+kind]; isKnown && address != before {
					t.Errorf("after restart %d %s is %s and not %s", round, name, address, before)
				}
				known[name+" "+kind] = address
				if other := taken[address]; other != "" {
					t.Errorf("%s is %s and %s", address, name, other)
				}
				taken[address] = name
			}
		}
		if end != nil {
			end(g)
		}
	}
}

// TestManyFakeIPs: a small range is used again from its oldest name on, and the name
// at hand is the right one.
func TestManyFakeIPs(t *testing.T) {
	w := newDNSWorld(t)
	w.knows(map[string]netip.Addr{"last.test": lab.Origin4})
	w.gateway("--fake-ip", "--fake-ip-range", "198.18.0.0/28")
	start := time.Now()
	for i := range 50 {
		if !netip.MustParsePrefix("198.18.0.0/28").Contains(resolve(t, w.Client, fmt.Sprintf("n%d.test", i), "A")) {
			t.Fatalf("name %d has no address of the range", i)
		}
	}
	address := resolve(t, w.Client, "last.test", "A")
	wantAnswer(t, w.Client, "udp", anywhere[0], reverse(t, address.String()), "PTR", "last.test.")
	wantBanner(t, w.Client, address)
	w.wantTargets("last.test:22")
	t.Logf("50 names took %v", time.Since(start))
}
