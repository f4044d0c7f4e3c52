package netfilter

import (
	"errors"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) {
	if mode := os.Getenv(instanceVariable); mode != "" {
		runInstance(mode)
	}
	flag.Parse()
	os.Exit(netns.Main(m))
}

// testConfig captures what comes in by lan0.
func testConfig() Config {
	return Config{
		Table: "transproxy", Mask: 0x07000000, LAN: 0x01000000, Exempt: 0x04000000,
		Listen:     []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15001"), netip.MustParseAddrPort("[::1]:15001")},
		Interfaces: []string{"lan0"},
		Clients:    prefixes("10.1.0.0/24", "fd01::/64"),
		Bypass:     prefixes("198.51.100.0/24", "2001:db8:51::/48"),
		Ports:      []PortRange{{22, 22}, {80, 80}, {443, 443}},
	}
}

// dnsConfig captures DNS, too.
func dnsConfig() Config {
	c := testConfig()
	c.DNS = DNS{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("[::1]:15053")},
		UDP:    true, TCP: true,
	}
	return c
}

func prefixes(texts ...string) []netip.Prefix {
	var list []netip.Prefix
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

// within runs the test in a network namespace of its own.
func within(t *testing.T, test func()) {
	t.Helper()
	ns := newNS(t)
	if err := ns.Do(func() error { test(); return nil }); err != nil && !t.Skipped() {
		t.Fatal(err)
	}
}

func newNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func mustOpen(t *testing.T) *Handle {
	t.Helper()
	h, err := Open(testConfig().Table)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func mustApply(t *testing.T, h *Handle, c Config) {
	t.Helper()
	if err := h.Apply(c); err != nil {
		t.Fatal(err)
	}
}

// tables returns the names of the namespace's tables.
func tables(t *testing.T) []string {
	t.Helper()
	list, err := (&nftables.Conn{}).ListTables()
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, table := range list {
		names = append(names, table.Name)
	}
	slices.Sort(names)
	return names
}

func wantTables(t *testing.T, want ...string) {
	t.Helper()
	if got := tables(t); !slices.Equal(got, want) {
		t.Fatalf("tables %q, want %q", got, want)
	}
}

// wantIntact fails unless the kernel has what c asks for.
func wantIntact(t *testing.T, h *Handle, c Config) {
	t.Helper()
	wanted := []table{captureTable(&c)}
	if c.FailClosed {
		wanted = append(wanted, guardTable(&c))
	}
	for _, table := range wanted {
		if intact, err := h.kernel.intact(table); err != nil || !intact {
			t.Fatalf("table %s is not what was applied: %v", table.name, err)
		}
	}
}

// wantOnly fails unless the kernel has the chains and sets of the table, and no others.
func wantOnly(t *testing.T, want table) {
	t.Helper()
	conn := &nftables.Conn{}
	chains, err1 := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	sets, err2 := conn.GetSets(want.library())
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	var got, names []string
	for _, c := range chains {
		if c.Table.Name == want.name {
			got = append(got, "chain "+c.Name)
		}
	}
	for _, s := range sets {
		got = append(got, "set "+s.Name)
	}
	for _, c := range want.chains {
		names = append(names, "chain "+c.name)
	}
	for _, s := range want.sets {
		names = append(names, "set "+s.name)
	}
	slices.Sort(got)
	slices.Sort(names)
	if !slices.Equal(got, names) {
		t.Errorf("table %s has %q\nwant %q", want.name, got, names)
	}
}

// TestApplyTakesAway applies configurations that need chains and sets, and those that do not.
func TestApplyTakesAway(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		dns := dnsConfig()
		dns.FailClosed = true
		dns.Always = prefixes("198.18.0.0/15")
		tcp := dnsConfig()
		tcp.DNS.UDP, tcp.FailClosed = false, true
		plain := testConfig()
		plain.FailClosed = true
		carried := dns
		carried.CapturedUDP = []PortRange{{443, 443}}
		refused := dns
		refused.RefusedUDP = carried.CapturedUDP
		for _, c := range []Config{dns, plain, dns, tcp, dns, testConfig(), dns, plain, carried, refused, carried, plain, carried, dns} {
			mustApply(t, h, c)
			wantIntact(t, h, c)
			wantOnly(t, captureTable(&c))
			if c.FailClosed {
				wantOnly(t, guardTable(&c))
			}
			if err := h.Drain(); err != nil {
				t.Fatal(err)
			}
			wantOnly(t, drainedTable(&c))
		}
	})
}

func TestLife(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		wantTables(t, "transproxy")
		if !h.Owned() {
			t.Error("the table has no owner")
		}

		c := testConfig()
		mustApply(t, h, c)
		wantIntact(t, h, c)

		c.Bypass = prefixes("203.0.113.0/24", "198.51.100.0/25", "0.0.0.0/8")
		c.Ports = []PortRange{{0, 65535}}
		c.Interfaces, c.Uplinks = nil, []string{"wan0", "wan1"}
		c.Listen = c.Listen[:1]
		c.FailClosed = true
		mustApply(t, h, c)
		wantIntact(t, h, c)
		wantTables(t, "transproxy", "transproxy_guard")

		if err := h.Drain(); err != nil {
			t.Fatal(err)
		}
		if intact, err := h.kernel.intact(drainedTable(&c)); err != nil || !intact {
			t.Errorf("the table was not drained: %v", err)
		}
		wantTables(t, "transproxy", "transproxy_guard")

		c.FailClosed = false
		mustApply(t, h, c)
		wantIntact(t, h, c)
		wantTables(t, "transproxy")

		c.FailClosed = true
		mustApply(t, h, c)
		for range 2 {
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			wantTables(t)
		}
		if err := h.Apply(c); err == nil {
			t.Error("a closed table can be applied to")
		}
	})
}

func TestApplyRefusedChangesNothing(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		c := testConfig()
		mustApply(t, h, c)
		for _, change := range []func(*Config){
			func(c *Config) { c.Table = "other" },
			func(c *Config) { c.Listen = nil },
			func(c *Config) { c.Listen = append(c.Listen, netip.MustParseAddrPort("127.0.0.2:15001")) },
			func(c *Config) { c.Listen = []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15001")} },
			func(c *Config) { c.LAN = 0x10000000 },
			func(c *Config) { c.Exempt = c.LAN },
			func(c *Config) { c.Interfaces = []string{"lo"} },
			func(c *Config) { c.Interfaces = []string{`eth0" accept`} },
			func(c *Config) { c.Uplinks = []string{"eth*"} },
			func(c *Config) { c.Clients = []netip.Prefix{{}} },
			func(c *Config) { c.Neighbours = []netip.Prefix{{}} },
			func(c *Config) { c.Always = []netip.Prefix{{}} },
			func(c *Config) { c.DNS.UDP = true },
			func(c *Config) { c.DNS = dnsConfig().DNS; c.DNS.Listen = c.DNS.Listen[:1] },
			func(c *Config) { c.DNS = dnsConfig().DNS; c.Listen = c.Listen[1:] },
			func(c *Config) { c.DNS = dnsConfig().DNS; c.DNS.Listen[1] = netip.MustParseAddrPort("[::1]:15054") },
			func(c *Config) { c.DNS = dnsConfig().DNS; c.DNS.Listen[0] = netip.MustParseAddrPort("0.0.0.0:15053") },
			func(c *Config) { c.DNS = dnsConfig().DNS; c.DNS.Listen = c.Listen },
			func(c *Config) { c.Ports = []PortRange{{90, 80}} },
			func(c *Config) { c.CapturedUDP = []PortRange{{90, 80}} },
			func(c *Config) {
				c.DNS = dnsConfig().DNS
				c.DNS.TCP, c.DNS.Listen, c.CapturedUDP = false, c.Listen, c.Ports
			},
		} {
			bad := testConfig()
			change(&bad)
			if err := h.Apply(bad); err == nil {
				t.Errorf("applied %+v", bad)
			} else if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
		}
		wantIntact(t, h, c)
	})
}

func TestSecondInstance(t *testing.T) {
	within(t, func() {
		mustOpen(t)
		_, err := Open("transproxy")
		wantInUse(t, err)
		wantInUse(t, CleanUp("transproxy"))
		wantTables(t, "transproxy")

		_, err = Open("transproxy2")
		wantInUse(t, err)
	})
}

func wantInUse(t *testing.T, err error) {
	t.Helper()
	var inUse *InUseError
	if !errors.As(err, &inUse) || err.Error() != "another instance runs in this network namespace (it holds nft table transproxy): stop it first" {
		t.Errorf("got %v", err)
	}
}

func TestForeignTables(t *testing.T) {
	for _, name := range []string{"transproxy", "transproxy_guard"} {
		t.Run(name, func(t *testing.T) {
			within(t, func() {
				conn := &nftables.Conn{}
				foreign := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
				conn.AddChain(&nftables.Chain{Table: foreign, Name: "prerouting"})
				if err := conn.Flush(); err != nil {
					t.Fatal(err)
				}
				want := "nft table inet " + name + " exists and is not ours: choose another with --nft-table, or delete it"
				if _, err := Open("transproxy"); err == nil || err.Error() != want {
					t.Errorf("got %v, want %s", err, want)
				}
				if err := CleanUp("transproxy"); err != nil {
					t.Error(err)
				}
				wantTables(t, name)
			})
		})
	}
}

func TestFlushRuleset(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		c := testConfig()
		mustApply(t, h, c)
		nft(t, "flush", "ruleset")
		wantIntact(t, h, c)
	})
}

// nft runs the command and returns what it prints; without the command the test is skipped.
func nft(t *testing.T, arguments ...string) string {
	t.Helper()
	path, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("nft is not on PATH")
	}
	output, err := exec.Command(path, arguments...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(arguments, " "), err, output)
	}
	return string(output)
}

func eventually(t *testing.T, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited too long")
		}
	}
}
