package netfilter

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// Output says what of this host's own programs is captured. The zero value leaves them alone.
type Output struct {
	// Mark is the mark, within [Config].Mask, of packets that are captured. Policy routing sends them through the loopback
	// interface, where they are delivered like those of clients.
	Mark uint32
	// Users and Groups are those whose programs are left alone, by number.
	Users, Groups []uint32
	// Cgroups are the same for all that runs in them or below.
	Cgroups []Cgroup
}

// Cgroup is a control group of version 2 (cgroups(7)).
type Cgroup struct {
	Path string // from the root of the hierarchy, without a slash at its beginning
	ID   uint64 // the inode of its directory
}

// captured reports whether any program of this host is.
func (o Output) captured() bool { return o.Mark != 0 }

const (
	outputChain = "output"
	ownChain    = "own"

	usersSet  = "users"
	groupsSet = "groups"
)

func outputHook() *hook {
	return &hook{
		text: "type route hook output priority mangle", kind: nftables.ChainTypeRoute,
		number: nftables.ChainHookOutput, priority: nftables.ChainPriorityMangle,
	}
}

// guardOutputHook lies behind the capturing chain and, as that does, ahead of the translation of destinations (NF_IP_PRI_MANGLE
// is -150, NF_IP_PRI_NAT_DST -100 in linux/netfilter_ipv4.h): what is for this host itself is seen as such.
func guardOutputHook() *hook {
	return &hook{
		text:   "type filter hook output priority mangle + 10",
		number: nftables.ChainHookOutput, priority: nftables.ChainPriorityRef(*nftables.ChainPriorityMangle + 10),
	}
}

// outputSets are the sets that both tables have for this host's own programs.
func outputSets(c *Config) []set {
	if !c.Output.captured() {
		return nil
	}
	return []set{
		{
			name: usersSet, kind: nftables.TypeUID,
			comment:  "users of this host whose programs are left alone",
			elements: numberElements(c.Output.Users),
		},
		{
			name: groupsSet, kind: nftables.TypeGID,
			comment:  "groups of this host whose programs are left alone",
			elements: numberElements(c.Output.Groups),
		},
	}
}

func numberElements(numbers []uint32) []element {
	sorted := slices.Clone(numbers)
	slices.Sort(sorted)
	var elements []element
	for _, number := range slices.Compact(sorted) {
		elements = append(elements, element{fmt.Sprint(number), []nftables.SetElement{{Key: native(number)}}})
	}
	return elements
}

// output marks what this host's own programs send, so that it is routed to the loopback interface.
func (c *Config) output() chain {
	rules := []rule{
		{"the program's own sockets", []clause{marked(c.Exempt, c.Mask), leave()}},
		{"other protocols are left to the kernel", []clause{otherProtocol(c), leave()}},
	}
	if c.FailClosed {
		rules = append(rules, judged(c))
	}
	rules = append(rules, c.ownFlowRules(c.ownOverrides())...)
	rules = append(rules, rule{"broadcast and multicast", []clause{destinationKindIn(kindsSet), leave()}})
	rules = append(rules, udpRules(c)...)
	rules = append(rules, rule{"everything else is captured", []clause{setMark(c.Output.Mark, c.Mask)}})
	return chain{name: outputChain, hook: outputHook(), rules: rules}
}

// drainedOutput marks what belongs to flows that have begun.
func (c *Config) drainedOutput() chain {
	drained := c.output()
	drained.rules = slices.Insert(drained.rules, 1, rule{
		"flows that begin now are left to the kernel", []clause{inState("new", expr.CtStateBitNEW), leave()},
	})
	return drained
}

// ownFlowRules let pass what is not to be captured of this host's own programs.
func (c *Config) ownFlowRules(overrides []rule) []rule {
	rules := familyRules(c)
	rules = append(rules,
		rule{"what does not leave this host", []clause{outgoingIs(loopback), leave()}},
		rule{"answers of connections that others opened", []clause{reply(), leave()}})
	if !c.FailClosed {
		rules = append(rules, strays()) // what is left of a captured flow that was cut is among them
	}
	rules = append(rules,
		rule{"users whose programs are left alone", []clause{ownerIn("skuid", expr.MetaKeySKUID, usersSet), leave()}},
		rule{"groups whose programs are left alone", []clause{ownerIn("skgid", expr.MetaKeySKGID, groupsSet), leave()}},
	)
	for _, group := range c.Output.Cgroups {
		rules = append(rules, rule{"a control group whose programs are left alone", []clause{inCgroup(group), leave()}})
	}
	return append(rules, destinationRules(c, overrides, false)...)
}

// ownOverrides mark what is captured whatever Ports and Bypass say.
func (c *Config) ownOverrides() []rule {
	var rules []rule
	for _, t := range c.DNS.transports() {
		rules = append(rules, rule{
			"DNS over " + t.name + ", whatever server is asked",
			[]clause{t.query, setMark(c.Output.Mark, c.Mask), leave()},
		})
	}
	if len(c.Always) == 0 {
		return rules
	}
	for _, f := range families() {
		if _, ok := f.listener(c.Listen); ok {
			always := f.destinationIn(alwaysSet + f.suffix)
			if c.capturesUDP() {
				rules = append(rules, rule{
					"UDP ports that are captured", []clause{always, udpPortIn(capturedSet), setMark(c.Output.Mark, c.Mask), leave()},
				})
			}
			rules = append(rules,
				rule{otherUDPComment(c), []clause{always, udp(), unreachable()}},
				rule{"destinations that are always captured", []clause{always, setMark(c.Output.Mark, c.Mask), leave()}})
		}
	}
	return rules
}

// ownIncoming finds what output has sent through the loopback interface.
func (c *Config) ownIncoming() rule {
	return rule{"of this host's own programs", []clause{incomingIs(loopback), marked(c.Output.Mark, c.Mask), follow(ownChain)}}
}

// own delivers what output has marked. The mark stays: it is what routes here. Without a listener a packet would be
// delivered to whatever service of this host has the port.
func (c *Config) own() chain {
	var rules []rule
	for _, t := range c.DNS.transports() {
		for _, f := range families() {
			if listener, ok := f.listener(c.DNS.Listen); ok {
				rules = append(rules, rule{
					"to the transparent listener for DNS over " + t.name + " and " + f.proto,
					append([]clause{f.is(), t.query}, c.hand(f, listener, accept())...),
				})
			}
		}
	}
	for _, f := range families() {
		if listener, ok := f.listener(c.Listen); ok {
			rules = append(rules, rule{
				"to the transparent listener for " + f.proto,
				append([]clause{f.is(), tcp()}, c.hand(f, listener, accept())...),
			})
			if c.capturesUDP() {
				rules = append(rules, rule{
					"to the transparent listener for UDP over " + f.proto,
					append([]clause{f.is(), udp()}, c.hand(f, listener, accept())...),
				})
			}
		}
	}
	return chain{name: ownChain, rules: append(rules,
		rule{"nobody listens", []clause{tcp(), refuse()}},
		rule{"nobody listens", []clause{udp(), prohibit()}})}
}

// guardOutput refuses what is to be captured of this host's own programs. While a program lives it sees only packets with
// one of its marks, but for those that are not to be captured.
func (c *Config) guardOutput() chain {
	rules := []rule{
		{"judged by the living program, or its own", []clause{marked(c.Exempt, c.Mask), leave()}},
		{"captured by the living program", []clause{marked(c.Output.Mark, c.Mask), leave()}},
		{"other protocols", []clause{otherProtocol(c), leave()}},
	}
	rules = append(rules, c.ownFlowRules(guardRules(c))...)
	rules = append(rules, rule{"broadcast and multicast", []clause{destinationKindIn(kindsSet), leave()}})
	rules = append(rules, udpRules(c)...)
	rules = append(rules, rule{"to be captured, and nobody does: begun before or not", []clause{tcp(), refuse()}})
	return chain{name: outputChain, hook: guardOutputHook(), rules: rules}
}

func interfaceKey(name string) []byte {
	key := make([]byte, nftables.TypeIFName.Bytes)
	copy(key, name)
	return key
}

func incomingIs(name string) clause {
	return clause{fmt.Sprintf("iifname %q", name), []expr.Any{meta(expr.MetaKeyIIFNAME), equal(interfaceKey(name))}}
}

func outgoingIs(name string) clause {
	return clause{fmt.Sprintf("oifname %q", name), []expr.Any{meta(expr.MetaKeyOIFNAME), equal(interfaceKey(name))}}
}

// ownerIn matches by who owns the socket that sends.
func ownerIn(name string, key expr.MetaKey, set string) clause {
	return clause{"meta " + name + " @" + set, []expr.Any{meta(key), lookup(set, false)}}
}

// inCgroup matches what a socket sends that was made in the group or below.
func inCgroup(group Cgroup) clause {
	level := uint32(1)
	for _, c := range group.Path {
		if c == '/' {
			level++
		}
	}
	return clause{fmt.Sprintf("socket cgroupv2 level %d %q", level, group.Path), []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: level, Register: register},
		equal(binaryutil.NativeEndian.PutUint64(group.ID)),
	}}
}
