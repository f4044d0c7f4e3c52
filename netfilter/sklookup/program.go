package sklookup

import (
	"encoding/binary"
	"net/netip"

	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// Fields of struct bpf_sk_lookup (linux/bpf.h), as offsets in bytes. Addresses are in the order of bytes that packets have,
// the local port in this machine's.
const (
	familyField    = 8
	protocolField  = 12
	localIP4Field  = 40
	localIP6Field  = 44
	localPortField = 60
	interfaceField = 64
)

// Verdicts of the program (enum sk_action of linux/bpf.h): the packet has no socket, or the one that was assigned or, without
// one, that which the kernel finds.
const (
	drop = 0
	pass = 1
)

// The key of the map of own addresses: struct bpf_lpm_trie_key of linux/bpf.h with an IPv6 address, in which an IPv4 one is mapped
// (RFC 4291 section 2.5.5.2).
const (
	keySize    = 4 + 16
	mappedBits = 96
)

// key is a prefix as the map has it.
func key(prefix netip.Prefix) any {
	bits := prefix.Bits()
	if prefix.Addr().Is4() {
		bits += mappedBits
	}
	address := prefix.Addr().As16()
	var k [keySize]byte
	binary.NativeEndian.PutUint32(k[:], uint32(bits))
	copy(k[4:], address[:])
	return k
}

// slots is the number of kinds of sockets: slotOf with every combination.
const slots = 8

// What distinguishes the slots.
const (
	slotIPv6 = 1
	slotUDP  = 2
	slotDNS  = 4
)

// slotOf is where a socket's entry is.
func slotOf(ipv6, udp, dns bool) (slot uint32) {
	if ipv6 {
		slot += slotIPv6
	}
	if udp {
		slot += slotUDP
	}
	if dns {
		slot += slotDNS
	}
	return slot
}

// Places on the program's stack, below the frame pointer.
const (
	numberAt = -4 // an interface's index, then a slot
	keyAt    = numberAt - keySize
)

// dnsPort is where servers are asked (RFC 1035 section 4.2).
const dnsPort = 53

// instructions is the program. R6 is its context, R7 the family and then the protocol, R8 the slot, R9 the socket.
func instructions(m maps) asm.Instructions {
	// find looks up what is on the stack at an offset. R0 is then the entry, 0 for none.
	find := func(fd int, at int32) asm.Instructions {
		return asm.Instructions{
			asm.LoadMapPtr(asm.R1, fd),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, at),
			asm.FnMapLookupElem.Call(),
		}
	}
	var mapped [4]byte
	mapped[2], mapped[3] = 0xff, 0xff
	parts := []asm.Instructions{
		// Only what came in on a capturing interface.
		{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R1, asm.R6, interfaceField, asm.Word),
			asm.StoreMem(asm.RFP, numberAt, asm.R1, asm.Word),
		},
		find(m.interfaces.FD(), numberAt),
		{asm.JEq.Imm(asm.R0, 0, "pass")},

		// Only to destinations that are not this host's.
		{
			asm.StoreImm(asm.RFP, keyAt, 8*16, asm.Word),
			asm.Mov.Imm(asm.R8, 0),
			asm.LoadMem(asm.R7, asm.R6, familyField, asm.Word),
			asm.JEq.Imm(asm.R7, unix.AF_INET6, "ipv6"),
			asm.StoreImm(asm.RFP, keyAt+4, 0, asm.Word),
			asm.StoreImm(asm.RFP, keyAt+8, 0, asm.Word),
			asm.StoreImm(asm.RFP, keyAt+12, int64(int32(binary.NativeEndian.Uint32(mapped[:]))), asm.Word),
			asm.LoadMem(asm.R1, asm.R6, localIP4Field, asm.Word),
			asm.StoreMem(asm.RFP, keyAt+16, asm.R1, asm.Word),
			asm.Ja.Label("own"),
			asm.Mov.Imm(asm.R8, slotIPv6).WithSymbol("ipv6"),
		},
	}
	for word := int16(0); word < 16; word += 4 {
		parts = append(parts, asm.Instructions{
			asm.LoadMem(asm.R1, asm.R6, localIP6Field+word, asm.Word),
			asm.StoreMem(asm.RFP, keyAt+4+word, asm.R1, asm.Word),
		})
	}
	own := find(m.own.FD(), keyAt)
	own[0] = own[0].WithSymbol("own")
	others := find(m.sockets.FD(), numberAt)
	parts = append(parts, own, asm.Instructions{
		asm.JNE.Imm(asm.R0, 0, "pass"),

		// The socket for DNS, then the one for all else.
		asm.LoadMem(asm.R7, asm.R6, protocolField, asm.Word),
		asm.JNE.Imm(asm.R7, unix.IPPROTO_UDP, "tcp"),
		asm.Add.Imm(asm.R8, slotUDP),
		asm.LoadMem(asm.R1, asm.R6, localPortField, asm.Word).WithSymbol("tcp"),
		asm.JNE.Imm(asm.R1, dnsPort, "others"),
		asm.Mov.Reg(asm.R9, asm.R8),
		asm.Add.Imm(asm.R9, slotDNS),
		asm.StoreMem(asm.RFP, numberAt, asm.R9, asm.Word),
	}, find(m.sockets.FD(), numberAt), asm.Instructions{
		asm.JNE.Imm(asm.R0, 0, "assign"),
		asm.StoreMem(asm.RFP, numberAt, asm.R8, asm.Word).WithSymbol("others"),
	}, others, asm.Instructions{
		asm.JNE.Imm(asm.R0, 0, "assign"),
		// Nobody listens: over TCP a service of this host that has the port must not get it. UDP that was not captured, such
		// as that of others' transparent sockets, is none of ours.
		asm.JEq.Imm(asm.R7, unix.IPPROTO_UDP, "pass"),
		asm.Mov.Imm(asm.R0, drop),
		asm.Return(),

		asm.Mov.Reg(asm.R9, asm.R0).WithSymbol("assign"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Reg(asm.R2, asm.R9),
		asm.Mov.Imm(asm.R3, 0), // no flags: the kernel chooses among the sockets of a port
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.FnSkRelease.Call(),
		asm.JEq.Imm(asm.R8, 0, "pass"),
		asm.Mov.Imm(asm.R0, drop),
		asm.Return(),

		asm.Mov.Imm(asm.R0, pass).WithSymbol("pass"),
		asm.Return(),
	})
	var all asm.Instructions
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}
