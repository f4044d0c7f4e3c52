package netfilter

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// legacyTable is the table filter of iptables-legacy for one family, as the kernel has it (struct ipt_getinfo and struct
// ipt_get_entries of linux/netfilter_ipv4/ip_tables.h).
type legacyTable struct {
	layout  legacyLayout
	entries []byte
	heads   [hooks]uint32 // where the built-in chains begin
	ends    [hooks]uint32 // where their policies are
}

// Hooks of the network layer (linux/netfilter.h).
const (
	legacyInput   = 1
	legacyForward = 2
	hooks         = 5
)

// legacyLayout is where struct ipt_entry, or ip6t_entry, has its parts.
type legacyLayout struct {
	level      int    // of the socket options
	list       string // in /proc, of the tables in use
	command    string
	address    int // length
	interfaces int
	protocol   int
	flags      int
	offsets    int  // target_offset and next_offset
	head       int  // length of all
	domain     byte // of sockets
}

func legacyLayouts() map[byte]legacyLayout {
	return map[byte]legacyLayout{
		unix.NFPROTO_IPV4: {unix.SOL_IP, "ip_tables_names", "iptables-legacy", 4, 16, 80, 82, 88, 112, unix.AF_INET},
		unix.NFPROTO_IPV6: {unix.SOL_IPV6, "ip6_tables_names", "ip6tables-legacy", 16, 64, 128, 131, 140, 168, unix.AF_INET6},
	}
}

// readLegacy returns the table of a family; nil if it is not in use. It is asked for only if it is, because the question alone
// would have the kernel set it up.
func readLegacy(family byte) (*legacyTable, error) {
	layout := legacyLayouts()[family]
	names, err := os.ReadFile("/proc/thread-self/net/" + layout.list)
	if err != nil || !slices.Contains(strings.Fields(string(names)), "filter") {
		return nil, nil // no such file: the module is not there
	}
	socket, err := unix.Socket(int(layout.domain), unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // any does; a raw one needs CAP_NET_RAW
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(socket)
	const getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; those of IPv6 are the same
	const nameLength, infoLength, entriesHead = 32, 84, 40
	info := make([]byte, infoLength)
	copy(info, "filter")
	if err := getOption(socket, layout.level, getInfo, info); err != nil {
		return nil, err
	}
	table := &legacyTable{layout: layout}
	for i := range table.heads {
		table.heads[i] = binary.NativeEndian.Uint32(info[nameLength+4+4*i:])
		table.ends[i] = binary.NativeEndian.Uint32(info[nameLength+4+4*hooks+4*i:])
	}
	size := binary.NativeEndian.Uint32(info[infoLength-4:])
	entries := make([]byte, entriesHead+int(size))
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[nameLength:], size)
	if err := getOption(socket, layout.level, getEntries, entries); err != nil {
		return nil, err
	}
	table.entries = entries[entriesHead:]
	return table, nil
}

// getOption is getsockopt(2) with an argument that the kernel reads, too.
func getOption(socket, level, option int, value []byte) error {
	length := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}

// legacyEntry is one rule.
type legacyEntry struct {
	at, next uint32
	raw      []byte // from the entry on
	target   int    // offset
}

func (l *legacyTable) entry(at uint32) (legacyEntry, bool) {
	if int(at)+l.layout.head > len(l.entries) {
		return legacyEntry{}, false
	}
	raw := l.entries[at:]
	target := int(binary.NativeEndian.Uint16(raw[l.layout.offsets:]))
	length := int(binary.NativeEndian.Uint16(raw[l.layout.offsets+2:]))
	const targetHead = 32 // struct xt_entry_target
	if target < l.layout.head || length < target+targetHead+4 || length > len(raw) {
		return legacyEntry{}, false
	}
	return legacyEntry{at, at + uint32(length), raw[:length], target}, true
}

// Verdicts of a standard target: accept, drop and return; others are where to go on (linux/netfilter/x_tables.h).
const (
	legacyAccept = -2
	legacyDrop   = -1
	legacyReturn = -5
)

// legacy runs the packet through a built-in chain. What it does not know it takes, as a trial does everywhere, for something that
// lets pass.
func (t *trial) legacy(l *legacyTable, hook int) fate {
	return t.followLegacy(l, l.heads[hook], l.ends[hook], 0)
}

func (t *trial) followLegacy(l *legacyTable, at, policy uint32, depth int) fate {
	for depth <= maxDepth {
		if t.steps++; t.steps > maxSteps {
			return accepted
		}
		e, whole := l.entry(at)
		if !whole {
			return accepted
		}
		matches := t.matchLegacy(l, e)
		if matches == no {
			at = e.next
			continue
		}
		name, verdict := cutName(e.raw[e.target+2:]), int32(binary.NativeEndian.Uint32(e.raw[e.target+32:]))
		switch {
		case name == "REJECT" || name == "" && verdict == legacyDrop:
			if matches == yes {
				t.where, t.chain = "a rule", ""
				if e.at == policy {
					t.where = "its policy DROP"
				}
				return ended
			}
		case name == "" && verdict == legacyAccept || name == "NFQUEUE":
			return accepted
		case name == "" && verdict == legacyReturn:
			if matches == yes {
				return goesOn
			}
		case name == "" && verdict >= 0:
			const gotoFlag = 2 // IPT_F_GOTO
			result := t.followLegacy(l, uint32(verdict), policy, depth+1)
			if result == accepted || matches == yes && (result != goesOn || e.raw[l.layout.flags]&gotoFlag != 0) {
				return result
			}
		case name == "ERROR": // the end of the table
			return goesOn
		}
		at = e.next
	}
	return accepted
}

// cutName is the name of an extension, which fills 29 bytes with zeros.
func cutName(raw []byte) string {
	name, _, _ := bytes.Cut(raw[:29], []byte{0})
	return string(name)
}

// matchLegacy reports whether a rule matches.
func (t *trial) matchLegacy(l *legacyTable, e legacyEntry) answer {
	const invertIn, invertOut, invertSource, invertDestination, fragment, invertProtocol = 0x01, 0x02, 0x08, 0x10, 0x20, 0x40
	invert := e.raw[l.layout.flags+1]
	size := l.layout.address
	field := func(i int) []byte { return e.raw[i*size : (i+1)*size] }
	source, destination := t.packet.network[len(t.packet.network)-2*size:][:size], t.packet.network[len(t.packet.network)-size:]
	names := e.raw[l.layout.interfaces:]
	protocol := binary.NativeEndian.Uint16(e.raw[l.layout.protocol:])
	for _, condition := range []bool{
		masksEqual(source, field(0), field(2)) != (invert&invertSource != 0),
		masksEqual(destination, field(1), field(3)) != (invert&invertDestination != 0),
		masksEqual(interfaceKey(t.packet.incoming), names[:16], names[32:48]) != (invert&invertIn != 0),
		masksEqual(interfaceKey(t.packet.outgoing), names[16:32], names[48:64]) != (invert&invertOut != 0),
		protocol == 0 || (protocol == uint16(t.packet.protocol)) != (invert&invertProtocol != 0),
	} {
		if !condition {
			return no
		}
	}
	result := yes
	if e.raw[l.layout.flags]&1 != 0 && size == 4 || invert&fragment != 0 { // IPT_F_FRAG
		result = maybe
	}
	for at := l.layout.head; at+32 <= e.target; {
		length := int(binary.NativeEndian.Uint16(e.raw[at:]))
		if length < 32 || at+length > e.target {
			return maybe
		}
		name, revision := cutName(e.raw[at+2:]), uint32(e.raw[at+31])
		info, err := xt.Unmarshal(name, xt.TableFamily(t.packet.family), revision, slices.Clone(e.raw[at+32:at+length]))
		if err != nil {
			return maybe
		}
		switch t.extension(&expr.Match{Name: name, Rev: revision, Info: info}) {
		case no:
			return no
		case maybe:
			result = maybe
		}
		at += length
	}
	return result
}

// masksEqual compares under a mask.
func masksEqual(a, b, mask []byte) bool {
	for i := range mask {
		if (a[i]^b[i])&mask[i] != 0 {
			return false
		}
	}
	return true
}

// legacyObstacle is what iptables-legacy does to the packet at a hook.
func (t *trial) legacyObstacle(l *legacyTable, hook int, c *Config, way Way) (Obstacle, bool) {
	if l == nil || t.legacy(l, hook) != ended {
		return Obstacle{}, false
	}
	if hook == legacyForward {
		return Obstacle{
			Code:  "unforwarded",
			Found: fmt.Sprintf("%s: %s of chain FORWARD drops what clients send directly, which --gateway is to forward (in by %s)", l.layout.command, t.where, way.Name),
			Cure: fmt.Sprintf("%s -I FORWARD -i %s -j ACCEPT && %[1]s -I FORWARD -o %[2]s -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
				l.layout.command, way.Name),
		}, true
	}
	return Obstacle{
		Code:  "dropped",
		Found: fmt.Sprintf("%s: %s of chain INPUT drops captured packets, which are delivered to this host (in by %s)", l.layout.command, t.where, t.packet.incoming),
		Cure:  fmt.Sprintf("%s -I INPUT -m mark --mark %#x/%#x -j ACCEPT", l.layout.command, t.packet.mark, c.Mask),
	}, true
}
