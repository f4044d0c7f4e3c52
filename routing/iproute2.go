package routing

import (
	"fmt"
	"math"
	"net"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// command returns the iproute2 command that adds the entry.
func (e entry) command() string {
	if e.rule != nil {
		return ip(e.family()) + " rule add " + ruleText(e.rule)
	}
	return ip(e.family()) + " route replace " + routeText(e.route)
}

// String returns what the entry is, in iproute2's words.
func (e entry) String() string {
	if e.rule != nil {
		return ip(e.family()) + " rule " + ruleText(e.rule)
	}
	return ip(e.family()) + " route " + routeText(e.route)
}

// ip returns the command's name with the option that selects the family.
func ip(family int) string {
	if family == unix.AF_INET6 {
		return "ip -6"
	}
	return "ip"
}

// ruleText returns a rule in the syntax of ip-rule(8), as far as netlink tells: not the words for the actions of rules that
// look up no table, such as prohibit.
func ruleText(r *netlink.Rule) string {
	words := []string{fmt.Sprintf("pref %d", r.Priority)}
	add := func(condition bool, format string, values ...any) {
		if condition {
			words = append(words, fmt.Sprintf(format, values...))
		}
	}
	add(r.Invert, "not")
	add(r.Src != nil, "from %v", r.Src)
	add(r.Dst != nil, "to %v", r.Dst)
	add(r.Tos != 0, "tos %#x", r.Tos)
	add(r.IifName != "", "iif %s", r.IifName)
	add(r.OifName != "", "oif %s", r.OifName)
	switch mask := markMask(r); {
	case mask == math.MaxUint32:
		add(true, "fwmark %#x", r.Mark)
	case mask != 0:
		add(true, "fwmark %#x/%#x", r.Mark, mask)
	}
	if r.UIDRange != nil {
		add(true, "uidrange %d-%d", r.UIDRange.Start, r.UIDRange.End)
	}
	add(r.IPProto != 0, "ipproto %d", r.IPProto)
	if r.Sport != nil {
		add(true, "sport %d-%d", r.Sport.Start, r.Sport.End)
	}
	if r.Dport != nil {
		add(true, "dport %d-%d", r.Dport.Start, r.Dport.End)
	}
	add(r.TunID != 0, "tun_id %d", r.TunID)
	add(r.Table != 0, "lookup %s", tableText(r.Table))
	add(r.SuppressPrefixlen >= 0, "suppress_prefixlength %d", r.SuppressPrefixlen)
	add(r.SuppressIfgroup >= 0, "suppress_ifgroup %d", r.SuppressIfgroup)
	add(r.Goto >= 0, "goto %d", r.Goto)
	add(r.Protocol != 0, "protocol %d", r.Protocol)
	return strings.Join(words, " ")
}

// markMask returns the bits of the packet mark that a rule reads: none if it does not match by mark.
func markMask(r *netlink.Rule) uint32 {
	if r.Mask == nil {
		return 0
	}
	return *r.Mask
}

// routeText returns the essential part of a route in the syntax of ip-route(8).
func routeText(r *netlink.Route) string {
	var words []string
	if r.Type == unix.RTN_LOCAL {
		words = append(words, "local")
	}
	if isDefault(r) {
		words = append(words, "default")
	} else {
		words = append(words, r.Dst.String())
	}
	if r.Gw != nil {
		words = append(words, "via "+r.Gw.String())
	}
	if r.LinkIndex != 0 {
		words = append(words, "dev "+linkName(r.LinkIndex))
	}
	words = append(words, "table "+tableText(r.Table), fmt.Sprintf("proto %d", r.Protocol))
	return strings.Join(words, " ")
}

// tableText returns the name that every iproute2 knows for a table of the kernel's, and the number of others.
func tableText(table int) string {
	switch table {
	case unix.RT_TABLE_DEFAULT:
		return "default"
	case unix.RT_TABLE_MAIN:
		return "main"
	case unix.RT_TABLE_LOCAL:
		return "local"
	}
	return fmt.Sprint(table)
}

// linkName returns the name of an interface, and a stand-in for one that has just gone.
func linkName(index int) string {
	if index == loopbackIndex {
		return loopbackName
	}
	if link, err := net.InterfaceByIndex(index); err == nil {
		return link.Name
	}
	return fmt.Sprintf("if%d", index)
}
