package netfilter

import (
	"os/exec"
	"strings"
	"testing"
)

// inputDrop is a firewall as people write it.
const inputDrop = `table inet filter {
	set own { type inet_service; flags interval; elements = { 22, 1000-2000 } }
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		ct state invalid drop
		iif lo accept
		meta l4proto { icmp, ipv6-icmp } accept
		udp dport 53 ip daddr 10.2.0.1 accept
		tcp dport @own accept
		%s
	}
}`

// obstacles are firewalls and marks, and what there is to be told about each.
var obstacles = []struct {
	name  string
	nft   string   // loaded first
	shell []string // then run
	code  string   // of each finding; none: the host is clean
	words []string // of the first finding
}{
	{name: "nothing"},
	{name: "policy drop", nft: rulesWith(""), code: "dropped", words: []string{"table inet filter", "chain input", "policy drop"}},
	{name: "a last reject", nft: rulesWith("reject with icmpx type admin-prohibited"), code: "dropped", words: []string{"chain input", "rule handle"}},
	{name: "a reject in another chain", nft: `table inet filter { chain other { meta nfproto ipv4 tcp dport 443 reject; }
		chain input { type filter hook input priority filter; iifname "lan0" jump other; }
}`, code: "dropped", words: []string{"in chain other"}},
	{name: "a verdict map", nft: `table ip filter { chain lan { drop; }
		chain input { type filter hook input priority filter; policy accept; iifname vmap { "lo" : accept, "lan0" : goto lan }; }
}`, code: "dropped", words: []string{"chain lan"}},
	{name: "a set without elements", nft: `table ip filter { set trusted { type ipv4_addr; }
		chain input { type filter hook input priority filter; policy drop; ip saddr @trusted accept; ct state established,related accept; }
}`, code: "dropped", words: []string{"table ip filter", "policy drop"}},
	{name: "IPv6 alone", nft: `table ip6 filter { chain input { type filter hook input priority filter; policy drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }
}`, code: "dropped", words: []string{"table ip6 filter", "IPv6"}},
	{name: "iptables-nft", shell: []string{"iptables-nft -P INPUT DROP", "iptables-nft -A INPUT -i lo -j ACCEPT", "iptables-nft -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"}, code: "dropped", words: []string{"table ip filter", "INPUT", "policy drop"}},
	{name: "iptables-nft REJECT", shell: []string{"ip6tables-nft -A INPUT -m conntrack --ctstate NEW -p tcp --dport 443 -j REJECT", "ip6tables-nft -A INPUT -m addrtype --dst-type LOCAL -j ACCEPT"}, code: "dropped", words: []string{"table ip6 filter"}},
	{name: "iptables-legacy", shell: []string{"iptables-legacy -P INPUT DROP", "iptables-legacy -A INPUT -i lo -j ACCEPT", "iptables-legacy -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"}, code: "dropped", words: []string{"iptables-legacy", "INPUT", "policy DROP"}},
	{name: "a chain of iptables-legacy", shell: []string{"ip6tables-legacy -N other", "ip6tables-legacy -A other -s fd01::/64 -p tcp --dport 443 -j REJECT", "ip6tables-legacy -A INPUT ! -i wan0 -j other"}, code: "dropped", words: []string{"ip6tables-legacy", "a rule"}},
	{name: "a mark without mask", nft: `table inet marks { chain pre { type filter hook prerouting priority mangle; iifname "lan0" meta mark set 0x1; }
}`, code: "unmarked", words: []string{"table inet marks", "chain pre", "0x1"}},
	{name: "a restored mark", nft: `table inet marks { chain pre { type filter hook prerouting priority mangle; meta mark set ct mark; }
}`, code: "unmarked"},
	{name: "iptables-nft's restored mark", shell: []string{"iptables-nft -t mangle -A PREROUTING -j CONNMARK --restore-mark"}, code: "unmarked", words: []string{"table ip mangle", "PREROUTING"}},
	{name: "another redirection", nft: `table inet others { chain pre { type nat hook prerouting priority dstnat; tcp dport { 80, 443 } redirect to :5000; }
}`, code: "translated", words: []string{"redirect"}},

	// What lets captured packets pass is not told.
	{name: "what is never routed is dropped", nft: `table inet bogons { chain pre { type filter hook prerouting priority filter; ip daddr 198.51.100.0/24 drop; ip6 daddr 2001:db8:ffff::/48 drop; }
}`},
	{name: "the interface is trusted", nft: rulesWith(`iifname "lan0" accept`)},
	{name: "the interface is trusted by its number", nft: rulesWith(`iif "lan0" accept`)},
	{name: "the mark is accepted", nft: rulesWith("meta mark & 0x01000000 == 0x01000000 accept")},
	{name: "the networks are trusted", nft: rulesWith("ip saddr { 10.1.0.0/24, 10.3.0.0/16 } accept\nip6 saddr fd00::/8 accept")},
	{name: "other destinations are accepted", nft: rulesWith("fib daddr type != local accept")},
	{name: "the ports are accepted", nft: rulesWith("tcp dport { 80, 443 } accept")},
	{name: "another interface is dropped", nft: `table inet filter { chain input { type filter hook input priority filter; iifname "wan0" drop; }
}`},
	{name: "host services are dropped", nft: `table inet filter { chain input { type filter hook input priority filter; fib daddr type local tcp dport 443 drop; }
}`},
	{name: "other bits of the mark", nft: `table inet marks { chain pre { type filter hook prerouting priority mangle; meta mark set meta mark & 0xff00ffff | 0x00040000; }
}`},
	{name: "marks of its own flows", nft: `table inet marks { chain pre { type filter hook prerouting priority mangle; ct mark 0x4 meta mark set ct mark; }
}`},
	{name: "marks ahead of ours", nft: `table inet marks { chain pre { type filter hook prerouting priority raw; meta mark set 0x1; }
}`},
	{name: "what is dropped on uplinks", shell: []string{"iptables-nft -P INPUT DROP", "iptables-nft -A INPUT ! -i wan0 -j ACCEPT"}},
	{name: "too many are dropped", nft: `table inet filter { chain bad { drop; }
		chain input { type filter hook input priority filter; limit rate over 10000/second drop; limit rate over 10000/second jump bad; }
}`},
	{name: "iptables-nft, too many are refused", shell: []string{"iptables-nft -A INPUT -p tcp --syn -m connlimit --connlimit-above 1000 -j REJECT"}},
	{name: "iptables-legacy lets pass", shell: []string{
		"iptables-legacy -P INPUT DROP", "iptables-legacy -N lan", "iptables-legacy -A lan -p udp -j DROP", "iptables-legacy -A lan -s 10.1.0.0/24 -j RETURN", "iptables-legacy -A lan -j DROP",
		"iptables-legacy -A INPUT -i lan+ -j lan", "iptables-legacy -A INPUT -m addrtype --dst-type LOCAL -j DROP", "iptables-legacy -A INPUT -p tcp -m connlimit --connlimit-above 1000 -j DROP", "iptables-legacy -A INPUT -p tcp --dport 443 -j ACCEPT",
	}},
	{name: "its own ports", nft: `table ip nat { chain pre { type nat hook prerouting priority dstnat; fib daddr type local tcp dport 443 dnat to 192.0.2.2:5000; }
}`},
}

func rulesWith(last string) string { return strings.Replace(inputDrop, "%s", last, 1) }

// TestObstacles: what is told breaks flows, and its cure cures it; what breaks none is not told.
func TestObstacles(t *testing.T) {
	for _, test := range obstacles {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting for packets that were dropped
			l := newLab(t)
			l.capture()
			shell := func(line string) {
				t.Helper()
				if output, err := l.shell(line); err != nil {
					t.Fatalf("%s: %v: %s", line, err, output)
				}
			}
			if len(test.shell) > 0 {
				name, _, _ := strings.Cut(test.shell[0], " ")
				if _, err := exec.LookPath(name); err != nil {
					t.Skip(name + " is not on PATH")
				}
			}
			if test.nft != "" {
				if _, err := exec.LookPath("nft"); err != nil {
					t.Skip("nft is not on PATH")
				}
				// Older versions want a new line before the end of a chain.
				shell("nft -f - <<'EOF'\n" + strings.NewReplacer("; }", ";\n}", "} }", "}\n}").Replace(test.nft) + "\nEOF")
			}
			for _, line := range test.shell {
				shell(line)
			}
			find := func() (found []Obstacle) {
				t.Helper()
				if err := l.gateway.Do(func() (err error) {
					found, err = Obstacles(testConfig(), []Way{{Name: "lan0", Networks: prefixes("10.1.0.0/24", "fd01::/64")}})
					return err
				}); err != nil {
					t.Fatal(err)
				}
				return found
			}
			carries := func() bool {
				for _, address := range []string{"192.0.2.2:443", "[2001:db8::2]:443"} {
					if _, got := l.dial(l.client, address); got != "captured" {
						return false
					}
				}
				return true
			}
			found := find()
			mustApply(t, l.open(), testConfig())
			if carries() != (test.code == "") {
				t.Errorf("flows are carried: %v", test.code != "")
			}
			if (len(found) == 0) != (test.code == "") {
				t.Fatalf("found %+v, want %q", found, test.code)
			}
			for _, o := range found {
				if o.Code != test.code {
					t.Errorf("found %+v, want %q", o, test.code)
				}
			}
			for _, word := range test.words {
				if !strings.Contains(found[0].Found, word) {
					t.Errorf("%q does not say %q", found[0].Found, word)
				}
			}
			for _, o := range found {
				t.Logf("%s\n%s", o.Found, o.Cure)
				shell(o.Cure)
			}
			if !carries() {
				t.Error("after the cure flows are not carried")
			}
			if left := find(); len(left) > 0 {
				t.Errorf("after the cure there is still %+v", left)
			}
		})
	}
}

// shell runs a line on the gateway.
func (l *lab) shell(line string) (string, error) {
	command := exec.Command("sh", "-c", line)
	var output []byte
	err := l.gateway.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	return string(output), err
}

func TestRichRules(t *testing.T) {
	c := dnsConfig()
	c.Listen, c.DNS.Listen = c.Listen[:1], c.DNS.Listen[:1]
	c.CapturedUDP = []PortRange{{443, 443}, {3478, 3497}}
	got := strings.Join(c.RichRules(Way{Name: "lan0", Networks: prefixes("10.1.0.0/24")}), "\n")
	c.Clients = prefixes("10.1.0.0/24", "2001:db8:1::/64")
	const of = `rule family="ipv4" source address="10.1.0.0/24" destination not address="10.1.0.0/24" `
	want := of + `protocol value="tcp" accept` + "\n" + of + `port port="53" protocol="udp" accept` + "\n" +
		of + `port port="443" protocol="udp" accept` + "\n" + of + `port port="3478-3497" protocol="udp" accept`
	if got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}
