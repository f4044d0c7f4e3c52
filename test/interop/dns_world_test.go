//go:build interop

package interop

import (
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// dnsWorld is a network whose names are in two places: those of the company at
// private, on the uplink; all others at public, behind squid. Whoever asks a public
// server directly ends at direct, which knows the same names.
type dnsWorld struct {
	*world
	public, direct, private *nameServer
	certificate             certificate
	anchor                  string // of signed.test
}

// endpointNames are those by which the public server is asked over TLS and HTTPS.
var endpointNames = []string{"dns.google", "dns.public.test"}

// newDNSWorld builds it. squid allows CONNECT to the ports.
func newDNSWorld(t *testing.T, ports ...int) *dnsWorld {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &dnsWorld{world: &world{Lab: l, t: t, program: buildProgram(t)}}
	w.certificate = newCertificate(t, endpointNames, lab.Origin4, lab.Origin6)
	hosts := make(map[string]netip.Addr)
	for _, name := range endpointNames {
		hosts[name] = lab.Origin4
	}
	var signed string
	signed, w.anchor = signedZone(t, "signed.test")
	zones := func(label string) map[string]string {
		zones := publicZones(label)
		zones["signed.test"] = signed
		return zones
	}
	w.public = startUnbound(t, l.Origin, w.certificate, zones("public"), lab.Origin4, lab.Origin6)
	w.direct = startUnbound(t, l.Router, w.certificate, zones("direct"), lab.Origin4, lab.Origin6)
	w.private = startDnsmasq(t, l.Neighbour, lab.Neighbour4, privateRecords...)
	w.squid = startSquid(t, l.Proxy, hosts, ports)
	return w
}

// noProxy is what is the company's own.
const noProxy = "corp.test,198.51.100.0/24,2001:db8:2::/64"

// gateway starts the program, with the private server for the company's names.
func (w *dnsWorld) gateway(arguments ...string) *process {
	w.t.Helper()
	return w.world.gateway(slices.Concat([]string{
		"--no-proxy", noProxy, "--private-dns", lab.Neighbour4.String(), "--loglevel", "debug",
	}, arguments)...)
}

// wantSplit stops the gateway and wants that each server was asked for its own names
// alone: the company's at private, all others at public, and nothing at the third.
func (w *dnsWorld) wantSplit(g *process, public, none *nameServer) {
	w.t.Helper()
	must(w.t, g.end(syscall.SIGTERM))
	own := []string{"corp.test", "100.51.198.in-addr.arpa", reverseZone("2001:db8:2::")}
	atPrivate, atPublic := w.private.asked(w.t), public.asked(w.t)
	if leaked := below(atPublic, own...); len(leaked) > 0 {
		w.t.Errorf("the public server was asked for the company's %q", leaked)
	}
	if mine := below(atPrivate, own...); !slices.Equal(mine, atPrivate) {
		w.t.Errorf("the private server was asked for %q, of which only %q are the company's", atPrivate, mine)
	}
	if asked := none.asked(w.t); len(asked) > 0 {
		w.t.Errorf("the server that must not be reached was asked for %q", asked)
	}
	for server, name := range map[*nameServer]string{w.private: "www.corp.test A", public: "www.notcorp.test A"} {
		if !slices.Contains(server.asked(w.t), name) {
			w.t.Errorf("no log has %q: it is read wrongly, or the test did not ask", name)
		}
	}
}
