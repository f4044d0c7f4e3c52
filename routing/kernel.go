package routing

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernel is what this package asks of *netlink.Handle. Tests put in between the errors of kernels that they do not run on.
type kernel interface {
	RuleList(family int) ([]netlink.Rule, error)
	RuleAdd(*netlink.Rule) error
	RuleDel(*netlink.Rule) error
	RouteListFiltered(family int, filter *netlink.Route, filterMask uint64) ([]netlink.Route, error)
	RouteReplace(*netlink.Route) error
	RouteDel(*netlink.Route) error
	RouteGetWithOptions(destination net.IP, options *netlink.RouteGetOptions) ([]netlink.Route, error)
	LinkByIndex(index int) (netlink.Link, error)
	Close()
}

// allFamilies are those that a process with other settings may have left something in.
var allFamilies = [...]int{unix.AF_INET, unix.AF_INET6}

// rules lists the rules of a family in the order in which the kernel asks them.
func (h *Handle) rules(family int) ([]netlink.Rule, error) {
	rules, err := complete(func() ([]netlink.Rule, error) { return h.kernel.RuleList(family) })
	if err != nil {
		return nil, explain(fmt.Errorf("list %s rules: %w", ip(family), err), family)
	}
	return rules, nil
}

// routes lists the routes of a family, of one table or, with table 0, of all: a router may have a million.
func (h *Handle) routes(family, table int) ([]netlink.Route, error) {
	from := h.kernel
	if table != unix.RT_TABLE_UNSPEC {
		from = h.strict
	}
	filter := &netlink.Route{Table: table}
	routes, err := complete(func() ([]netlink.Route, error) {
		return from.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
	})
	if errors.Is(err, unix.ENOENT) && table != unix.RT_TABLE_UNSPEC {
		return nil, nil // a table comes with its first route
	}
	if err != nil {
		return nil, explain(fmt.Errorf("list %s routes: %w", ip(family), err), family)
	}
	return routes, nil
}

// owned lists what is tagged with our protocol, routes before rules as they are added. A route so tagged counts only in c.Table, or if it is
// the one that we add: that the number is ours alone is but a convention, and a routing daemon that chose it too must not
// lose its routes.
func (h *Handle) owned(c Config) ([]entry, error) {
	var rules, routes []entry
	for _, family := range allFamilies {
		listedRules, err := h.rules(family)
		if unsupported(err) && !slices.Contains(c.families(), family) {
			continue // nothing can be left in a family that the kernel does not have
		}
		if err != nil {
			return nil, err
		}
		for _, rule := range listedRules {
			if rule.Protocol == c.Protocol {
				rules = append(rules, entry{rule: &rule})
			}
		}
		listedRoutes, err := h.routes(family, 0)
		if err != nil {
			return nil, err
		}
		for _, route := range listedRoutes {
			tagged := route.Protocol == netlink.RouteProtocol(c.Protocol)
			if tagged && (route.Table == c.Table || isLocalDefault(&route)) {
				routes = append(routes, entry{route: &route})
			}
		}
	}
	return append(routes, rules...), nil
}

// missing lists the entries of c that the kernel lacks.
func (h *Handle) missing(c Config) ([]entry, error) {
	var present []entry
	for _, family := range c.families() {
		rules, err := h.rules(family)
		if err != nil {
			return nil, err
		}
		for _, rule := range rules {
			if rule.Protocol == c.Protocol {
				present = append(present, entry{rule: &rule})
			}
		}
		routes, err := h.routes(family, c.Table)
		if err != nil {
			return nil, err
		}
		for _, route := range routes {
			if route.Protocol == netlink.RouteProtocol(c.Protocol) {
				present = append(present, entry{route: &route})
			}
		}
	}
	return without(desired(c), present), nil
}

// add puts one entry into the kernel. A route of another kind that stands in the place of ours is replaced in one step.
func (h *Handle) add(e entry) error {
	var err error
	if e.rule != nil {
		err = h.kernel.RuleAdd(e.rule)
	} else {
		err = h.kernel.RouteReplace(e.route)
	}
	if err != nil {
		return explain(fmt.Errorf("add %v: %w", e, err), e.family())
	}
	return nil
}

// remove takes entries out of the kernel, the last first. It goes on after an error, and returns the first: most often the
// others say the same. An entry that is gone already is no error.
func (h *Handle) remove(entries []entry) error {
	var first error
	for _, e := range slices.Backward(entries) {
		err := h.removeOne(e)
		if first == nil && err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
			first = explain(fmt.Errorf("remove %v: %w", e, err), e.family())
		}
	}
	return first
}

func (h *Handle) removeOne(e entry) error {
	if e.rule != nil {
		return h.kernel.RuleDel(e.rule)
	}
	// Only what identifies the route: the kernel refuses some of the flags that it lists itself.
	return h.kernel.RouteDel(&netlink.Route{
		Family:    e.route.Family,
		Dst:       e.route.Dst,
		LinkIndex: e.route.LinkIndex,
		Table:     e.route.Table,
		Type:      e.route.Type,
		Scope:     e.route.Scope,
		Tos:       e.route.Tos,
		Priority:  e.route.Priority,
		Protocol:  e.route.Protocol,
	})
}

// dumpAttempts is how often a list is asked for that changes while the kernel writes it out. Where routes change without a
// pause an error is better than an incomplete list.
const dumpAttempts = 20

// complete calls list until the kernel did not note an interruption.
func complete[T any](list func() ([]T, error)) (items []T, err error) {
	for range dumpAttempts {
		if items, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return items, err
}

// unsupported reports whether err says that the kernel has no such family, or no policy rules.
func unsupported(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// explain adds to an error of the kernel's what an administrator can do about it.
func explain(err error, family int) error {
	var remedy string
	switch {
	case errors.Is(err, unix.EPERM):
		remedy = "CAP_NET_ADMIN is missing: run as root or grant it"
	case unsupported(err) && family == unix.AF_INET6:
		remedy = "this kernel runs without IPv6 or lacks CONFIG_IPV6_MULTIPLE_TABLES: enable it or leave IPv6 out"
	case unsupported(err):
		remedy = "this kernel has no policy routing: it needs CONFIG_IP_MULTIPLE_TABLES"
	case errors.Is(err, unix.EACCES) && family == unix.AF_INET6:
		// What the kernel answers for a route through an interface with disable_ipv6.
		remedy = "IPv6 is disabled on lo: run `sysctl net.ipv6.conf.lo.disable_ipv6=0` or leave IPv6 out"
	case errors.Is(err, unix.ENETDOWN):
		remedy = loopbackDown
	default:
		return err
	}
	return fmt.Errorf("%w (%s)", err, remedy)
}

// loopbackDown is the remedy for a fresh network namespace, where lo is down.
const loopbackDown = "interface lo is down: run `ip link set lo up`"
