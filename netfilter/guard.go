package netfilter

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
)

// Guard installs the guard by itself, before there is a program, an interface or an address: nothing that c captures is
// forwarded, by whatever client of the interfaces, nor sent by this host's own programs. It stays until [CleanUp], or an
// [Handle.Apply] without FailClosed. An instance with FailClosed takes it over and leaves it standing when it closes. Called
// again, it follows c; beside a living instance with FailClosed it only makes that one's guard a standing one. The Neighbours
// that are known are left alone, and link-local addresses.
func Guard(c Config) error {
	c.FailClosed = true
	if err := c.Validate(); err != nil {
		return err
	}
	k, err := dial()
	if err != nil {
		return unavailable(err)
	}
	return errors.Join(installGuard(&c, k), k.close())
}

// installGuard is Guard on a connection that the caller closes.
func installGuard(c *Config, k kernel) error {
	h := &Handle{name: c.Table, kernel: k}
	leftover, err := h.survey()
	var living *InUseError
	if err == nil && !leftover {
		return h.stand(c)
	}
	// Where there is no owner flag, a leftover and a living instance's table look alike, but for the lock.
	if err == nil {
		held, lockErr := lock(c.Table)
		if lockErr == nil {
			defer held.Close()
			return h.stand(c)
		}
		err = lockErr
	}
	if !errors.As(err, &living) || living.Table != c.Table {
		return err
	}
	if holder, err := k.holder(guardName(c.Table)); err != nil {
		return unavailable(err)
	} else if holder != left {
		return fmt.Errorf("an instance runs with --fail open (it holds nft table %s): start it with --fail closed, or stop it first", c.Table)
	}
	mark := table{name: guardName(c.Table), sets: []set{standing()}}
	if err := k.commit([]operation{{verb: put, table: mark}}); err != nil {
		return h.explain(err)
	}
	return nil
}

// stand puts a standing guard in place of what there is of one.
func (h *Handle) stand(c *Config) error {
	h.standing = true
	if err := h.kernel.commit(puts([]table{h.guard(c)}, []table{widestGuard(c)})); err != nil {
		return h.explain(err)
	}
	return nil
}

// guard is the one that c asks for, or a standing one.
func (h *Handle) guard(c *Config) table {
	if !h.standing {
		return guardTable(c)
	}
	// A network that nobody knows yet is refused, not forwarded.
	wide := *c
	wide.Clients = c.GuardClients
	if len(wide.Clients) == 0 {
		wide.Clients = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	// Nobody forwards to them (RFC 3927, section 7; RFC 4291, section 2.5.6): they are beside this host.
	wide.Neighbours = append(slices.Clone(c.Neighbours), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"))
	guard := guardTable(&wide)
	guard.sets = append(guard.sets, standing())
	return guard
}

// standingSet tells a guard that stays from one that goes with its program. It is no set that any rule asks; but nothing else
// of a table survives that its rules are replaced.
const standingSet = "standing"

func standing() set {
	return set{name: standingSet, kind: nftables.TypeMark, comment: "a program that stops leaves this table: cleanup removes it"}
}

// stands reports whether the guard that is there is a standing one.
func (h *Handle) stands() (bool, error) {
	found, err := h.kernel.hasSet(guardName(h.name), standingSet)
	if err != nil {
		return false, fmt.Errorf("read nft table inet %s: %w", guardName(h.name), err)
	}
	return found, nil
}

// widestGuard has all chains and sets that any guard has, by which those of a former one are removed that c does not need.
// What is in the sets is not known.
func widestGuard(c *Config) table {
	all := *c
	all.DNS = DNS{UDP: true, TCP: true}
	all.RefusedUDP = []PortRange{{First: 1, Last: 1}}
	all.Output = Output{Mark: c.Mask}
	widest := guardTable(&all)
	for i := range widest.sets {
		widest.sets[i].elements = nil
	}
	return widest
}

// guardPreroutingHook lies ahead of the capturing chain, which has the last word about the mark, and of the translation of
// destinations.
func guardPreroutingHook() *hook {
	return &hook{
		text:   "type filter hook prerouting priority mangle - 10",
		number: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(*nftables.ChainPriorityMangle - 10),
	}
}
