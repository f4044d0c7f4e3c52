package test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestSysctlsThatSpoilNothing: no value of those that are known to spoil policy routing
// does so, for clients and for the gateway's own programs: there is nothing to warn of.
func TestSysctlsThatSpoilNothing(t *testing.T) {
	for _, row := range []string{
		"all.rp_filter=1", "all.rp_filter=2", "lo.rp_filter=1", "lo.rp_filter=2", "wan0.rp_filter=1", "lan0.rp_filter=1",
		"all.rp_filter=1 all.src_valid_mark=1", "lo.rp_filter=1 lo.src_valid_mark=1", "lo.rp_filter=1 all.src_valid_mark=1",
		"all.rp_filter=2 all.src_valid_mark=1", "lan0.rp_filter=1 wan0.rp_filter=1 lo.rp_filter=1 lan0.src_valid_mark=1 wan0.src_valid_mark=1 lo.src_valid_mark=1",
		"all.accept_local=0 lo.accept_local=0 all.rp_filter=1", "all.route_localnet=0 all.rp_filter=1", "all.arp_filter=1", "lo.disable_policy=0 lo.disable_xfrm=0",
	} {
		t.Run(row, func(t *testing.T) {
			w := newWorld(t)
			for _, setting := range strings.Fields(row) {
				key, value, _ := strings.Cut(setting, "=")
				must(t, w.Gateway.Sysctl("net.ipv4.conf."+key, value))
			}
			must(t, w.Gateway.Sysctl("net.ipv4.tcp_early_demux", "0"))
			g := w.gateway("--output")
			for _, url := range []string{"https://origin.test/", "https://six.test/"} {
				for from, name := range map[string]string{"client": url, "gateway": url} {
					host := w.Client
					if from == "gateway" {
						host = w.Gateway
					}
					if body, err := w.fetch(host, name); err != nil || !strings.HasPrefix(body, "origin ") {
						t.Errorf("%s of the %s: %q, %v", url, from, body, err)
					}
				}
			}
			if strings.Contains(g.output.String(), `"cure"`) {
				t.Errorf("a clean host is warned of: %s", g.output)
			}
		})
	}
}

// shell runs a line on the gateway.
func (w *world) shell(line string) {
	w.t.Helper()
	if output, err := w.run(exec.Command("sh", "-c", line)); err != nil {
		w.t.Fatalf("%s: %v: %s", line, err, output)
	}
}

// needs skips a test without a program.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not on PATH")
		}
	}
}

// TestObstaclesAreNamed at the start and by `rules`, each with a line that cures it.
func TestObstaclesAreNamed(t *testing.T) {
	needs(t, "nft", "ip")
	const restore = "chain %s { type filter hook %[1]s priority mangle; meta mark set ct mark;\n}\n"
	for _, test := range []struct {
		name, prepare string
		flags         []string
		own           bool // it is about the gateway's own programs
		code          string
		router        bool // it is about what is forwarded
	}{
		{
			name: "a firewall", code: "dropped",
			prepare: "table inet filter { chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iif lo accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;\n}\n}",
		},
		// In the engine sk_lookup the connection has the same mark as its packets, so that it restores it.
		{name: "marks", code: "unmarked", flags: []string{"--engine", "tproxy"}, prepare: "table inet marks { " + fmt.Sprintf(restore, "prerouting") + "}"},
		{name: "marks of own programs", code: "unmarked", own: true, flags: []string{"--output"}, prepare: "table inet marks { chain out { type filter hook output priority mangle; oifname \"wan0\" meta mark set ct mark;\n}\n}"},
		{
			name: "forwarding", code: "unforwarded", router: true, flags: []string{"--gateway", "--no-proxy", "203.0.113.0/24,2001:db8:3::/64"},
			prepare: "table inet filter { chain forward { type filter hook forward priority 0; policy drop;\n}\n}",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.shell("nft -f - <<'EOF'\n" + test.prepare + "\nEOF")
			want, from := "origin ", w.Client
			if test.router {
				want = "direct "
			}
			if test.own {
				from = w.Gateway
			}
			flags := append([]string{"--state-dir", t.TempDir()}, test.flags...)
			printed, err := w.run(program(append([]string{"rules", "--upstream", upstream()}, flags...)...))
			must(t, err)
			g := w.gateway(flags...)
			g.waitFor(`"code":"` + test.code + `"`)
			if body, err := w.fetch(from, "http://origin.test/"); err == nil && strings.HasPrefix(body, want) {
				t.Errorf("it is carried before the cure: %q", body)
			}
			cures := 0
			for line := range strings.Lines(printed) {
				if cure, found := strings.CutPrefix(line, "# Cure: "); found {
					cures++
					w.shell(strings.TrimSpace(cure))
				}
			}
			if cures == 0 {
				t.Fatalf("rules prints no cure:\n%s", printed)
			}
			if body, err := w.fetch(from, "http://origin.test/"); err != nil || !strings.HasPrefix(body, want) {
				t.Errorf("after the cure: %q, %v", body, err)
			}
			g.stop()
			if printed, err = w.run(program(append([]string{"rules", "--upstream", upstream()}, flags...)...)); err != nil || strings.Contains(printed, "# Cure: ") {
				t.Errorf("after the cure rules still prints one, %v:\n%s", err, printed)
			}
		})
	}
}

// TestRulesAheadOfOurs, as wg-quick adds them: the lines that are printed put them behind.
func TestRulesAheadOfOurs(t *testing.T) {
	needs(t, "ip")
	w := newWorld(t)
	beside := &lab.Origin{Label: "beside"}
	must(t, beside.Start(w.Neighbour, nil, nil))
	t.Cleanup(beside.Close)
	// The proxy does not reach what is beside the gateway: what answers is what was not captured.
	captured := func(when string, address netip.Addr, want bool) {
		t.Helper()
		asked := len(w.proxy.Targets())
		_, err := banner(t, w.Client, address, 22)
		if got := len(w.proxy.Targets()) > asked; got != want {
			t.Errorf("%s, a flow to %s is captured: %v (%v)", when, address, got, err)
		}
	}
	g := w.gateway()
	captured("at first", lab.Origin6, true)
	captured("at first", lab.Neighbour6, true)
	w.shell("ip link add wg0 type veth peer name wg1 && ip link set wg0 up && ip -6 route add default dev wg0 table 51820 && ip -6 rule add not fwmark 51820 table 51820 && ip -6 rule add table main suppress_prefixlength 0")
	g.waitFor("not fwmark 0xca6c lookup 51820; put it behind")
	captured("behind a rule of others", lab.Origin6, false)
	captured("behind a rule of others", lab.Neighbour6, false)
	for _, words := range []string{"not fwmark 0xca6c lookup 51820; put it behind with `", "lookup main suppress_prefixlength 0; put it behind with `"} {
		g.waitFor(words)
		_, cure, _ := strings.Cut(g.output.String(), words)
		cure, _, closed := strings.Cut(cure, "`")
		if !closed {
			t.Fatalf("no cure in %s", g.output)
		}
		w.shell(strings.ReplaceAll(cure, `\u0026`, "&"))
	}
	captured("after the cures", lab.Origin6, true)
	captured("after the cures", lab.Neighbour6, true)
}
