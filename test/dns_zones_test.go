package test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// reverse is the name under which an address is looked up.
func reverse(t *testing.T, address string) string {
	t.Helper()
	name, err := dns.ReverseAddr(address)
	must(t, err)
	return name[:len(name)-1]
}

// TestDNSZones: each name is asked of its own server and of no other, as the servers
// themselves tell.
func TestDNSZones(t *testing.T) {
	w := newDNSWorld(t)
	routed := &lab.Nameserver{Records: []string{"*.other.test 300 A 10.0.0.3", "other.test 300 A 10.0.0.3", "sub.corp.test 300 A 10.0.0.3"}}
	w.startNameserver(routed, w.Server)
	w.gateway(
		"--private-dns", lab.Neighbour4.String(), "--public-dns", public4.String(),
		"--dns-route", "other.test="+lab.Server4.String(), "--dns-route", "sub.corp.test="+lab.Server4.String(),
		"--no-proxy", "corp.test,.below.test,11.22.0.0/15,2a00:77::/32,203.0.113.53,2001:db8:3::53")
	for _, test := range []struct {
		name, kind string
		server     *lab.Nameserver
	}{
		{"corp.test", "A", w.private},
		{"CORP.test", "AAAA", w.private},
		{"host.corp.test", "A", w.private},
		{"A.host.Corp.Test", "A", w.private},
		{"host.corp.test", "HTTPS", w.private},
		{"nothing.at.corp.test", "TXT", w.private},
		{"notcorp.test", "A", w.public},
		{"host.notcorp.test", "A", w.public},
		{"corp.test.public.test", "A", w.public},
		{"test", "NS", w.public},
		{"below.test", "A", w.public},
		{"host.below.test", "A", w.private},
		{"other.test", "A", routed},
		{"a.b.OTHER.test", "A", routed},
		{"another.test", "A", w.public},
		{"sub.corp.test", "A", routed}, // the longer suffix
		{"a.sub.corp.test", "A", routed},
		{reverse(t, "11.22.0.1"), "PTR", w.private},
		{reverse(t, "11.23.255.1"), "PTR", w.private},
		{reverse(t, "11.24.0.1"), "PTR", w.public},
		{reverse(t, "11.21.0.1"), "PTR", w.public},
		{reverse(t, "2a00:77:1::1"), "PTR", w.private},
		{reverse(t, "2a00:78:1::1"), "PTR", w.public},
	} {
		before := make(map[*lab.Nameserver]int)
		servers := []*lab.Nameserver{w.private, w.public, routed, w.past}
		for _, server := range servers {
			before[server] = len(server.Asked())
		}
		if _, err := ask(t, w.Client, "udp", anywhere[0], test.name, test.kind); err != nil {
			t.Errorf("%s %s: %v", test.name, test.kind, err)
		}
		for _, server := range servers {
			asked := server.Asked()[before[server]:]
			if server == test.server && len(asked) == 0 {
				t.Errorf("%s %s: its server was not asked", test.name, test.kind)
			}
			if server != test.server && len(asked) > 0 {
				t.Errorf("%s %s: another server was asked %v", test.name, test.kind, asked)
			}
		}
	}
	w.wantNothingPast()
}

// TestDNSRouteOnLabelBorder: with a route and with no_proxy alike, the names that
// only end in the same letters are the public server's.
func TestDNSRouteOnLabelBorder(t *testing.T) {
	for _, arguments := range [][]string{
		{"--dns-route", "corp.test=" + lab.Neighbour4.String()},
		{"--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test"},
	} {
		t.Run(arguments[0], func(t *testing.T) {
			w := newDNSWorld(t)
			w.gateway(append(arguments, "--public-dns", public4.String())...)
			for i, server := range anywhere {
				for _, network := range networks {
					label := fmt.Sprintf("%s-%d.", network, i)
					wantAnswer(t, w.Client, network, server, label+"corp.test", "A", fromPrivate4)
					wantAnswer(t, w.Client, network, server, label+"notcorp.test", "A", fromPublic4)
					wantAnswer(t, w.Client, network, server, "notcorp.test", "A", fromPublic4)
				}
			}
			for _, name := range names(w.private.Asked()) {
				if !slices.Contains([]string{"udp-0.corp.test", "udp-1.corp.test", "tcp-0.corp.test", "tcp-1.corp.test"}, name) {
					t.Errorf("the private server was asked for %s", name)
				}
			}
			for _, name := range names(w.public.Asked()) {
				if !slices.Contains([]string{"udp-0.notcorp.test", "udp-1.notcorp.test", "tcp-0.notcorp.test", "tcp-1.notcorp.test", "notcorp.test"}, name) {
					t.Errorf("the public server was asked for %s", name)
				}
			}
			w.wantNothingPast()
		})
	}
}

// TestPrivateServerIsDown: its names are not asked of the public one for that.
func TestPrivateServerIsDown(t *testing.T) {
	w := newDNSWorld(t)
	w.private.Close()
	w.gateway("--private-dns", lab.Neighbour4.String(), "--public-dns", public4.String(), "--no-proxy", "corp.test")
	wantRcode(t, w.Client, "host.corp.test", "A", dns.RcodeServerFailure)
	if asked := append(w.public.Asked(), w.past.Asked()...); len(asked) > 0 {
		t.Errorf("others were asked %v", asked)
	}
}

// TestDNSCache: a question is asked once, whatever its letters' case, its transport
// and the server that the client believes in; so is one for what does not exist.
func TestDNSCache(t *testing.T) {
	w := newDNSWorld(t)
	w.gateway("--public-dns", public4.String())
	for _, name := range []string{"cached.public.test", "CACHED.public.test", "cAcHeD.Public.Test"} {
		for _, server := range anywhere {
			for _, network := range networks {
				wantAnswer(t, w.Client, network, server, name, "A", fromPublic4)
			}
		}
	}
	for _, name := range []string{"nothing.test", "NOTHING.test"} {
		wantRcode(t, w.Client, name, "A", dns.RcodeNameError)
		wantRcode(t, w.Client, name, "A", dns.RcodeNameError)
	}
	for _, name := range []string{"cached.public.test", "nothing.test"} {
		if asked := w.public.AskedFor(name); len(asked) != 1 {
			t.Errorf("the public server was asked %v", asked)
		}
	}
}

// TestBrowsersKeepThisResolver: what browsers and systems ask for to find another
// resolver is answered with no, and asked of nobody, unless that is allowed.
func TestBrowsersKeepThisResolver(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		t.Run(fmt.Sprint("allowed: ", allowed), func(t *testing.T) {
			w := newDNSWorld(t)
			arguments := []string{"--public-dns", public4.String()}
			if allowed {
				arguments = append(arguments, "--allow-private-dns")
			}
			w.gateway(arguments...)
			for name, kind := range map[string]string{"use-application-dns.net": "A", "_dns.resolver.arpa": "SVCB"} {
				answer, err := ask(t, w.Client, "udp", anywhere[0], name, kind)
				if err != nil || len(answer.Answer) > 0 {
					t.Errorf("%s: %v, %v", name, answer, err)
				}
				if asked := w.public.AskedFor(name); len(asked) > 0 != allowed {
					t.Errorf("%s: the public server was asked %v", name, asked)
				}
			}
		})
	}
}

// TestServersInNoProxyAreCaptured: also a server that no_proxy exempts is asked through the gateway.
func TestServersInNoProxyAreCaptured(t *testing.T) {
	w := newDNSWorld(t)
	w.gateway("--public-dns", public4.String(), "--no-proxy", netip.PrefixFrom(anywhere[0], 32).String()+",2001:db8:3::/64")
	for _, server := range anywhere {
		for _, network := range networks {
			wantAnswer(t, w.Client, network, server, "a.public.test", "A", fromPublic4)
		}
	}
	w.wantNothingPast()
}
