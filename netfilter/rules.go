package netfilter

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Names of chains.
const (
	preroutingChain = "prerouting"
	interceptChain  = "intercept"
	forwardChain    = "forward"
)

func preroutingHook() *hook {
	return &hook{"type filter hook prerouting priority mangle", nftables.ChainHookPrerouting, nftables.ChainPriorityMangle}
}

func forwardHook() *hook {
	return &hook{"type filter hook forward priority filter", nftables.ChainHookForward, nftables.ChainPriorityFilter}
}

// captureTable captures flows. Rules that are cheap, or that decide about most packets, come first: a packet of a captured
// flow gets as far as the second.
func captureTable(c *Config) table {
	rules := established(c)
	rules = append(rules, rule{"other protocols are left to the kernel", []clause{notTCP(), leave()}})
	if c.FailClosed {
		rules = append(rules, rule{
			"judged by a living program: the guard table lets pass what no rule below captures",
			[]clause{setMark(c.Exempt, c.Mask)},
		})
	}
	rules = append(rules, familyRules(c)...)
	rules = append(rules,
		rule{"answers of connections that others opened to clients", []clause{reply(), leave()}},
		rule{"packets that belong to no connection", []clause{inState("invalid", expr.CtStateBitINVALID), leave()}},
		rule{
			"a flow begins with a SYN: not with what passes here of one that began elsewhere",
			[]clause{inState("new", expr.CtStateBitNEW), notOpening(), leave()},
		},
	)
	rules = append(rules, flowRules(c)...)
	rules = append(rules,
		rule{"this host's own addresses, broadcast and multicast", []clause{destinationKindIn(kindsSet), leave()}},
		rule{"everything else is captured", []clause{jump(interceptChain)}},
	)
	return table{name: c.Table, sets: captureSets(c), chains: []chain{
		{name: interceptChain, rules: interceptRules(c)},
		{name: preroutingChain, hook: preroutingHook(), rules: rules},
	}}
}

// drainedTable captures no new flow.
func drainedTable(c *Config) table {
	return table{name: c.Table, sets: captureSets(c), chains: []chain{
		{name: interceptChain},
		{name: preroutingChain, hook: preroutingHook(), rules: established(c)},
	}}
}

// guardTable refuses to forward flows that are to be captured. While a program lives, its rules come first, so that the
// guard sees only packets with the mark Exempt and those of flows that it leaves to the kernel itself.
func guardTable(c *Config) table {
	rules := []rule{
		{"judged by the living program", []clause{marked(c.Exempt, c.Mask), leave()}},
		incomingRule(c),
		{"other protocols", []clause{notTCP(), leave()}},
	}
	rules = append(rules, familyRules(c)...)
	rules = append(rules, rule{"answers of connections that others opened to clients", []clause{reply(), leave()}})
	rules = append(rules, flowRules(c)...)
	rules = append(rules, rule{"to be captured, and nobody does: begun before or not", []clause{tcp(), refuse()}})
	return table{name: guardName(c.Table), sets: flowSets(c), chains: []chain{
		{name: forwardChain, hook: forwardHook(), rules: rules},
	}}
}

// established are the rules for packets of flows that were captured. ICMP errors are theirs, too: without them a sender
// never learns that its packets are too big. UDP is not, where a transparent socket may be there for answers only.
func established(c *Config) []rule {
	return []rule{
		incomingRule(c),
		{
			"a captured flow: a transparent socket has it, or the packet that an ICMP error is about",
			[]clause{notUDP(), ofTransparentSocket(), setMark(c.LAN, c.Mask), accept()},
		},
	}
}

func incomingRule(c *Config) rule {
	if len(c.Interfaces) > 0 {
		return rule{"only the interfaces that were named", []clause{incomingNotIn(interfacesSet), leave()}}
	}
	return rule{"all interfaces but the loopback and uplinks", []clause{incomingIn(interfacesSet), leave()}}
}

// familyRules let a family pass for which there is no listener.
func familyRules(c *Config) []rule {
	var rules []rule
	for _, f := range families() {
		if _, ok := f.listener(c); ok && len(c.Listen) == 1 {
			rules = append(rules, rule{"there is a listener for " + f.proto + " only", []clause{f.isNot(), leave()}})
		}
	}
	return rules
}

// flowRules let pass what is not to be captured by its port and addresses.
func flowRules(c *Config) []rule {
	rules := []rule{{"ports that are not captured", []clause{portNotIn(portsSet), leave()}}}
	for _, f := range families() {
		if _, ok := f.listener(c); ok {
			rules = append(rules,
				rule{"sources that are not captured", []clause{f.sourceNotIn(clientsSet + f.suffix), leave()}},
				rule{"destinations that are left to the kernel", []clause{f.destinationIn(bypassSet + f.suffix), leave()}})
		}
	}
	return rules
}

// interceptRules mark a packet only after it was assigned to a listener: a marked one without a listener would be delivered
// to this host all the same, and on IPv6 reach whatever service has that port.
func interceptRules(c *Config) []rule {
	var rules []rule
	for _, f := range families() {
		if listener, ok := f.listener(c); ok {
			rules = append(rules, rule{
				"to the transparent listener for " + f.proto,
				[]clause{f.is(), tcp(), f.deliver(listener), setMark(c.LAN, c.Mask), accept()},
			})
		}
	}
	if c.FailClosed {
		rules = append(rules, rule{"nobody listens", []clause{tcp(), refuse()}})
	}
	return rules
}

// listener returns the listener of the family.
func (f family) listener(c *Config) (netip.AddrPort, bool) {
	for _, listener := range c.Listen {
		if f.has(listener.Addr()) {
			return listener, true
		}
	}
	return netip.AddrPort{}, false
}
