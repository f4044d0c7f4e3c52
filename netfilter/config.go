package netfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Config says which flows are captured. Two programs on one host must differ in Table and Mask.
type Config struct {
	// Table is the name of the nft table, family inet; the guard's is the same with "_guard" behind it.
	Table string

	// Mask has the bits of the packet mark that are ours: no other bit is read or written.
	Mask uint32
	// LAN is the mark, within Mask, of captured packets.
	LAN uint32
	// Exempt is the mark, within Mask, of TCP packets that the rules have judged and left to the kernel, by which the guard
	// knows that the program is there. It is set only with FailClosed.
	Exempt uint32

	// Listen are the transparent listeners, at most one a family, each at an address of this host. A family without one
	// is not captured.
	Listen []netip.AddrPort
	// Interfaces are the only ones whose incoming packets are captured; they may appear later. Empty means all but the
	// Uplinks. The loopback interface is never captured.
	Interfaces []string
	// Uplinks are not captured when Interfaces is empty.
	Uplinks []string
	// Clients are the only sources that are captured.
	Clients []netip.Prefix
	// Bypass are destinations that are left to the kernel. The caller adds the prefixes of the capturing interfaces'
	// own networks: with bridge-nf-call-iptables=1 these rules see packets between two hosts of one bridge, too.
	Bypass []netip.Prefix
	// Ports are the TCP destination ports that are captured.
	Ports []PortRange

	// FailClosed refuses flows, with a reset, that would be captured but cannot be: as long as the process lives, those
	// for which there is no listener; after it was killed, all, by a guard table that outlives it. Otherwise the kernel
	// forwards them like any other.
	FailClosed bool
}

// PortRange are the ports from First to Last, both included.
type PortRange struct{ First, Last uint16 }

// String returns the range as nft(8) has it: 22 or 8000-8100.
func (r PortRange) String() string {
	if r.First == r.Last {
		return fmt.Sprint(r.First)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// guardSuffix makes the guard's name of the table's.
const guardSuffix = "_guard"

func guardName(table string) string { return table + guardSuffix }

// maxName bounds the name of a table, in bytes. The kernel takes 255 (NFT_NAME_MAXLEN of linux/netfilter/nf_tables.h), the
// guard's suffix included; 64 are enough for anything that is typed.
const maxName = 64

// maxInterface is the length of the longest interface name, in bytes (IFNAMSIZ of linux/if.h, without the final zero).
const maxInterface = 15

// loopback belongs to this host's own traffic: look-ups of the way back to clients have it as incoming interface.
const loopback = "lo"

// Validate names the first value that cannot work, and what to do about it. Apply calls it; it is for callers who want to
// know before they change anything.
func (c Config) Validate() error {
	if err := validateName(c.Table); err != nil {
		return err
	}
	if c.LAN == 0 || c.Exempt == 0 || c.LAN == c.Exempt || (c.LAN|c.Exempt)&^c.Mask != 0 {
		return fmt.Errorf("marks %#x and %#x are no two marks within the mask %#x: choose another --mark", c.LAN, c.Exempt, c.Mask)
	}
	if err := c.validateListen(); err != nil {
		return err
	}
	for _, name := range slices.Concat(c.Interfaces, c.Uplinks) {
		if err := validateInterface(name); err != nil {
			return err
		}
	}
	if slices.Contains(c.Interfaces, loopback) {
		return fmt.Errorf("interface %s carries this host's own traffic, which is not captured there: name another with --interface", loopback)
	}
	for _, prefix := range slices.Concat(c.Clients, c.Bypass) {
		if !prefix.IsValid() {
			return fmt.Errorf("%v among the clients or the exempt destinations: give an address with its prefix length", prefix)
		}
	}
	for _, ports := range c.Ports {
		if ports.First > ports.Last {
			return fmt.Errorf("port range %v runs backwards: give the lower port first", ports)
		}
	}
	return nil
}

func (c Config) validateListen() error {
	var ipv4, ipv6 int
	for _, listener := range c.Listen {
		address := listener.Addr()
		switch {
		case !address.IsValid() || address.IsUnspecified() || address.Is4In6() || address.Zone() != "" || listener.Port() == 0:
			return fmt.Errorf("tproxy cannot deliver to a listener on %v: bind it to a port of one address, such as 127.0.0.1 or ::1", listener)
		case address.Is4():
			ipv4++
		default:
			ipv6++
		}
	}
	if ipv4 > 1 || ipv6 > 1 || ipv4+ipv6 == 0 {
		return fmt.Errorf("%d IPv4 and %d IPv6 transparent listeners: there must be one, and no more than one of each", ipv4, ipv6)
	}
	return nil
}

// validateName keeps to names that nft(8) reads without quotation marks.
func validateName(table string) error {
	letter := func(r rune) bool { return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' }
	others := func(r rune) bool { return !letter(r) && !('0' <= r && r <= '9') && !strings.ContainsRune("_-.", r) }
	if table == "" || len(table) > maxName || !letter(rune(table[0])) || strings.ContainsFunc(table, others) {
		return fmt.Errorf("nft table %q: choose with --nft-table up to %d letters, digits, '_', '-' and '.', a letter first", table, maxName)
	}
	return nil
}

// validateInterface keeps to names that mean the same in netlink and in nft's text, where a final '*' is a wildcard.
func validateInterface(name string) error {
	others := func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/*"\`, r) }
	if name == "" || len(name) > maxInterface || strings.ContainsFunc(name, others) {
		return fmt.Errorf("%q is no name of a network interface: see ip link", name)
	}
	return nil
}
