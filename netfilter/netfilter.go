// Package netfilter captures TCP flows and DNS queries of clients with nftables and hands them to transparent listeners of
// this host.
//
// Everything is in one table of family inet. Its chain at the prerouting hook judges each packet of a client; that of a
// flow to be captured is assigned to a listener (Documentation/networking/tproxy.rst of the kernel) and marked, so that
// policy routing delivers it to this host. The destination of the packet is not changed: it is the local address of the
// accepted socket, or what comes with a datagram as IP_RECVORIGDSTADDR (ip(7)).
//
// Port 53 is judged apart ([Config].DNS): a query is captured whatever server it asks, but for this host and for neighbours.
// A listener answers over UDP from the address that was asked and from its own port. A chain at the output hook, ahead of
// connection tracking, puts port 53 in the place of the latter, so that no socket needs port 53, which another program may
// hold.
//
// The table is owned by the process (nft(8), flags owner): the kernel removes it when the process ends, however that
// happens, and keeps other programs from changing or flushing it. Who wants captured flows to be refused rather than
// forwarded when the process is gone asks for a second table, the guard, which outlives it ([Config].FailClosed).
//
// The package is the only one that imports the nftables library.
package netfilter

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Handle holds the table of one running program. Its methods may be called concurrently.
type Handle struct {
	name   string
	owned  bool
	lock   net.Listener // what keeps other instances away where the kernel knows no owner; else nil
	events *os.File     // readable when somebody changes nftables

	mutex     sync.Mutex // serialises changes, and guards what follows
	kernel    kernel     // nil after Close
	config    *Config    // as applied last; nil before
	installed []table    // what Watch restores
	guarded   bool       // there is a guard, which a killed process or Guard left, or Apply installed
	standing  bool       // it is one that stays
}

// Open takes the lock: it creates the table, which captures nothing yet, in the network namespace of the calling thread.
// A table that a killed process left there is replaced; the guard it left stays in force until Apply. The caller closes the
// handle. The error is an *[InUseError] while another instance runs there; every error names its remedy.
//
// Call it before many files are open: the library waits for the kernel's answers with select(2), which knows only
// descriptors below 1024.
func Open(table string) (*Handle, error) {
	if err := validateName(table); err != nil {
		return nil, err
	}
	events, err := subscribe()
	if err != nil {
		return nil, unavailable(err)
	}
	k, err := dial()
	if err != nil {
		return nil, errors.Join(unavailable(err), events.Close())
	}
	h, err := open(table, k)
	if err != nil {
		return nil, errors.Join(err, k.close(), events.Close())
	}
	h.events = events
	return h, nil
}

// open is Open on a connection that the caller closes after an error.
func open(name string, k kernel) (*Handle, error) {
	h := &Handle{name: name, kernel: k}
	leftover, err := h.survey()
	if err != nil {
		return nil, err
	}
	h.owned = true
	err = h.create(leftover)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		// Kernels before 5.12 know no owner. The lock comes first: a table that looks like a leftover may be that of a
		// living instance.
		if h.lock, err = lock(name); err != nil {
			return nil, err
		}
		h.owned = false
		err = h.create(leftover)
	}
	if err != nil {
		h.unlock()
		switch {
		case errors.Is(err, unix.EPERM): // the capability is there, or survey had failed
			return nil, &InUseError{Table: name}
		case errors.Is(err, unix.EEXIST): // created by somebody since survey
			return nil, notOurs(name)
		case isUnavailable(err):
			return nil, unavailable(err)
		}
		return nil, fmt.Errorf("create nft table inet %s: %w", name, err)
	}
	return h, nil
}

// survey finds out who has the names of both tables, and returns whether a leftover has that of the first. Another
// instance is in the way whatever its table's name: routing rules bear one tag for all.
func (h *Handle) survey() (leftover bool, err error) {
	instance, err := h.kernel.instance()
	switch {
	case err != nil:
		return false, unavailable(err)
	case instance != "":
		return false, &InUseError{Table: instance}
	}
	capture, err := h.kernel.holder(h.name)
	if err != nil {
		return false, unavailable(err)
	}
	guard, err := h.kernel.holder(guardName(h.name))
	switch {
	case err != nil:
		return false, unavailable(err)
	case capture == foreign:
		return false, notOurs(h.name)
	case guard == foreign || guard == living:
		return false, notOurs(guardName(h.name))
	}
	if h.guarded = guard == left; h.guarded {
		if h.standing, err = h.stands(); err != nil {
			return false, err
		}
	}
	return capture == left, nil
}

// create makes the table, with sets but without chains, in the place of the leftover.
func (h *Handle) create(leftover bool) error {
	var change []operation
	if leftover {
		change = append(change, operation{verb: drop, table: table{name: h.name}})
	}
	empty := table{name: h.name, owned: h.owned, sets: captureSets(&Config{})}
	change = append(change, operation{verb: create, table: empty})
	if err := h.kernel.commit(change); err != nil {
		return err
	}
	h.installed = []table{empty}
	return nil
}

// Owned reports whether the kernel removes the table when the process dies. If not (before Linux 5.12), a killed process
// leaves its rules behind until the next Open or CleanUp, and other programs can remove them: worth a warning.
func (h *Handle) Owned() bool { return h.owned }

// Standing reports whether there is a guard that stays when the program stops ([Guard]). Apply takes it away if its Config is
// without FailClosed: worth a warning.
func (h *Handle) Standing() bool {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return h.standing
}

// Apply makes the rules those of c in one transaction, at first or again: there is no moment without rules, and flows
// captured before stay so as long as c captures their interface. After an error everything is as it was.
func (h *Handle) Apply(c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if c.Table != h.name {
		return fmt.Errorf("nft table %s is open, not %s", h.name, c.Table)
	}
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return h.install(&c, captureTable(&c))
}

// Drain lets no new flow and no query be captured: they are forwarded or, with FailClosed, refused. Flows captured already
// live on, and queries are answered.
func (h *Handle) Drain() error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.config == nil {
		return nil
	}
	return h.install(h.config, drainedTable(h.config))
}

// install puts the capturing table in place, and with it the guard that c asks for.
func (h *Handle) install(c *Config, capture table) error {
	if h.kernel == nil {
		return errClosed
	}
	capture.owned = h.owned
	tables, before := []table{capture}, h.installed
	if h.config == nil {
		// A lookup can miss elements that come into force in the same transaction as the rules that ask for them (Linux 6.18,
		// sets of intervals), so that a packet would pass as one of those that are left alone.
		filled := table{name: capture.name, owned: capture.owned, sets: capture.sets}
		if err := h.kernel.commit(puts([]table{filled}, before)); err != nil {
			return h.explain(err)
		}
		before = []table{filled}
		h.installed = before
	}
	var takeover []table // a guard that closes what is not captured yet: it is touched once everything is
	switch {
	case c.FailClosed && h.guarded && h.config == nil:
		takeover = []table{h.guard(c)}
	case c.FailClosed:
		tables = append(tables, h.guard(c))
	}
	change := puts(tables, before)
	if !c.FailClosed && h.guarded {
		change = append(change, operation{verb: drop, table: table{name: guardName(h.name)}})
	}
	if err := h.kernel.commit(change); err != nil {
		return h.explain(err)
	}
	if takeover != nil {
		if err := h.kernel.commit(puts(takeover, []table{widestGuard(c)})); err != nil {
			undo := puts([]table{{name: h.name, owned: h.owned}}, tables)
			return errors.Join(h.explain(err), h.kernel.commit(undo))
		}
		tables = append(tables, takeover...)
	}
	h.config, h.installed, h.guarded = c, tables, c.FailClosed
	h.standing = h.standing && c.FailClosed
	return nil
}

// restore puts back the tables that somebody else changed or removed.
func (h *Handle) restore() error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.kernel == nil {
		return nil
	}
	if h.config != nil && h.config.FailClosed && !h.standing {
		stands, err := h.stands()
		if err != nil {
			return err
		}
		if stands { // since Guard was called beside us
			h.standing = true
			if err := h.install(h.config, h.installed[0]); err != nil {
				return err
			}
		}
	}
	var broken []table
	for _, t := range h.installed {
		if t.owned {
			continue // the kernel refuses others' changes
		}
		intact, err := h.kernel.intact(t)
		if err != nil {
			return fmt.Errorf("read nft table inet %s: %w", t.name, err)
		}
		if !intact {
			broken = append(broken, t)
		}
	}
	if len(broken) == 0 {
		return nil
	}
	if err := h.kernel.commit(puts(broken, nil)); err != nil {
		return h.explain(err)
	}
	return nil
}

// Close removes the table and the guard, unless that is a standing one ([Guard]), and gives up the lock. A guard that a
// killed process left stays if Apply has not taken it over: a start that fails must not open what the guard closes. A running
// Watch must have ended.
func (h *Handle) Close() error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.kernel == nil {
		return nil
	}
	change := []operation{{verb: drop, table: table{name: h.name, owned: h.owned}}}
	stands := h.standing
	if h.guarded && !stands {
		stands, _ = h.stands() // since the last look; if there is no telling, the guard goes like its program
	}
	if h.guarded && !stands && h.config != nil {
		change = append(change, operation{verb: drop, table: table{name: guardName(h.name)}})
	}
	err := h.kernel.commit(change)
	if err != nil {
		err = fmt.Errorf("delete nft table inet %s: %w", h.name, err)
	}
	err = errors.Join(err, h.kernel.close())
	if h.events != nil {
		err = errors.Join(err, h.events.Close())
	}
	h.kernel = nil
	h.unlock()
	return err
}

// unlock gives up the lock that stands in for the owner flag, if it was taken.
func (h *Handle) unlock() {
	if h.lock != nil {
		h.lock.Close() // closing a socket that nobody connects to cannot lose anything
	}
}

// CleanUp removes the tables that a killed process left: the guard and, where there is no owner flag, the other one. Tables
// of these names that are not ours stay. The error is an *[InUseError] while an instance lives.
func CleanUp(table string) error {
	if err := validateName(table); err != nil {
		return err
	}
	k, err := dial()
	if err != nil {
		return unavailable(err)
	}
	return errors.Join(cleanUp(table, k), k.close())
}

// cleanUp is CleanUp on a connection that the caller closes.
func cleanUp(name string, k kernel) error {
	held, err := lock(name)
	if err != nil {
		return err
	}
	defer held.Close()
	instance, err := k.instance()
	switch {
	case err != nil:
		return unavailable(err)
	case instance != "":
		return &InUseError{Table: instance}
	}
	var change []operation
	for _, name := range []string{name, guardName(name)} {
		holder, err := k.holder(name)
		switch {
		case err != nil:
			return unavailable(err)
		case holder == left:
			change = append(change, operation{verb: drop, table: table{name: name}})
		}
	}
	if err := k.commit(change); err != nil {
		return fmt.Errorf("delete what was left of nft table inet %s: %w", name, err)
	}
	return nil
}
