package netfilter

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// set is a named set of a table.
type set struct {
	name, comment string
	kind          nftables.SetDatatype
	interval      bool
	elements      []element
}

// element is a value or, in an interval set, a range of values.
type element struct {
	text string
	keys []nftables.SetElement
}

// marker begins the comment of a set in each of our tables: by it a table is known to be ours. (A table can carry user data
// itself, but the library does not write it.)
const marker = "transproxy-tproxy: "

// Names of sets; those of addresses are completed by the suffix of the family.
const (
	interfacesSet = "interfaces"
	portsSet      = "ports"
	clientsSet    = "clients"
	neighboursSet = "neighbours"
	bypassSet     = "bypass"
	alwaysSet     = "always"
	kindsSet      = "kinds"
	protocolsSet  = "protocols"
	udpPortsSet   = "udp_ports"
	refusedSet    = "udp_refused"
	droppedSet    = "udp_dropped"
	capturedSet   = "udp_captured"
)

// flowSets are the sets by which both tables tell flows apart. They are always the same, empty or not, so that a change of
// the configuration changes only elements.
func flowSets(c *Config) []set {
	ports := c.Ports
	if c.DNS.TCP {
		ports = append(slices.Clone(ports), PortRange{dnsPort, dnsPort})
	}
	bypassed := c.Bypass
	if !c.overrides() {
		bypassed = slices.Concat(bypassed, c.Neighbours) // nothing tells the two apart
	}
	sets := []set{
		{
			name: interfacesSet, kind: nftables.TypeIFName,
			comment:  marker + "interfaces that the rules with iifname ask for",
			elements: interfaceElements(c),
		},
		{
			name: portsSet, kind: nftables.TypeInetService, interval: true,
			comment:  "TCP destination ports that are captured",
			elements: portElements(ports),
		},
	}
	clients, bypass := ranges(c.Clients), ranges(bypassed)
	for _, f := range families() {
		sets = append(sets,
			set{
				name: clientsSet + f.suffix, kind: f.kind, interval: true,
				comment:  "sources that are captured",
				elements: f.elements(clients),
			},
			set{
				name: bypassSet + f.suffix, kind: f.kind, interval: true,
				comment:  "destinations that are left to the kernel",
				elements: f.elements(bypass),
			})
	}
	return sets
}

// udpSets are those that both tables have beside flowSets if c says anything about UDP.
func udpSets(c *Config) []set {
	var sets []set
	if c.overrides() || c.judgesUDP() {
		sets = append(sets, set{
			name: protocolsSet, kind: nftables.TypeInetProto,
			comment:  "protocols that the rules judge",
			elements: []element{protocolElement("tcp", unix.IPPROTO_TCP), protocolElement("udp", unix.IPPROTO_UDP)},
		})
	}
	if !c.judgesUDP() {
		return sets
	}
	judged := slices.Concat(c.RefusedUDP, c.DroppedUDP, c.CapturedUDP)
	if c.DNS.UDP {
		judged = append(judged, PortRange{dnsPort, dnsPort})
	}
	sets = append(sets,
		set{
			name: udpPortsSet, kind: nftables.TypeInetService, interval: true,
			comment:  "UDP destination ports that are not left to the kernel",
			elements: portElements(judged),
		},
		set{
			name: refusedSet, kind: nftables.TypeInetService, interval: true,
			comment:  "UDP destination ports that are refused",
			elements: portElements(c.RefusedUDP),
		},
		set{
			name: droppedSet, kind: nftables.TypeInetService, interval: true,
			comment:  "UDP destination ports that are dropped",
			elements: portElements(c.DroppedUDP),
		})
	if c.capturesUDP() {
		sets = append(sets, set{
			name: capturedSet, kind: nftables.TypeInetService, interval: true,
			comment:  "UDP destination ports that are captured",
			elements: portElements(c.CapturedUDP),
		})
	}
	return sets
}

// overrideSets are those that both tables have beside the others if c overrides anything.
func overrideSets(c *Config) []set {
	if !c.overrides() {
		return nil
	}
	var sets []set
	neighbours, always := ranges(c.Neighbours), ranges(c.Always)
	for _, f := range families() {
		sets = append(sets,
			set{
				name: neighboursSet + f.suffix, kind: f.kind, interval: true,
				comment:  "networks of the capturing interfaces: not even DNS to them is captured",
				elements: f.elements(neighbours),
			},
			set{
				name: alwaysSet + f.suffix, kind: f.kind, interval: true,
				comment:  "destinations that are captured whatever the port",
				elements: f.elements(always),
			})
	}
	return sets
}

// captureSets are the sets of the capturing table. The first are those that Open creates.
func captureSets(c *Config) []set {
	return slices.Concat(flowSets(c), []set{kinds()}, udpSets(c), overrideSets(c), outputSets(c), routerSets(c))
}

// kinds are those of the routing tables (rtnetlink(7), rtm_type).
func kinds() set {
	return set{
		name: kindsSet, kind: nftables.TypeFIBAddr,
		comment: "kinds of destinations that no packet is captured for: this host's own addresses, and groups",
		// Not "all but unicast": IPv6 addresses without a route, which the upstream proxy may well reach, are no unicast.
		elements: []element{
			kindElement("local", unix.RTN_LOCAL), kindElement("broadcast", unix.RTN_BROADCAST),
			kindElement("anycast", unix.RTN_ANYCAST), kindElement("multicast", unix.RTN_MULTICAST),
		},
	}
}

func interfaceElements(c *Config) []element {
	names := slices.Clone(c.Interfaces)
	if len(names) == 0 {
		names = append(slices.Clone(c.Uplinks), loopback)
	}
	slices.Sort(names)
	var elements []element
	for _, name := range slices.Compact(names) {
		elements = append(elements, element{`"` + name + `"`, []nftables.SetElement{{Key: interfaceKey(name)}}})
	}
	return elements
}

func kindElement(name string, kind uint32) element {
	return element{name, []nftables.SetElement{{Key: native(kind)}}}
}

func protocolElement(name string, number byte) element {
	return element{name, []nftables.SetElement{{Key: []byte{number}}}}
}

// ranges merges prefixes: the kernel refuses those that overlap. Ranges rather than prefixes come out since they do not
// touch one another either.
func ranges(prefixes []netip.Prefix) []netipx.IPRange {
	var builder netipx.IPSetBuilder
	for _, prefix := range prefixes {
		if mapped := prefix.Bits() - 96; prefix.Addr().Is4In6() && mapped >= 0 { // RFC 4291, section 2.5.5.2
			prefix = netip.PrefixFrom(prefix.Addr().Unmap(), mapped)
		}
		builder.AddPrefix(prefix.Masked())
	}
	merged, err := builder.IPSet()
	if err != nil {
		return nil // only of invalid prefixes, which Validate refuses
	}
	return merged.Ranges()
}

// elements are the ranges of the family.
func (f family) elements(ranges []netipx.IPRange) []element {
	var elements []element
	for _, r := range ranges {
		if !f.has(r.From()) {
			continue
		}
		text := r.String()
		if prefix, ok := r.Prefix(); ok {
			text = strings.TrimSuffix(prefix.String(), singleAddress(prefix))
		}
		var end []byte
		if next := r.To().Next(); next.IsValid() {
			end = next.AsSlice()
		}
		elements = append(elements, element{text, interval(r.From().AsSlice(), end)})
	}
	return elements
}

// singleAddress is what nft(8) does not write behind an address.
func singleAddress(prefix netip.Prefix) string {
	if !prefix.IsSingleIP() {
		return ""
	}
	if prefix.Addr().Is4() {
		return "/32"
	}
	return "/128"
}

func portElements(ports []PortRange) []element {
	sorted := slices.Clone(ports)
	slices.SortFunc(sorted, func(a, b PortRange) int { return int(a.First) - int(b.First) })
	var merged []PortRange
	for _, next := range sorted {
		if last := len(merged) - 1; last >= 0 && int(next.First) <= int(merged[last].Last)+1 {
			merged[last].Last = max(merged[last].Last, next.Last)
			continue
		}
		merged = append(merged, next)
	}
	var elements []element
	for _, r := range merged {
		var end []byte
		if r.Last < 1<<16-1 {
			end = network(r.Last + 1)
		}
		elements = append(elements, element{r.String(), interval(network(r.First), end)})
	}
	return elements
}

// interval is the range from start to before end. One that reaches the highest value has no end, since no value follows.
func interval(start, end []byte) []nftables.SetElement {
	if end == nil {
		return []nftables.SetElement{{Key: start, IntervalOpen: true}}
	}
	return []nftables.SetElement{{Key: start}, {Key: end, IntervalEnd: true}}
}

// in returns the set as the library has it.
func (s set) in(table *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: s.name, Comment: s.comment, KeyType: s.kind, Interval: s.interval,
		KeyByteOrder: binaryutil.NativeEndian, // of interface names and numbers; the library knows that ranges differ
	}
}

// keys are all elements as the library has them.
func (s set) keys() []nftables.SetElement {
	var keys []nftables.SetElement
	for _, e := range s.elements {
		keys = append(keys, e.keys...)
	}
	return keys
}
