package test

import (
	"io"
	"net/netip"
	"slices"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// echo connects, and wants back what it sends.
func echo(t *testing.T, ns *netns.NS, address netip.Addr, port int) {
	t.Helper()
	conn := dial(t, ns, address, port)
	defer conn.Close()
	const text = "are you there?"
	io.WriteString(conn, text)
	conn.CloseWrite()
	if got, err := io.ReadAll(conn); string(got) != text {
		t.Errorf("%s port %d: %q, %v", address, port, got, err)
	}
}

// wantBanner connects to port 22, and wants the server there to speak.
func wantBanner(t *testing.T, ns *netns.NS, address netip.Addr) {
	t.Helper()
	if got, err := banner(t, ns, address, 22); got != lab.Banner {
		t.Errorf("%s port 22: %q, %v", address, got, err)
	}
}

// wantTargets wants the proxy to have been asked for just these, besides DNS.
func (w *dnsWorld) wantTargets(want ...string) {
	w.t.Helper()
	got := slices.DeleteFunc(w.proxy.Targets(), func(target string) bool {
		return target == netip.AddrPortFrom(public4, 53).String()
	})
	if !slices.Equal(got, want) {
		w.t.Errorf("the proxy saw %q and not %q", got, want)
	}
}

// TestNamesFromDNS: a flow whose first bytes tell no name is carried by the name
// that this very client was last told the address for.
func TestNamesFromDNS(t *testing.T) {
	w := newDNSWorld(t)
	w.knows(map[string]netip.Addr{
		"ssh.public.test": lab.Origin4, "alias.public.test": lab.Origin4, "six.public.test": lab.Origin6, "dual.public.test": lab.Origin6,
	})
	g := w.gateway("--public-dns", public4.String(), "--tcp-proxy-dports", "22,9003")

	wantBanner(t, w.Client, resolve(t, w.Client, "ssh.public.test", "A"))
	echo(t, w.Client, resolve(t, w.Client, "SIX.public.test", "AAAA"), lab.PortEcho)
	// Answered over TCP and through an alias.
	wantAnswer(t, w.Client, "tcp", anywhere[0], "alias.public.test", "A", fromPublic4)
	echo(t, w.Client, lab.Origin4, lab.PortEcho)
	// Asked over one family and used over the other, as hosts with both do.
	wantAnswer(t, w.Server, "udp", anywhere[0], "dual.public.test", "AAAA", fromPublic6)
	echo(t, w.Server, lab.Origin6, lab.PortEcho)
	// This client has not asked for this address.
	wantBanner(t, w.Server, lab.Origin4)
	// An answer from the cache counts as well.
	resolve(t, w.Server, "ssh.public.test", "A")
	wantBanner(t, w.Server, lab.Origin4)
	w.wantTargets("ssh.public.test:22", "six.public.test:9003", "alias.public.test:9003", "dual.public.test:9003",
		"203.0.113.7:22", "ssh.public.test:22")

	for i, f := range g.waitFlows(6) {
		want := []string{"ssh.public.test", "six.public.test", "alias.public.test", "dual.public.test", "", "ssh.public.test"}[i]
		if f.Name != want || f.NameFrom != map[bool]string{true: "dns"}[want != ""] {
			t.Errorf("access line %+v; want the name %q", f, want)
		}
	}

	// What the flow itself tells comes first.
	if body, err := w.get("https://origin.test/"); err != nil {
		t.Errorf("%q, %v", body, err)
	}
	if f := g.waitFlows(7)[6]; f.Name != "origin.test" || f.NameFrom != "sni" {
		t.Errorf("access line %+v", f)
	}
	w.wantNothingPast()
}

// TestNamesFromDNSAndNoProxy: a flow to a name of no_proxy goes directly, to the
// address that the client dialled.
func TestNamesFromDNSAndNoProxy(t *testing.T) {
	w := newDNSWorld(t)
	w.private.Close()
	w.private.Records = append(w.private.Records, "ssh.corp.test 300 A "+lab.Origin4.String())
	must(t, w.private.Start(w.Neighbour))
	g := w.gateway("--public-dns", public4.String(), "--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test")
	wantBanner(t, w.Client, resolve(t, w.Client, "ssh.corp.test", "A"))
	w.wantTargets()
	if f := g.waitFlows(1)[0]; f.Way != "direct" || f.Name != "ssh.corp.test" || f.NameFrom != "dns" {
		t.Errorf("access line %+v", f)
	}
	if sources := w.direct.Sources(); len(sources) != 1 || sources[0].Addr() != lab.Uplink4 {
		t.Errorf("the far side saw %v", sources)
	}
}
