package test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// networks are the transports of clients.
var networks = []string{"udp", "tcp"}

// dnsWays are the ways to a server, for public names but the first.
var dnsWays = []struct {
	name      string
	arguments []string
	connect   string // what the proxy is asked for; empty: nothing
	transport string // over which the server is asked
	zone      string
	want      [2]string // A, AAAA
}{
	{"private", []string{"--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test"}, "", lab.TransportUDP, "corp.test", [2]string{fromPrivate4, fromPrivate6}},
	{"private over IPv6", []string{"--private-dns", lab.Neighbour6.String(), "--no-proxy", "corp.test"}, "", lab.TransportUDP, "corp.test", [2]string{fromPrivate4, fromPrivate6}},
	{"route", []string{"--dns-route", "corp.test=" + lab.Neighbour4.String() + ":53", "--public-dns", public4.String()}, "", lab.TransportUDP, "corp.test", [2]string{fromPrivate4, fromPrivate6}},
	{"CONNECT to 53", []string{"--public-dns", public4.String()}, "203.0.113.50:53", lab.TransportTCP, "public.test", fromPublic},
	{"CONNECT to 53 over IPv6", []string{"--public-dns", public6.String()}, "[2001:db8:3:1::50]:53", lab.TransportTCP, "public.test", fromPublic},
	{"directly", []string{"--public-dns", public4.String(), "--dns-over-tcp-disabled"}, "", lab.TransportUDP, "public.test", [2]string{fromPast4, fromPast6}},
	{"HTTPS", []string{"--dns-over-https-enabled", "--dns-over-https-endpoint", "https://dns.test/dns-query"}, "dns.test:443", lab.TransportHTTPS, "public.test", fromPublic},
	{"HTTPS, the default endpoint", []string{"--dns-over-https-enabled"}, "dns.google:443", lab.TransportHTTPS, "public.test", fromPublic},
	{"HTTPS, the endpoint for JSON", []string{"--dns-over-https-enabled", "--dns-over-https-endpoint", "https://dns.google/resolve"}, "dns.google:443", lab.TransportHTTPS, "public.test", fromPublic},
	{"TLS", []string{"--dns-over-tls", "dns.test"}, "dns.test:853", lab.TransportTLS, "public.test", fromPublic},
	{"TLS, with its address", []string{"--dns-over-tls", "dns.test@203.0.113.50:853"}, "203.0.113.50:853", lab.TransportTLS, "public.test", fromPublic},
}

var fromPublic = [2]string{fromPublic4, fromPublic6}

// TestDNSWays: a client that asks any server, over either family and transport,
// gets the answer from that server's address, and the question takes its way.
func TestDNSWays(t *testing.T) {
	for _, way := range dnsWays {
		t.Run(way.name, func(t *testing.T) {
			w := newDNSWorld(t)
			arguments := way.arguments
			if strings.HasPrefix(way.connect, "dns.") || way.transport == lab.TransportTLS {
				arguments = append(slices.Clone(arguments), "--dns-ca", w.authority())
				w.proxy.Change(func() { w.proxy.Ports = []int{443, 853} })
			}
			g := w.gateway(arguments...)
			asked := map[string]*lab.Nameserver{fromPrivate4: w.private, fromPublic4: w.public, fromPast4: w.past}[way.want[0]]
			for i, server := range anywhere {
				for _, network := range networks {
					name := fmt.Sprintf("%s-%d.%s", network, i, way.zone)
					wantAnswer(t, w.Client, network, server, name, "A", way.want[0])
					wantAnswer(t, w.Client, network, server, name, "AAAA", way.want[1])
					wantAnswer(t, w.Client, network, server, "huge."+way.zone, "TXT", huge(network))
					if got := transports(asked.AskedFor(name)); !slices.Equal(got, []string{way.transport}) {
						t.Errorf("%s was asked for over %q and not over %s", name, got, way.transport)
					}
				}
			}
			want := []string{way.transport}
			if way.transport == lab.TransportUDP { // too big for it
				want = []string{lab.TransportTCP, lab.TransportUDP}
			}
			if got := transports(asked.AskedFor("huge." + way.zone)); !slices.Equal(got, want) {
				t.Errorf("what is too big for UDP was asked for over %q and not over %q", got, want)
			}
			for _, server := range []*lab.Nameserver{w.private, w.public, w.past} {
				if n := len(server.Asked()); server != asked && n > 0 {
					t.Errorf("another server was asked: %v", server.Asked())
				}
			}
			for _, q := range asked.Asked() {
				if way.connect == "" && q.Source.Addr() != lab.Uplink4 && q.Source.Addr() != lab.Uplink6 {
					t.Errorf("%s asked and not the gateway", q.Source)
				}
			}
			targets := w.proxy.Targets()
			if way.connect == "" && len(targets) > 0 {
				t.Errorf("the proxy saw %q", targets)
			}
			if way.connect != "" {
				if others := slices.DeleteFunc(targets, func(target string) bool { return target == way.connect }); len(targets) == 0 || len(others) > 0 {
					t.Errorf("the proxy saw %q and not %s alone", targets, way.connect)
				}
				// A connection is kept: there are 10 questions.
				if n := len(w.proxy.Targets()); n > 3 {
					t.Errorf("the proxy saw %d CONNECTs: connections are not kept", n)
				}
			}
			g.stop()
		})
	}
}

// huge is what comes of the huge TXT.
func huge(network string) string {
	if network == "udp" {
		return ""
	}
	return strings.TrimSpace(hugeTXT)
}

// TestBigAnswers: what does not fit is truncated, and said to be, and what the
// client has room for comes whole.
func TestBigAnswers(t *testing.T) {
	w := newDNSWorld(t)
	w.gateway("--public-dns", public4.String(), "--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test")
	for name, whole := range map[string]string{
		"big.public.test": bigTXT, "big.corp.test": bigTXT, "huge.public.test": hugeTXT, "huge.corp.test": hugeTXT,
	} {
		for _, server := range anywhere {
			for _, test := range []struct {
				network string
				size    int // of EDNS; 0: without it
				limit   int // of the answer
			}{
				{"udp", 0, 512},
				{"udp", 512, 512},
				{"udp", 700, 700},
				{"udp", 1232, 1232},
				{"tcp", 0, dns.MaxMsgSize},
				{"tcp", 512, dns.MaxMsgSize},
			} {
				query := newQuestion(name, "TXT")
				if test.size > 0 {
					query.SetEdns0(uint16(test.size), false)
				}
				answer, err := exchange(t.Context(), w.Client, test.network, netip.AddrPortFrom(server, 53), query, questionLimit)
				if err != nil {
					t.Errorf("%s %+v: %v", name, test, err)
					continue
				}
				fits := len(whole)+100 < test.limit
				if answer.Truncated == fits || answer.Len() > test.limit || (answer.IsEdns0() != nil) != (test.size > 0) {
					t.Errorf("%s %+v: %d bytes: %s", name, test, answer.Len(), answer)
				}
				if fits && data(answer) != strings.TrimSpace(whole) {
					t.Errorf("%s %+v: not whole: %s", name, test, answer)
				}
			}
		}
	}
}

// TestDNSPortHeldByAnother: a program of the gateway that holds port 53, for all
// addresses and against everybody, neither disturbs nor is disturbed.
func TestDNSPortHeldByAnother(t *testing.T) {
	for _, arguments := range [][]string{nil, {"--dns-tproxy-listen", "15353"}} {
		t.Run(strings.Join(arguments, " "), func(t *testing.T) {
			w := newDNSWorld(t)
			other := &lab.Nameserver{Records: []string{"*. 300 A 192.0.2.1"}}
			w.startNameserver(other, w.Gateway)
			w.gateway(append(arguments, "--public-dns", public4.String())...)
			for _, network := range networks {
				for i, server := range anywhere {
					name := fmt.Sprintf("%s-%d.public.test", network, i)
					wantAnswer(t, w.Client, network, server, name, "A", fromPublic4)
				}
				for _, own := range []netip.Addr{lab.Gateway4, lab.Gateway6, lab.Uplink4} {
					wantAnswer(t, w.Client, network, own, "x.public.test", "A", "192.0.2.1")
				}
			}
			if n := len(other.AskedFor("x.public.test")); n != 6 {
				t.Errorf("the other program was asked %d times and not 6", n)
			}
			w.wantNothingPast()
		})
	}
}

// TestPort53IsLeftAlone without DNS flags, or where a transport is switched off:
// the client's questions go on to the server that it asked, from its own address.
func TestPort53IsLeftAlone(t *testing.T) {
	for _, test := range []struct {
		name      string
		arguments []string
		alone     []string
	}{
		{"no flag", nil, networks},
		{"no UDP", []string{"--public-dns", public4.String(), "--dns-udp=false"}, []string{"udp"}},
		{"no TCP", []string{"--public-dns", public4.String(), "--dns-tcp=false"}, []string{"tcp"}},
		{"neither", []string{"--public-dns", public4.String(), "--dns-udp=false", "--dns-tcp=false"}, networks},
		{"both", []string{"--public-dns", public4.String(), "--dns-udp", "--dns-tcp=true"}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newDNSWorld(t)
			w.gateway(test.arguments...)
			for _, network := range networks {
				alone := slices.Contains(test.alone, network)
				want := fromPublic4
				if alone {
					want = fromPast4
				}
				for i, server := range anywhere {
					name := fmt.Sprintf("%s-%d.public.test", network, i)
					wantAnswer(t, w.Client, network, server, name, "A", want)
					for _, q := range w.past.AskedFor(name) {
						if q.Source.Addr() != []netip.Addr{lab.Client4, lab.Client6}[i] {
							t.Errorf("%s: the server was asked from %s", name, q.Source)
						}
					}
				}
			}
			if asked := w.public.Asked(); len(test.alone) == 2 && len(asked) > 0 {
				t.Errorf("the public server was asked %v", asked)
			}
		})
	}
}

// TestOneArmedDNS: a gateway with one card answers clients in its own subnet, and
// asks a server there.
func TestOneArmedDNS(t *testing.T) {
	w := newOneArmedDNSWorld(t)
	w.gateway("--public-dns", public4.String(), "--private-dns", lab.Server4.String(), "--no-proxy", "corp.test")
	for i, server := range anywhere {
		for _, network := range networks {
			wantAnswer(t, w.Client, network, server, fmt.Sprintf("%s-%d.public.test", network, i), "A", fromPublic4)
			wantAnswer(t, w.Client, network, server, fmt.Sprintf("%s-%d.corp.test", network, i), "A", fromPrivate4)
		}
	}
	w.wantNothingPast()
	for _, q := range w.private.Asked() {
		if q.Source.Addr() != lab.Gateway4 {
			t.Errorf("%s asked the private server and not the gateway", q.Source)
		}
	}
	// A server in the subnet is the client's own business.
	wantAnswer(t, w.Client, "udp", lab.Server4, "own.corp.test", "A", fromPrivate4)
	if asked := w.private.AskedFor("own.corp.test"); len(asked) != 1 || asked[0].Source.Addr() != lab.Client4 {
		t.Errorf("the neighbour was asked by %v", asked)
	}
}
