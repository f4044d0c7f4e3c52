package routing

import (
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const goldenIPv4 = `# In a table of our own every address is this host's, so that captured packets are delivered here.
ip route replace local default dev lo table 4219 proto 219
# With src_valid_mark=1 the kernel looks up the way back to a client with the mark of the client's packet:
# that look-up must not end in our table, or the packet is dropped as a martian.
ip rule add pref 4218 iif lo fwmark 0x1000000/0x7000000 goto 4220 protocol 219
# Captured packets of clients, whichever interface they come in by.
ip rule add pref 4219 fwmark 0x1000000/0x7000000 lookup 4219 protocol 219
# Captured packets of this host's own programs.
ip rule add pref 4220 iif lo fwmark 0x2000000/0x7000000 lookup 4219 protocol 219
`

func TestText(t *testing.T) {
	goldenIPv6 := strings.ReplaceAll(goldenIPv4, "\nip ", "\nip -6 ")
	c := testConfig
	for _, test := range []struct {
		ipv4, ipv6 bool
		want       string
	}{
		{true, true, goldenIPv4 + goldenIPv6},
		{true, false, goldenIPv4},
		{false, true, goldenIPv6},
		{false, false, ""},
	} {
		c.IPv4, c.IPv6 = test.ipv4, test.ipv6
		if got := Text(c); got != test.want {
			t.Errorf("IPv4 %t, IPv6 %t:\n%s\nwant:\n%s", test.ipv4, test.ipv6, got, test.want)
		}
	}
}

// TestTextLoads gives the commands to the real program, and compares with what Apply makes.
func TestTextLoads(t *testing.T) {
	path, err := exec.LookPath("ip")
	if err != nil {
		t.Skip("needs the program ip of iproute2:", err)
	}
	namespace(t)
	run := func(input string, arguments ...string) string {
		t.Helper()
		command := exec.Command(path, arguments...) // in the namespace of this thread
		command.Stdin = strings.NewReader(input)
		output, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("ip %q: %v\n%s", arguments, err, output)
		}
		return string(output)
	}
	list := func() string {
		t.Helper()
		return run("", "rule") + run("", "-6", "rule") + run("", "route", "show", "table", "all") +
			run("", "-6", "route", "show", "table", "all")
	}
	before := list()
	h := applied(t, testConfig)
	want := list()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if after := list(); after != before {
		t.Errorf("before:\n%s\nafter close:\n%s", before, after)
	}

	// A batch is of one family, and has no program names.
	var batches [2]strings.Builder
	for line := range strings.Lines(Text(testConfig)) {
		if rest, ok := strings.CutPrefix(line, "ip -6 "); ok {
			batches[1].WriteString(rest)
		} else {
			batches[0].WriteString(strings.TrimPrefix(line, "ip "))
		}
	}
	run(batches[0].String(), "-batch", "-")
	run(batches[1].String(), "-6", "-batch", "-")
	if got := list(); got != want {
		t.Errorf("loaded by ip:\n%s\napplied:\n%s", got, want)
	}

	// To the program they are the same, too: nothing is missing, nothing left over.
	h = open(t)
	missing, leftover, err := h.compare(testConfig)
	if err != nil || len(missing)+len(leftover) > 0 {
		t.Errorf("missing %v, left over %v, %v", missing, leftover, err)
	}
	if err := h.Apply(testConfig); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if after := list(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestRuleText(t *testing.T) {
	mask, whole := uint32(0xff), uint32(0xffffffff)
	tests := map[string]func(*netlink.Rule){
		"pref 7 lookup main":                         func(r *netlink.Rule) { r.Table = unix.RT_TABLE_MAIN },
		"pref 7 lookup local":                        func(r *netlink.Rule) { r.Table = unix.RT_TABLE_LOCAL },
		"pref 7 not fwmark 0xca6c lookup 51820":      func(r *netlink.Rule) { r.Invert, r.Mark, r.Mask, r.Table = true, 0xca6c, &whole, 51820 },
		"pref 7 fwmark 0x1/0xff lookup 9":            func(r *netlink.Rule) { r.Mark, r.Mask, r.Table = 1, &mask, 9 },
		"pref 7 lookup main suppress_prefixlength 0": func(r *netlink.Rule) { r.Table, r.SuppressPrefixlen = unix.RT_TABLE_MAIN, 0 },
		"pref 7 lookup main suppress_ifgroup 3":      func(r *netlink.Rule) { r.Table, r.SuppressIfgroup = unix.RT_TABLE_MAIN, 3 },
		"pref 7 from 192.0.2.0/24 to 10.0.0.0/8 iif a oif b goto 90 protocol 3": func(r *netlink.Rule) {
			r.Src, r.Dst = &net.IPNet{IP: net.IP{192, 0, 2, 0}, Mask: net.CIDRMask(24, 32)}, &net.IPNet{IP: net.IP{10, 0, 0, 0}, Mask: net.CIDRMask(8, 32)}
			r.IifName, r.OifName, r.Goto, r.Protocol = "a", "b", 90, 3
		},
		"pref 7 tos 0x10 uidrange 0-0 ipproto 6 sport 1-2 dport 3-4 lookup 9": func(r *netlink.Rule) {
			r.Tos, r.UIDRange, r.IPProto = 0x10, netlink.NewRuleUIDRange(0, 0), 6
			r.Sport, r.Dport, r.Table = netlink.NewRulePortRange(1, 2), netlink.NewRulePortRange(3, 4), 9
		},
	}
	for want, change := range tests {
		t.Run(want, func(t *testing.T) {
			namespace(t)
			r := rule(unix.AF_INET, change)
			r.Priority = 7
			if got := ruleText(r); got != want {
				t.Errorf("got %q", got)
			}
			// The kernel gives back what it was given.
			addRule(t, r)
			rules, err := netlink.RuleList(unix.AF_INET)
			if err != nil || len(rules) < 2 {
				t.Fatal(rules, err)
			}
			if got := ruleText(&rules[1]); !strings.HasPrefix(got, want) {
				t.Errorf("listed as %q", got)
			}
		})
	}
}
