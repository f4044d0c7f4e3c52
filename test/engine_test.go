package test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// filterBridges has all bridges of a host call the hooks of nftables and iptables, or none.
func filterBridges(t *testing.T, ns *netns.NS, value string) {
	t.Helper()
	must(t, ns.Sysctl("net.bridge.bridge-nf-call-iptables", value), ns.Sysctl("net.bridge.bridge-nf-call-ip6tables", value))
}

// needsLookup skips a test where no sk_lookup program can be loaded.
func needsLookup(t *testing.T) {
	t.Helper()
	if !initialUserNamespace() {
		t.Skip("sk_lookup needs root in the initial user namespace: make test-hosts")
	}
}

// TestEngineFollowsTheHost: bridges begin to call the hooks while the gateway runs, and stop to. What flows goes on, and
// containers are captured after each change.
func TestEngineFollowsTheHost(t *testing.T) {
	needsLookup(t)
	w := newWorldOfHosts(t, false)
	g := startGateway(t, w.Gateway, "--upstream", w.upstream(), "--engine", "auto", "--public-dns", public4.String(),
		"--tcp-proxy-dports", "22,9003")
	w.knows(map[string]netip.Addr{"some.public.test": lab.Origin4})
	over := make(chan struct{})
	flows := make(chan error)
	running := 0
	for _, from := range []*netns.NS{w.container, w.Client} {
		for _, address := range both {
			conn := dial(t, from, address, lab.PortEcho)
			go func() { flows <- keepEchoing(conn, over) }()
			running++
		}
	}
	for i, change := range []struct{ value, engine string }{{"1", "sk_lookup"}, {"0", "tproxy"}, {"1", "sk_lookup"}} {
		filterBridges(t, w.Gateway, change.value)
		if i > 0 { // the first is found by looking, the others are looked for when something else changes
			must(t, w.Gateway.Addr("lan0", netip.PrefixFrom(lab.Gateway4.Next().Next().Next().Next(), 24+i).String()))
		}
		if !within(15*time.Second, func() bool {
			return strings.Count(g.output.String(), `"engine":"`+change.engine+`","why"`) == 1+i/2
		}) {
			t.Fatalf("the engine is not %s", change.engine)
		}
		for _, family := range []string{"IPv4", "IPv6"} {
			for _, kind := range []string{"TCP", "DNS", "QUIC"} {
				for _, source := range []string{"container", "LAN client"} {
					if err := w.try(traffic{source, kind}, family); err != nil {
						t.Errorf("%s: %s of a %s over %s: %v", change.engine, kind, source, family, err)
					}
				}
			}
		}
	}
	close(over)
	for range running {
		if err := <-flows; err != nil {
			t.Errorf("a flow that was there before: %v", err)
		}
	}
	g.stop()
}

// TestLookupThatCannotBe: where no program can be loaded, auto says what is lost and serves the rest, and whoever insists on
// it is told so before anything is changed.
func TestLookupThatCannotBe(t *testing.T) {
	if initialUserNamespace() {
		t.Skip("here it can be")
	}
	w := newWorldOfHosts(t, false)
	filterBridges(t, w.Gateway, "1")
	g := startGateway(t, w.Gateway, "--upstream", w.upstream(), "--engine", "auto")
	for _, text := range []string{"operation not permitted", `"interfaces":["br0"`, "sysctl -w net.bridge.bridge-nf-call-iptables=0"} {
		if !strings.Contains(g.output.String(), text) {
			t.Errorf("the log has no %q:\n%s", text, g.output)
		}
	}
	if err := w.try(traffic{"LAN client", "TCP"}, "IPv4"); err != nil {
		t.Error(err)
	}
	g.stop()

	before := w.kernelState()
	g = start(t, w.Gateway, program("--upstream", w.upstream(), "--engine", "sk_lookup"))
	g.wait(5 * time.Second)
	if g.err == nil || !strings.Contains(g.output.String(), "--engine sk_lookup: ") {
		t.Errorf("%v: %s", g.err, g.output)
	}
	if after := w.kernelState(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
