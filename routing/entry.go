package routing

import (
	"net"
	"reflect"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// loopbackName and loopbackIndex belong to the loopback interface of every network namespace (LOOPBACK_IFINDEX in the
// kernel's include/net/flow.h).
const (
	loopbackName  = "lo"
	loopbackIndex = 1
)

// entry is one rule or one route of the kernel's: exactly one of the two pointers is set.
type entry struct {
	comment string // what it is for, in a sentence; empty for entries that were read from the kernel
	rule    *netlink.Rule
	route   *netlink.Route
}

// family returns AF_INET or AF_INET6.
func (e entry) family() int {
	if e.rule != nil {
		return e.rule.Family
	}
	return e.route.Family
}

// desired returns what c asks for, in the order in which it is added.
func desired(c Config) []entry {
	lan := func(r netlink.Rule) *netlink.Rule { r.Mark = c.LAN; return &r }
	local := func(r netlink.Rule) *netlink.Rule { r.Mark = c.Local; return &r }

	var entries []entry
	for _, family := range c.families() {
		rule := *netlink.NewRule()
		rule.Family = family
		rule.Mask = &c.Mask
		rule.Protocol = c.Protocol

		// Reverse-path look-ups, and the host's own, have lo as incoming interface.
		own := rule
		own.IifName = loopbackName

		skip := own
		skip.Priority, skip.Goto = c.Priority, c.Priority+2
		clients := rule
		clients.Priority, clients.Table = c.Priority+1, c.Table
		programs := own
		programs.Priority, programs.Table = c.Priority+2, c.Table

		entries = append(entries,
			entry{
				comment: "In a table of our own every address is this host's, so that captured packets are delivered here.",
				route:   localRoute(c, family),
			},
			entry{
				comment: "With src_valid_mark=1 the kernel looks up the way back to a client with the mark of the client's packet:\n" +
					"that look-up must not end in our table, or the packet is dropped as a martian.",
				rule: lan(skip),
			},
			entry{
				comment: "Captured packets of clients, whichever interface they come in by.",
				rule:    lan(clients),
			},
			entry{
				comment: "Captured packets of this host's own programs.",
				rule:    local(programs),
			},
		)
	}
	return entries
}

// localRoute is the one route of our table: every address of the family is local.
func localRoute(c Config, family int) *netlink.Route {
	route := &netlink.Route{
		Family:    family,
		Dst:       everywhere(family),
		LinkIndex: loopbackIndex,
		Table:     c.Table,
		Type:      unix.RTN_LOCAL,
		Protocol:  netlink.RouteProtocol(c.Protocol),
	}
	if family == unix.AF_INET {
		// The kernel demands this scope of an IPv4 local route; IPv6 has no scopes of routes.
		route.Scope = netlink.SCOPE_HOST
	}
	return route
}

// everywhere is the destination of a default route.
func everywhere(family int) *net.IPNet {
	if family == unix.AF_INET {
		return &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 8*net.IPv4len)}
	}
	return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 8*net.IPv6len)}
}

// isLocalDefault reports whether r says what localRoute says, in whatever table and by whatever program.
func isLocalDefault(r *netlink.Route) bool {
	return r.Type == unix.RTN_LOCAL && r.LinkIndex == loopbackIndex && isDefault(r) && r.Tos == 0
}

// isDefault reports whether r leads to all addresses of its family.
func isDefault(r *netlink.Route) bool {
	if r.Dst == nil {
		return true
	}
	bits, size := r.Dst.Mask.Size()
	return bits == 0 && size != 0 && r.Dst.IP.IsUnspecified()
}

// same reports whether the kernel would act on a and b alike. It compares routes only with those that localRoute makes: the
// kernel adds details of its own, such as the metric 1024 of IPv6.
func (e entry) same(other entry) bool {
	if e.rule != nil || other.rule != nil {
		return e.rule != nil && other.rule != nil && reflect.DeepEqual(e.rule, other.rule)
	}
	a, b := e.route, other.route
	return a.Family == b.Family && a.Table == b.Table && a.Protocol == b.Protocol && isLocalDefault(a) && isLocalDefault(b)
}

// without returns the entries that have no equal among others.
func without(entries, others []entry) []entry {
	return slices.DeleteFunc(slices.Clone(entries), func(e entry) bool {
		return slices.ContainsFunc(others, e.same)
	})
}

// Text returns the iproute2 commands that do what [Handle.Apply] does, each after a comment that says why: a script for sh,
// which names everything in numbers.
func Text(c Config) string {
	var text strings.Builder
	for _, e := range desired(c) {
		for line := range strings.Lines(e.comment + "\n") {
			text.WriteString("# " + line)
		}
		text.WriteString(e.command() + "\n")
	}
	return text.String()
}
