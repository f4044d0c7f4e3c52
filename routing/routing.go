// Package routing delivers marked packets to this host, and tells what the host's interfaces and routes say about its
// clients and its uplink.
//
// netfilter marks the packets that are to be captured; a packet's destination is some server on the network, so it would be
// forwarded all the same. Policy rules (ip-rule(8)) send packets with the marks to a routing table of their own, whose one
// route says that every address is local (ip-route(8), type local): such packets are delivered to a transparent socket of
// this host (Documentation/networking/tproxy.rst of the kernel).
//
// Everything that the package adds carries one protocol number ([Config].Protocol), by which leftovers of a killed process
// are known and swept. It writes no sysctl but for [Parameters], which put back what was there. No other package of the
// program imports netlink.
package routing

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config says which rules and routes there are to be. Two programs on one host must differ in Table, Priority and Mask.
type Config struct {
	// Table is the routing table of our own, by number: not 0, and none of the kernel's (252 to 255).
	Table int
	// Priority is the preference of the first of three consecutive rules, 1 to 32763: all of them stand before the rule
	// that looks up the main table (32766).
	Priority int
	// Protocol tags rules and routes as ours, 5 to 255: the kernel and administrators use those below (linux/rtnetlink.h).
	Protocol uint8
	// Mask has the bits of the packet mark that are ours, the only ones that are looked at.
	Mask uint32
	// LAN is the mark, within Mask, of packets that clients sent through this host.
	LAN uint32
	// Local is the mark, within Mask, of packets that programs on this host sent.
	Local uint32
	// IPv4 and IPv6 say which families get rules. The caller leaves out a family that the host has switched off.
	IPv4, IPv6 bool
}

// rulesPerFamily is the number of consecutive preferences that rules take from Config.Priority on.
const rulesPerFamily = 3

// mainPreference is the preference of the rule that looks up the main table (ip-rule(8)).
const mainPreference = 32766

// Validate names the first value that cannot work, and the flag that sets it. Apply calls it; [Text] trusts its Config.
func (c Config) Validate() error {
	switch {
	case c.Table <= 0 || c.Table > 1<<32-1 || c.Table >= unix.RT_TABLE_COMPAT && c.Table <= unix.RT_TABLE_LOCAL:
		return fmt.Errorf("routing table %d is none of our own: choose another number with --table, but none from 252 to 255", c.Table)
	case c.Priority <= 0 || c.Priority+rulesPerFamily > mainPreference:
		return fmt.Errorf("rule preference %d: choose --rule-priority between 1 and %d", c.Priority, mainPreference-rulesPerFamily)
	case c.LAN == 0 || c.Local == 0 || c.LAN == c.Local || (c.LAN|c.Local)&^c.Mask != 0:
		return fmt.Errorf("marks %#x and %#x are no two bits of the mask %#x: choose another --mark", c.LAN, c.Local, c.Mask)
	}
	return c.validateProtocol()
}

// validateProtocol keeps a sweep from taking what the kernel or an administrator added.
func (c Config) validateProtocol() error {
	if c.Protocol <= unix.RTPROT_STATIC {
		return fmt.Errorf("protocol %d tags rules and routes of others: choose 5 to 255", c.Protocol)
	}
	return nil
}

// families returns the address families that get rules.
func (c Config) families() []int {
	var families []int
	if c.IPv4 {
		families = append(families, unix.AF_INET)
	}
	if c.IPv6 {
		families = append(families, unix.AF_INET6)
	}
	return families
}

// Handle holds the rules and routes of one running program. Its methods may be called concurrently. There is no lock against
// other processes here: the caller makes sure, before Apply, that no other instance runs, as its rules bear the same tag.
type Handle struct {
	kernel kernel
	strict kernel // the same on a socket with NETLINK_GET_STRICT_CHK: it lists one table, not all

	mutex   sync.Mutex // serialises changes, and guards applied
	applied *Config    // what Watch repairs, Verify asks for and Close removes; nil before Apply and after Close
}

// answerTimeout bounds the wait for the kernel's answer to a single request, which takes microseconds.
const answerTimeout = 5 * time.Second

// Open returns a handle on the network namespace of the calling thread. It changes nothing; the caller closes the handle.
func Open() (*Handle, error) {
	handle, err := newHandle()
	if err != nil {
		return nil, err
	}
	strict, err := newHandle()
	if err != nil {
		handle.Close()
		return nil, err
	}
	// A kernel before 4.20 does not know the option; it lists all tables, and netlink picks out of them. The lists of
	// rules cannot be had by a strict socket: netlink's request for them is not as the kernel then wants it.
	if err := strict.SetStrictCheck(true); err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		handle.Close()
		strict.Close()
		return nil, fmt.Errorf("set NETLINK_GET_STRICT_CHK: %w", err)
	}
	return &Handle{kernel: handle, strict: strict}, nil
}

// newHandle returns a netlink socket with a time-out.
func newHandle() (*netlink.Handle, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	if err := handle.SetSocketTimeout(answerTimeout); err != nil {
		handle.Close()
		return nil, fmt.Errorf("set netlink time-out: %w", err)
	}
	return handle, nil
}

// release closes the sockets.
func (h *Handle) release() {
	h.kernel.Close()
	h.strict.Close()
}

// Apply makes the kernel's rules and routes those of c. It begins with Check. Identical ones are kept untouched, since
// removing a rule kills the connections that live by it; missing ones are added, a family's route before its rules; then
// whatever else is tagged as ours goes. After an error nothing that it added is left.
func (h *Handle) Apply(c Config) error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if err := h.check(c); err != nil {
		return err
	}
	missing, leftover, err := h.compare(c)
	if err != nil {
		return err
	}
	for i, e := range missing {
		if err := h.add(e); err != nil {
			return h.undo(missing[:i], err)
		}
	}
	if err := h.remove(leftover); err != nil {
		return h.undo(missing, err)
	}
	h.applied = &c
	return nil
}

// undo removes what was added before cause ended Apply, and returns cause.
func (h *Handle) undo(added []entry, cause error) error {
	if err := h.remove(added); err != nil {
		return fmt.Errorf("%w; then %w", cause, err)
	}
	return cause
}

// Close removes the rules, then the routes, if Apply had put any, and releases the handle. A Watch that still runs then
// repairs nothing more.
func (h *Handle) Close() error {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	defer h.release()
	if h.applied == nil {
		return nil
	}
	c := *h.applied
	h.applied = nil
	return h.sweep(c)
}

// CleanUp removes what a killed process left: every rule tagged with c.Protocol, of both families, and the routes so tagged
// that are in c.Table or look like ours in any other. It needs no more of c, and must not be called beside a running instance.
func CleanUp(c Config) error {
	if err := c.validateProtocol(); err != nil {
		return err
	}
	h, err := Open()
	if err != nil {
		return err
	}
	defer h.release()
	return h.sweep(c)
}

// sweep removes everything that is tagged as ours.
func (h *Handle) sweep(c Config) error {
	owned, err := h.owned(c)
	if err != nil {
		return err
	}
	return h.remove(owned)
}

// compare returns the desired entries that the kernel lacks, and those tagged as ours that are not desired.
func (h *Handle) compare(c Config) (missing, leftover []entry, err error) {
	owned, err := h.owned(c)
	if err != nil {
		return nil, nil, err
	}
	wanted := desired(c)
	return without(wanted, owned), without(owned, wanted), nil
}
