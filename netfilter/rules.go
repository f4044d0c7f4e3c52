package netfilter

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Names of chains.
const (
	preroutingChain = "prerouting"
	interceptChain  = "intercept"
	dnsChain        = "dns"
	alwaysChain     = "always"
	answersChain    = "output_raw"
	forwardChain    = "forward"
)

func preroutingHook() *hook {
	return &hook{
		text:   "type filter hook prerouting priority mangle",
		number: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityMangle,
	}
}

func forwardHook() *hook {
	return &hook{
		text:   "type filter hook forward priority filter",
		number: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter,
	}
}

// captureTable captures flows. Rules that are cheap, or that decide about most packets, come first: a packet of a captured
// flow gets as far as the second.
func captureTable(c *Config) table {
	rules := established(c)
	rules = append(rules, rule{"other protocols are left to the kernel", []clause{otherProtocol(c), leave()}})
	if c.FailClosed {
		rules = append(rules, judged(c))
	}
	rules = append(rules, familyRules(c)...)
	rules = append(rules, rule{"answers of connections that others opened to clients", []clause{reply(), leave()}})
	if !c.FailClosed {
		// What is left of a captured flow that was cut looks the same: who wants nothing to pass has the listener answer it,
		// with a reset.
		rules = append(rules,
			strays(),
			rule{
				"a flow begins with a SYN: not with what passes here of one that began elsewhere",
				[]clause{inState("new", expr.CtStateBitNEW), notOpening(), leave()},
			})
	}
	rules = append(rules, flowRules(c, overrideRules(c))...)
	rules = append(rules, ownRule())
	rules = append(rules, udpRules(c)...)
	rules = append(rules, rule{"everything else is captured", []clause{jump(interceptChain)}})

	chains := []chain{{name: interceptChain, rules: interceptRules(c)}}
	if c.DNS.captured() {
		chains = append(chains, chain{name: dnsChain, rules: dnsRules(c)})
	}
	if len(c.Always) > 0 {
		chains = append(chains, chain{name: alwaysChain, rules: alwaysRules(c)})
	}
	if c.Output.captured() {
		chains = append(chains, c.own())
	}
	chains = append(chains, chain{name: preroutingChain, hook: preroutingHook(), rules: rules})
	if c.DNS.UDP || c.capturesUDP() {
		chains = append(chains, answersOf(c))
	}
	if c.Output.captured() {
		chains = append(chains, c.output())
	}
	chains = append(chains, routerChains(c)...)
	// Last, as the kernel takes the hooks of a table away in this order when its owner is killed.
	chains = append(chains, c.input())
	return table{name: c.Table, sets: captureSets(c), chains: chains}
}

// drainedTable captures no new flow and no query; those under way are answered.
func drainedTable(c *Config) table {
	drained := captureTable(c)
	for i := range drained.chains {
		switch chain := &drained.chains[i]; chain.name {
		case preroutingChain:
			chain.rules = established(c)
		case inputChain, answersChain, ownChain, masqueradeChain, clampChain:
		case outputChain:
			*chain = c.drainedOutput()
		default:
			chain.rules = nil
		}
	}
	return drained
}

// strays lets pass what connection tracking cannot make sense of.
func strays() rule {
	return rule{"packets that belong to no connection", []clause{inState("invalid", expr.CtStateBitINVALID), leave()}}
}

// judged tells the guard that a living program has looked at a packet.
func judged(c *Config) rule {
	return rule{
		"judged by a living program: the guard table lets pass what no rule below captures",
		[]clause{setMark(c.Exempt, c.Mask)},
	}
}

// guardTable refuses to forward flows that are to be captured. While a program lives, its rules come first, so that the
// guard sees only packets with the mark Exempt and those of flows that it leaves to the kernel itself.
func guardTable(c *Config) table {
	if c.capturesUDP() {
		refused := *c
		refused.RefusedUDP, refused.CapturedUDP = slices.Concat(c.RefusedUDP, c.CapturedUDP), nil
		c = &refused
	}
	published := chain{name: preroutingChain, hook: guardPreroutingHook(), rules: []rule{
		incomingRule(c),
		{"other protocols", []clause{otherProtocol(c), leave()}},
		{
			"to this host's own addresses: not to be captured, even if this host then sends it on to a container",
			[]clause{destinationKindIn(kindsSet), setMark(c.Exempt, c.Mask)},
		},
	}}
	rules := []rule{
		{"judged by the living program, or to this host", []clause{marked(c.Exempt, c.Mask), leave()}},
		incomingRule(c),
		{"other protocols", []clause{otherProtocol(c), leave()}},
	}
	rules = append(rules, familyRules(c)...)
	rules = append(rules, rule{"answers of connections that others opened to clients", []clause{reply(), leave()}})
	rules = append(rules, flowRules(c, guardRules(c))...)
	rules = append(rules, udpRules(c)...)
	rules = append(rules, rule{"to be captured, and nobody does: begun before or not", []clause{tcp(), refuse()}})
	chains := []chain{published, {name: forwardChain, hook: forwardHook(), rules: rules}}
	if c.Output.captured() {
		chains = append(chains, c.guardOutput())
	}
	sets := slices.Concat(flowSets(c), []set{kinds()}, udpSets(c), overrideSets(c), outputSets(c))
	return table{name: guardName(c.Table), sets: sets, chains: chains}
}

// established are the rules for packets of flows that were captured. ICMP errors are theirs, too: without them a sender
// never learns that its packets are too big. UDP is not, where a transparent socket may be there for answers only.
func established(c *Config) []rule {
	var rules []rule
	if c.Output.captured() {
		rules = append(rules, c.ownIncoming())
	}
	rules = append(rules, incomingRule(c))
	if c.Steered {
		// Not by its socket: the look-up of this would find the listener for any packet, as that of the delivery does.
		return append(rules,
			rule{"a captured flow", []clause{notOpening(), connectionMarked(c.LAN, c.Mask), setMark(c.LAN, c.Mask), accept()}},
			rule{"an ICMP error about one", []clause{notTCP(), notUDP(), connectionMarked(c.LAN, c.Mask), setMark(c.LAN, c.Mask), accept()}})
	}
	return append(rules, rule{
		"a captured flow: a transparent socket has it, or the packet that an ICMP error is about",
		[]clause{notUDP(), ofTransparentSocket(), setMark(c.LAN, c.Mask), accept()},
	})
}

// hand gives a packet to a listener, or leaves that to who assigns, and then does the rest.
func (c *Config) hand(f family, listener netip.AddrPort, rest ...clause) []clause {
	if c.Steered {
		return rest
	}
	return append([]clause{f.deliver(listener)}, rest...)
}

// remember lets established know the connection. It is a rule of its own, because it does not match packets that are not tracked,
// each of which is judged anew.
func (c *Config) remember() []rule {
	if !c.Steered {
		return nil
	}
	return []rule{{"so that its next packets are known", []clause{tcp(), setConnectionMark(c.LAN, c.Mask)}}}
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
		if _, ok := f.listener(c.Listen); ok && len(c.Listen) == 1 {
			rules = append(rules, rule{"there is a listener for " + f.proto + " only", []clause{f.isNot(), leave()}})
		}
	}
	return rules
}

// overrides reports whether anything is captured whatever Ports and Bypass say.
func (c *Config) overrides() bool { return c.DNS.captured() || len(c.Always) > 0 }

// judgesUDP reports whether any UDP but queries is not left to the kernel because of its port.
func (c *Config) judgesUDP() bool { return len(c.RefusedUDP)+len(c.DroppedUDP) > 0 || c.capturesUDP() }

// capturesUDP reports whether any UDP but queries is captured.
func (c *Config) capturesUDP() bool { return len(c.CapturedUDP) > 0 }

// otherProtocol matches what the rules do not judge.
func otherProtocol(c *Config) clause {
	if c.DNS.UDP || len(c.Always) > 0 || c.judgesUDP() {
		return protocolNotIn(protocolsSet)
	}
	return notTCP()
}

// ownRule lets pass what is for this host. Its own resolver answers at its own addresses.
func ownRule() rule {
	return rule{"this host's own addresses, broadcast and multicast", []clause{destinationKindIn(kindsSet), leave()}}
}

// flowRules let pass what is not to be captured by its port and addresses. Between them are the overrides: what these end
// is captured whatever Bypass says.
func flowRules(c *Config, overrides []rule) []rule { return destinationRules(c, overrides, true) }

// destinationRules are flowRules, with a look at the sources or without.
func destinationRules(c *Config, overrides []rule, sources bool) []rule {
	rules := portRules(c)
	var bypass []rule
	for _, f := range families() {
		if _, ok := f.listener(c.Listen); !ok {
			continue
		}
		if sources {
			rules = append(rules, rule{"sources that are not captured", []clause{f.sourceNotIn(clientsSet + f.suffix), leave()}})
		}
		left := rule{"destinations that are left to the kernel", []clause{f.destinationIn(bypassSet + f.suffix), leave()}}
		if !c.overrides() {
			rules = append(rules, left)
			continue
		}
		rules = append(rules, rule{"networks of the capturing interfaces", []clause{f.destinationIn(neighboursSet + f.suffix), leave()}})
		bypass = append(bypass, left)
	}
	return slices.Concat(rules, overrides, bypass)
}

// portRules let pass what is not to be captured by its port. No later rule takes UDP that is no DNS for anything else, but
// most packets of it would meet all of them.
func portRules(c *Config) []rule {
	const tcpComment = "ports that are not captured"
	otherUDP, udpComment := udp(), "UDP that is no DNS"
	switch {
	case c.judgesUDP():
		otherUDP, udpComment = udpPortNotIn(udpPortsSet), "UDP ports that are left to the kernel"
	case c.DNS.UDP:
		otherUDP = udpPortNot(dnsPort)
	}
	var rules []rule
	if len(c.Always) > 0 {
		for _, f := range families() {
			if _, ok := f.listener(c.Listen); ok {
				not := f.destinationNotIn(alwaysSet + f.suffix)
				rules = append(rules,
					rule{tcpComment, []clause{portNotIn(portsSet), not, leave()}},
					rule{udpComment, []clause{otherUDP, not, leave()}})
			}
		}
		return rules
	}
	rules = append(rules, rule{tcpComment, []clause{portNotIn(portsSet), leave()}})
	if c.DNS.UDP || c.judgesUDP() {
		rules = append(rules, rule{udpComment, []clause{otherUDP, leave()}})
	}
	return rules
}

// udpRules end the UDP that is not to pass.
func udpRules(c *Config) []rule {
	if !c.judgesUDP() {
		return nil
	}
	return []rule{
		{"UDP ports that are refused: who is told so turns to TCP at once", []clause{udpPortIn(refusedSet), unreachable()}},
		{"UDP ports that are dropped", []clause{udpPortIn(droppedSet), discard()}},
	}
}

// overrideRules capture what is captured whatever Ports and Bypass say. Nothing comes back from their chains: what has no
// listener there is no flow like any other.
func overrideRules(c *Config) []rule {
	var rules []rule
	for _, t := range c.DNS.transports() {
		rules = append(rules, rule{"DNS over " + t.name + ", whatever server is asked", []clause{t.query, follow(dnsChain)}})
	}
	if len(c.Always) > 0 {
		for _, f := range families() {
			if _, ok := f.listener(c.Listen); ok {
				rules = append(rules, rule{
					"destinations that are always captured",
					[]clause{f.destinationIn(alwaysSet + f.suffix), follow(alwaysChain)},
				})
			}
		}
	}
	return rules
}

// alwaysRules decide about the destinations that are always captured.
func alwaysRules(c *Config) []rule {
	rules := []rule{ownRule()}
	if c.capturesUDP() {
		rules = append(rules, rule{"UDP ports that are captured", []clause{udpPortIn(capturedSet), follow(interceptChain)}})
	}
	return append(rules,
		rule{otherUDPComment(c), []clause{udp(), unreachable()}},
		rule{"whatever port it is", []clause{follow(interceptChain)}})
}

// otherUDPComment says why UDP to destinations that are always captured is refused.
func otherUDPComment(c *Config) string {
	if c.capturesUDP() {
		return "no other UDP can be carried: who is told so turns to TCP"
	}
	return "only TCP can be carried: who is told so turns to it"
}

// guardRules refuse what overrideRules capture.
func guardRules(c *Config) []rule {
	var rules []rule
	for _, t := range c.DNS.transports() {
		rules = append(rules, rule{"DNS over " + t.name + ", which nobody answers", []clause{t.query, t.refuse}})
	}
	if len(c.Always) > 0 {
		const comment = "destinations that are always captured, and nobody does"
		for _, f := range families() {
			if _, ok := f.listener(c.Listen); ok {
				always := f.destinationIn(alwaysSet + f.suffix)
				rules = append(rules,
					rule{comment, []clause{always, udp(), unreachable()}},
					rule{comment, []clause{always, tcp(), refuse()}})
			}
		}
	}
	return rules
}

// interceptRules mark a packet only after it was assigned to a listener: a marked one without a listener would be delivered
// to this host all the same, and on IPv6 reach whatever service has that port.
func interceptRules(c *Config) []rule {
	rules := c.remember()
	for _, f := range families() {
		if listener, ok := f.listener(c.Listen); ok {
			rules = append(rules, rule{
				"to the transparent listener for " + f.proto,
				append([]clause{f.is(), tcp()}, c.hand(f, listener, setMark(c.LAN, c.Mask), accept())...),
			})
			if c.capturesUDP() {
				rules = append(rules, rule{
					"to the transparent listener for UDP over " + f.proto,
					append([]clause{f.is(), udp()}, c.hand(f, listener, setMark(c.LAN, c.Mask), accept())...),
				})
			}
		}
	}
	if c.FailClosed {
		rules = append(rules, rule{"nobody listens", []clause{tcp(), refuse()}})
		if c.capturesUDP() {
			rules = append(rules, rule{"nobody listens", []clause{udp(), prohibit()}})
		}
	}
	return rules
}

// listener returns the one of the family.
func (f family) listener(listeners []netip.AddrPort) (netip.AddrPort, bool) {
	for _, listener := range listeners {
		if f.has(listener.Addr()) {
			return listener, true
		}
	}
	return netip.AddrPort{}, false
}
