package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Destinations to ask the way to: documentation addresses (RFC 5737, RFC 3849), to which only a default route leads.
var (
	exampleIPv4 = netip.MustParseAddr("198.51.100.1")
	exampleIPv6 = netip.MustParseAddr("2001:db8:ffff::1")
)

// Verify asks the kernel where it would send packets with our marks, those of this host's programs and those of clients that
// come in by the named interfaces. The error tells of one that would not be delivered here, and of the rule that takes it away
// before ours are asked, as after an `ip rule add` without a preference: that one goes ahead of all others. Interfaces that
// are gone, down or without an address of the family are left out: there is no client's address to ask for.
func (h *Handle) Verify(interfaces ...string) error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.applied == nil {
		return errors.New("no rules are applied")
	}
	c := *h.applied
	missing, err := h.missing(c)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing: %v", missing[0])
	}
	host, err := Look()
	if err != nil {
		return err
	}
	for _, family := range c.families() {
		for _, p := range probes(c, family, host, interfaces) {
			if err := h.ask(p, c); err != nil {
				return err
			}
		}
		if err := h.suppressed(c, family, interfaces); err != nil {
			return err
		}
	}
	return nil
}

// suppressed returns an error if a rule of others ahead of ours takes clients' packets for which the main table has more than a
// default route, as wg-quick's does (suppress_prefixlength). No example can be asked for: which destinations have such routes
// is the host's own affair.
func (h *Handle) suppressed(c Config, family int, interfaces []string) error {
	rules, err := h.rules(family)
	if err != nil {
		return err
	}
	for _, rule := range rules {
		same := (rule.Mark^c.LAN)&markMask(&rule) == 0
		switch {
		case rule.Priority >= c.Priority || rule.Protocol == c.Protocol || rule.Table != unix.RT_TABLE_MAIN || rule.SuppressPrefixlen < 0,
			same == rule.Invert,
			rule.IifName != "" && !slices.Contains(interfaces, rule.IifName):
			continue
		}
		return fmt.Errorf("captured packets to networks with routes of their own would not be delivered here, by a rule ahead of ours: %v; "+
			"put it behind with `%s`, or choose a smaller --rule-priority", entry{rule: &rule}, behind(&rule))
	}
	return nil
}

// probe is a packet whose way is asked for.
type probe struct {
	family int
	mark   uint32
	iif    Interface  // where it comes in; the zero value for a packet of this host
	source netip.Addr // invalid for a packet of this host
}

// probes returns the packets to ask for: one of this host, and one of a client for each of the named interfaces.
func probes(c Config, family int, host Host, interfaces []string) []probe {
	all := []probe{{family: family, mark: c.Local, iif: Interface{Name: loopbackName}}}
	for _, link := range host.Interfaces {
		if !slices.Contains(interfaces, link.Name) || !link.Up {
			continue
		}
		if source, ok := link.neighbour(family == unix.AF_INET); ok {
			all = append(all, probe{family: family, mark: c.LAN, iif: link, source: source})
		}
	}
	return all
}

func (p probe) String() string {
	words := p.destination().String()
	if p.source.IsValid() {
		words += fmt.Sprintf(" from %v iif %s", p.source, p.iif.Name)
	}
	return fmt.Sprintf("%s mark %#x", words, p.mark)
}

func (p probe) destination() netip.Addr {
	if p.family == unix.AF_INET {
		return exampleIPv4
	}
	return exampleIPv6
}

// ask returns an error if p would not be delivered to this host.
func (h *Handle) ask(p probe, c Config) error {
	options := &netlink.RouteGetOptions{Mark: p.mark}
	if p.source.IsValid() {
		options.IifIndex, options.SrcAddr = p.iif.Index, p.source.AsSlice()
	}
	routes, err := h.kernel.RouteGetWithOptions(p.destination().AsSlice(), options)
	table := unix.RT_TABLE_UNSPEC
	switch {
	case errors.Is(err, unix.ENODEV):
		return nil // the interface has gone since
	case err == nil && len(routes) > 0:
		if routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		err = errors.New("it leaves this host")
		table = routes[0].Table
	case err == nil:
		err = errors.New("no answer")
	}
	suspects, listErr := h.suspects(p, c, table)
	if listErr != nil || len(suspects) == 0 {
		return fmt.Errorf("%s %v would not be delivered here: %w", ip(p.family)+" route get", p, err)
	}
	cure := "remove it"
	if len(suspects) == 1 && suspects[0].Table != 0 {
		cure = fmt.Sprintf("put it behind with `%s`", behind(suspects[0]))
	}
	var words []string
	for _, rule := range suspects {
		words = append(words, entry{rule: rule}.String())
	}
	return fmt.Errorf("%s %v would not be delivered here: %w, by a rule ahead of ours: %s; %s, or choose a smaller --rule-priority",
		ip(p.family)+" route get", p, err, strings.Join(words, ", or "), cure)
}

// behind is the command that moves a rule of another program's to just before the main table, where it finds all that no
// rule has decided.
func behind(rule *netlink.Rule) string {
	moved := *rule
	moved.Priority = mainPreference - 1
	if rule.SuppressPrefixlen >= 0 {
		moved.Priority-- // it leaves to a default route of others what it does not take
	}
	return fmt.Sprintf("%s rule add %s && %[1]s rule del pref %[3]d", ip(rule.Family), ruleText(&moved), rule.Priority)
}

// maxSuspects bounds the length of an error.
const maxSuspects = 3

// suspects returns the rules of others that are asked for p before ours and look up table; RT_TABLE_UNSPEC stands for any,
// where the kernel's answer was an error.
func (h *Handle) suspects(p probe, c Config, table int) ([]*netlink.Rule, error) {
	rules, err := h.rules(p.family)
	if err != nil {
		return nil, err
	}
	var suspects []*netlink.Rule
	for _, rule := range rules {
		switch {
		case rule.Priority > c.Priority || rule.Protocol == c.Protocol || len(suspects) == maxSuspects:
			return suspects, nil
		case rule.Table == unix.RT_TABLE_LOCAL, // the kernel's first rule, which does not know the example
			rule.IifName != "" && rule.IifName != p.iif.Name,
			table != unix.RT_TABLE_UNSPEC && rule.Table != table,
			!rule.Invert && (rule.Mark^p.mark)&markMask(&rule) != 0:
			continue
		}
		suspects = append(suspects, &rule)
	}
	return suspects, nil
}
