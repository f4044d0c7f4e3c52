package routing

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
)

// Check reports what stands in the way of Apply, as one line that quotes it and names the remedy: a value of c that cannot
// work; another program's rule at one of our preferences, route in our table, rule that looks up our table, or rule whose
// match of the packet mark would turn out differently for our marks; lo being down; a family that the kernel does not have.
// It changes nothing and needs no privilege.
func (h *Handle) Check(c Config) error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return h.check(c)
}

func (h *Handle) check(c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	// The kernel refuses our IPv6 route while lo is down, but takes the IPv4 one, to drop what this host's programs send.
	lo, err := h.kernel.LinkByIndex(loopbackIndex)
	if err != nil {
		return fmt.Errorf("look up interface lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		return errors.New(loopbackDown)
	}
	for _, family := range c.families() {
		rules, err := h.rules(family)
		if err != nil {
			return err
		}
		for _, rule := range rules {
			if reason := c.clash(&rule); reason != "" {
				return fmt.Errorf("rule of another program %s: %v", reason, entry{rule: &rule})
			}
		}
		routes, err := h.routes(family, c.Table)
		if err != nil {
			return err
		}
		for _, route := range routes {
			if route.Protocol != netlink.RouteProtocol(c.Protocol) {
				return fmt.Errorf("route of another program is in our table %d, choose another with --table: %v",
					c.Table, entry{route: &route})
			}
		}
	}
	return nil
}

// clash returns why another program's rule cannot stand beside ours, or "".
func (c Config) clash(rule *netlink.Rule) string {
	last := c.Priority + rulesPerFamily - 1
	switch {
	case rule.Protocol == c.Protocol:
		return "" // ours, or a leftover that Apply sweeps
	case rule.Priority >= c.Priority && rule.Priority <= last:
		return fmt.Sprintf("has one of our preferences %d to %d, choose others with --rule-priority", c.Priority, last)
	case rule.Table == c.Table:
		return fmt.Sprintf("looks up our table %d, choose another with --table", c.Table)
	case readsBits(rule, c.Mask):
		return fmt.Sprintf("reads bits of our mark %#x, choose others with --mark", c.Mask)
	}
	return ""
}

// readsBits reports whether a packet's bits under mask decide what rule does with it: either the rule wants some of them
// set, so that another program sets them, or it is for packets without any mark, which ours then no longer are. A rule that
// compares the whole mark with a value outside our bits (wg-quick's `not fwmark 0xca6c`) treats our marks as it treats none.
func readsBits(rule *netlink.Rule, mask uint32) bool {
	read := markMask(rule)
	return read&mask != 0 && (rule.Mark&mask != 0 || rule.Mark&read == 0)
}
