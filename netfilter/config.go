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
	// Exempt is the mark, within Mask, of the program's own sockets, by which the rules know the answers of the DNS
	// listeners. With FailClosed it is also set on packets that the rules have judged and left to the kernel, by which the
	// guard knows that the program is there.
	Exempt uint32

	// Listen are the transparent listeners, at most one a family, each at an address of this host. A family without one
	// is not captured. With CapturedUDP there is a UDP socket at each as well.
	Listen []netip.AddrPort
	// Steered says that something else assigns the listeners: the rules mark packets only. It is for packets of bridges that
	// pass the rules as frames (bridge-nf-call-iptables), of which the kernel forgets the listener that tproxy assigns. A
	// captured connection is then known by its mark in connection tracking, within Mask as well: whoever assigns has to see to
	// it that a packet of any other connection finds no listener, or the one of the service that it is for.
	Steered bool
	// Interfaces are the only ones whose incoming packets are captured; they may appear later. Empty means all but the
	// Uplinks. The loopback interface is never captured.
	Interfaces []string
	// Uplinks are not captured when Interfaces is empty.
	Uplinks []string
	// Clients are the only sources that are captured.
	Clients []netip.Prefix
	// Neighbours are the prefixes of the capturing interfaces' own networks. Nothing to them is captured or refused: with
	// bridge-nf-call-iptables=1 these rules see packets between two hosts of one bridge, too.
	Neighbours []netip.Prefix
	// Bypass are destinations that are left to the kernel, but for DNS queries that are captured and for Always.
	Bypass []netip.Prefix
	// Always are destinations that are captured on every TCP port. UDP to them is refused, so that clients turn to TCP at
	// once, but for CapturedUDP; captured DNS queries are answered like others. It is meant for addresses that only the
	// program can tell the meaning of.
	Always []netip.Prefix
	// Ports are the TCP destination ports that are captured.
	Ports []PortRange
	// DNS are the queries that are captured.
	DNS DNS
	// RefusedUDP and DroppedUDP are UDP destination ports of which no packet of Clients passes: it is answered as a host
	// does where nothing has the port, so that clients turn to TCP at once, or not at all. Bypass exempts from them, and
	// queries that are captured are none of theirs. CapturedUDP are those of which packets go to the listeners, unless they
	// are among the others. All other UDP is left to the kernel. The sockets from which the captured are answered carry the
	// mark Exempt.
	RefusedUDP, DroppedUDP, CapturedUDP []PortRange

	// Router adds what a router does for the flows of Clients that it does not capture: to other networks than theirs they
	// leave with an address of this host (IPv6 ones only if theirs is a unique local one, RFC 4193), and the segments of
	// all TCP that is forwarded fit the way.
	Router bool
	// Output says what of this host's own programs is captured, by the same Ports, Bypass, DNS and UDP.
	Output Output

	// FailClosed refuses what would be captured but cannot be, TCP with a reset and UDP with an ICMP error: as long as the
	// process lives, that for which there is no listener; after it was killed, all, by a guard table that outlives it.
	// Otherwise the kernel forwards it like anything else.
	FailClosed bool
	// GuardClients are the sources that a standing guard refuses ([Guard]), which may be there before any client's network
	// is known. None stand for all.
	GuardClients []netip.Prefix
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
	if o := c.Output; o.captured() && (o.Mark&^c.Mask != 0 || o.Mark == c.LAN || o.Mark == c.Exempt) {
		return fmt.Errorf("mark %#x of this host's own programs is no third one within the mask %#x: choose another --mark", o.Mark, c.Mask)
	}
	if err := validateListen("transparent listeners", c.Listen); err != nil {
		return err
	}
	if err := c.DNS.validate(c.Listen, c.capturesUDP()); err != nil {
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
	for _, prefix := range slices.Concat(c.Clients, c.Neighbours, c.Bypass, c.Always, c.GuardClients) {
		if !prefix.IsValid() {
			return fmt.Errorf("%v among the prefixes of clients or destinations: give an address with its prefix length", prefix)
		}
	}
	for _, ports := range slices.Concat(c.Ports, c.RefusedUDP, c.DroppedUDP, c.CapturedUDP) {
		if ports.First > ports.Last {
			return fmt.Errorf("port range %v runs backwards: give the lower port first", ports)
		}
	}
	return nil
}

// validateListen wants one listener for a family or for both; what names them.
func validateListen(what string, listen []netip.AddrPort) error {
	var ipv4, ipv6 int
	for _, listener := range listen {
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
		return fmt.Errorf("%d IPv4 and %d IPv6 %s: there must be one, and no more than one of each", ipv4, ipv6, what)
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
