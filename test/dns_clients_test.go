package test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// TestDNSProxyListen: an ordinary resolver for the clients and the gateway itself.
func TestDNSProxyListen(t *testing.T) {
	for _, test := range []struct {
		name      string
		arguments []string
		port      uint16
		stranger  bool // is answered
	}{
		{"any address", []string{"--dns-proxy-listen", ":53"}, 53, false},
		{"another port", []string{"--dns-proxy-listen", ":5300"}, 5300, false},
		{"chosen addresses", []string{"--dns-proxy-listen", "192.0.2.1:53,[2001:db8:1::1]:53,127.0.0.1:53,[::1]:53"}, 53, false},
		{"a stranger is allowed", []string{"--dns-proxy-listen", ":53", "--dns-allow", "198.51.100.20,2001:db8:2::/64,192.0.2.0/24,2001:db8:1::/64,127.0.0.0/8,::1"}, 53, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newDNSWorld(t)
			w.gateway(append(test.arguments, "--public-dns", public4.String())...)
			at := func(address netip.Addr) netip.AddrPort { return netip.AddrPortFrom(address, test.port) }
			for _, network := range networks {
				for host, servers := range map[*netns.NS][]netip.Addr{
					w.Client:  {lab.Gateway4, lab.Gateway6},
					w.Gateway: {netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()},
				} {
					for _, server := range servers {
						answer, err := exchange(t.Context(), host, network, at(server), newQuestion("a.public.test", "A"), questionLimit)
						if err != nil || data(answer) != fromPublic4 {
							t.Errorf("%s over %s: %v, %v", at(server), network, answer, err)
						}
					}
				}
				before := len(w.public.Asked())
				for _, server := range []netip.Addr{lab.Uplink4, lab.Uplink6} {
					if !test.stranger {
						wantSilence(t, w.Neighbour, network, at(server), "a.public.test")
						wantSilence(t, w.Neighbour, network, at(server), "stranger.public.test")
						continue
					}
					answer, err := exchange(t.Context(), w.Neighbour, network, at(server), newQuestion("a.public.test", "A"), questionLimit)
					if err != nil || data(answer) != fromPublic4 {
						t.Errorf("the stranger at %s over %s: %v, %v", at(server), network, answer, err)
					}
				}
				if asked := w.public.Asked(); len(asked) > before {
					t.Errorf("for the stranger the public server was asked %v", asked[before:])
				}
			}
		})
	}
}

// TestStrangersGetNoDNS: what a host on the uplink sends through the gateway is not
// captured, and the listeners for what is captured cannot be asked by anybody.
func TestStrangersGetNoDNS(t *testing.T) {
	w := newDNSWorld(t)
	must(t,
		w.Neighbour.Route("203.0.113.0/24", lab.Uplink4.String()),
		w.Neighbour.Route("2001:db8:3::/64", lab.Uplink6.String()))
	w.gateway("--public-dns", public4.String())
	for i, server := range anywhere {
		for _, network := range networks {
			name := fmt.Sprintf("%s-%d.public.test", network, i)
			wantAnswer(t, w.Neighbour, network, server, name, "A", fromPast4)
			for _, q := range w.past.AskedFor(name) {
				if q.Source.Addr() != []netip.Addr{lab.Neighbour4, lab.Neighbour6}[i] {
					t.Errorf("%s: the server was asked from %s", name, q.Source)
				}
			}
		}
	}
	for _, network := range networks {
		for _, address := range []netip.Addr{lab.Uplink4, lab.Uplink6} {
			wantSilence(t, w.Neighbour, network, netip.AddrPortFrom(address, 15053), "a.public.test")
		}
		for _, address := range []netip.Addr{lab.Gateway4, lab.Gateway6} {
			wantSilence(t, w.Client, network, netip.AddrPortFrom(address, 15053), "a.public.test")
		}
	}
	if asked := w.public.Asked(); len(asked) > 0 {
		t.Errorf("the public server was asked %v", asked)
	}
}
