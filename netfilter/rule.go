package netfilter

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// table, chain, rule and clause say what there is to be: the kernel gets its expressions and a reader gets nft's text from
// the same value.
type table struct {
	name   string
	owned  bool // dies with our connection
	sets   []set
	chains []chain // those that others jump to come first
}

type chain struct {
	name  string
	hook  *hook // nil: others jump to it
	rules []rule
}

// hook is where packets enter a chain; what no rule decides goes on as if there were no chain.
type hook struct {
	text     string
	number   *nftables.ChainHook
	priority *nftables.ChainPriority
	kind     nftables.ChainType // empty: filter
}

// rule is applied clause after clause, up to the first that does not match.
type rule struct {
	comment string // at most maxComment bytes
	clauses []clause
}

// clause is a match or a statement.
type clause struct {
	text        string
	expressions []expr.Any
}

// maxComment is the length of the longest comment that nft(8) takes (NFTNL_UDATA_COMMENT_MAXLEN of libnftnl is 128 bytes,
// with the final zero).
const maxComment = 127

// Registers of nf_tables. Each clause loads what it needs anew.
const (
	register  uint32 = unix.NFT_REG_1
	register2 uint32 = unix.NFT_REG_2
)

// equal and unequal compare what is in the register.
func equal(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: data}
}

func unequal(data []byte) expr.Any {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: data}
}

// lookup matches if what is in the register is in the set, or with invert if it is not.
func lookup(set string, invert bool) expr.Any {
	return &expr.Lookup{SourceRegister: register, SetName: set, Invert: invert}
}

// masked keeps bits of the register, which has as many bytes as mask, and adds others.
func masked(mask, add []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: register, DestRegister: register, Len: uint32(len(mask)), Mask: mask, Xor: add}
}

func meta(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: register} }

// native is a number in this machine's order of bytes, that of all that is not out of a packet.
func native(number uint32) []byte { return binaryutil.NativeEndian.PutUint32(number) }

// family is what rules say in one way about IPv4, in another about IPv6.
type family struct {
	number        byte   // of meta nfproto
	proto         string // in meta nfproto
	header        string // of addresses
	suffix        string // of the names of sets
	kind          nftables.SetDatatype
	source, bytes uint32 // where the header has its source address, with the destination behind it, and their length
}

func families() []family {
	return []family{
		// RFC 791, section 3.1, and RFC 8200, section 3.
		{unix.NFPROTO_IPV4, "ipv4", "ip", "4", nftables.TypeIPAddr, 12, 4},
		{unix.NFPROTO_IPV6, "ipv6", "ip6", "6", nftables.TypeIP6Addr, 8, 16},
	}
}

// has reports whether an address is of the family.
func (f family) has(address netip.Addr) bool { return address.BitLen() == int(8*f.bytes) }

func (f family) is() clause {
	return clause{"meta nfproto " + f.proto, f.match()}
}

func (f family) isNot() clause {
	return clause{"meta nfproto != " + f.proto, []expr.Any{meta(expr.MetaKeyNFPROTO), unequal([]byte{f.number})}}
}

func (f family) match() []expr.Any {
	return []expr.Any{meta(expr.MetaKeyNFPROTO), equal([]byte{f.number})}
}

// sourceNotIn matches packets of the family whose source address is not in the set.
func (f family) sourceNotIn(set string) clause {
	return clause{f.header + " saddr != @" + set, append(f.match(), f.address(f.source), lookup(set, true))}
}

// destinationIn matches packets of the family whose destination address is in the set.
func (f family) destinationIn(set string) clause {
	return clause{f.header + " daddr @" + set, append(f.match(), f.address(f.source+f.bytes), lookup(set, false))}
}

// destinationNotIn matches packets of the family whose destination address is not in the set.
func (f family) destinationNotIn(set string) clause {
	return clause{f.header + " daddr != @" + set, append(f.match(), f.address(f.source+f.bytes), lookup(set, true))}
}

func (f family) address(offset uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.bytes}
}

// deliver assigns the packet to the listener; it does not match if there is none.
func (f family) deliver(listener netip.AddrPort) clause {
	return clause{fmt.Sprintf("tproxy %s to %v", f.header, listener), []expr.Any{
		&expr.Immediate{Register: register, Data: listener.Addr().AsSlice()},
		&expr.Immediate{Register: register2, Data: network(listener.Port())},
		&expr.TProxy{Family: f.number, TableFamily: unix.NFPROTO_INET, RegAddr: register, RegPort: register2},
	}}
}

func matchTCP() []expr.Any {
	return []expr.Any{meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP})}
}

func tcp() clause { return clause{"meta l4proto tcp", matchTCP()} }

func notTCP() clause {
	return clause{"meta l4proto != tcp", []expr.Any{meta(expr.MetaKeyL4PROTO), unequal([]byte{unix.IPPROTO_TCP})}}
}

func matchUDP() []expr.Any {
	return []expr.Any{meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_UDP})}
}

func udp() clause { return clause{"meta l4proto udp", matchUDP()} }

func notUDP() clause {
	return clause{"meta l4proto != udp", []expr.Any{meta(expr.MetaKeyL4PROTO), unequal([]byte{unix.IPPROTO_UDP})}}
}

func protocolNotIn(set string) clause {
	return clause{"meta l4proto != @" + set, []expr.Any{meta(expr.MetaKeyL4PROTO), lookup(set, true)}}
}

// sourcePort and destinationPort are where the headers of TCP and UDP have them (RFC 9293, section 3.1, and RFC 768).
func sourcePort() expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2}
}

func destinationPort() expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}
}

// network is a number in the order of bytes that packets have.
func network(number uint16) []byte { return binary.BigEndian.AppendUint16(nil, number) }

func portNotIn(set string) clause {
	return clause{"tcp dport != @" + set, append(matchTCP(), destinationPort(), lookup(set, true))}
}

func tcpPort(port uint16) clause {
	return clause{fmt.Sprintf("tcp dport %d", port), append(matchTCP(), destinationPort(), equal(network(port)))}
}

func udpPort(port uint16) clause {
	return clause{fmt.Sprintf("udp dport %d", port), append(matchUDP(), destinationPort(), equal(network(port)))}
}

func udpPortNot(port uint16) clause {
	return clause{fmt.Sprintf("udp dport != %d", port), append(matchUDP(), destinationPort(), unequal(network(port)))}
}

func udpPortIn(set string) clause {
	return clause{"udp dport @" + set, append(matchUDP(), destinationPort(), lookup(set, false))}
}

func udpPortNotIn(set string) clause {
	return clause{"udp dport != @" + set, append(matchUDP(), destinationPort(), lookup(set, true))}
}

func udpSource(port uint16) clause {
	return clause{fmt.Sprintf("udp sport %d", port), append(matchUDP(), sourcePort(), equal(network(port)))}
}

// setUDPSource changes the source port, and the checksum by as much. It may follow only what has matched UDP. The checksum
// covers the port in the header alone (RFC 768): the pseudo header, which has none, stays as it is.
func setUDPSource(port uint16) clause {
	return clause{fmt.Sprintf("udp sport set %d", port), []expr.Any{
		&expr.Immediate{Register: register, Data: network(port)},
		&expr.Payload{
			OperationType: expr.PayloadWrite, SourceRegister: register,
			Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2,
			CsumType: expr.CsumTypeInet, CsumOffset: 6,
		},
	}}
}

// notOpening matches TCP packets other than the first of a connection (RFC 9293, section 3.1).
func notOpening() clause {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
	return clause{"tcp flags & (fin | syn | rst | ack) != syn", append(matchTCP(),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		masked([]byte{fin | syn | rst | ack}, []byte{0}), unequal([]byte{syn}))}
}

func incomingIn(set string) clause {
	return clause{"iifname @" + set, []expr.Any{meta(expr.MetaKeyIIFNAME), lookup(set, false)}}
}

func incomingNotIn(set string) clause {
	return clause{"iifname != @" + set, []expr.Any{meta(expr.MetaKeyIIFNAME), lookup(set, true)}}
}

// destinationKindIn matches by what kind of address the routing tables take the destination for.
func destinationKindIn(set string) clause {
	return clause{"fib daddr type @" + set, []expr.Any{
		&expr.Fib{Register: register, ResultADDRTYPE: true, FlagDADDR: true}, lookup(set, false),
	}}
}

// ofTransparentSocket matches packets for which this host has a socket with IP_TRANSPARENT.
func ofTransparentSocket() clause {
	return clause{"socket transparent 1", []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: register}, equal([]byte{1}),
	}}
}

func reply() clause {
	return clause{"ct direction reply", []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: register}, equal([]byte{expr.CtDirReply}),
	}}
}

// connectionMarked and setConnectionMark are about the mark that connection tracking keeps for a connection.
func connectionMarked(mark, mask uint32) clause {
	return clause{fmt.Sprintf("ct mark & %#08x == %#08x", mask, mark), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: register}, masked(native(mask), native(0)), equal(native(mark)),
	}}
}

func setConnectionMark(mark, mask uint32) clause {
	return clause{fmt.Sprintf("ct mark set ct mark & %#08x | %#08x", ^mask, mark), []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: register}, masked(native(^mask), native(mark)),
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: register},
	}}
}

func inState(state string, bit uint32) clause {
	return clause{"ct state " + state, []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: register}, masked(native(bit), native(0)), unequal(native(0)),
	}}
}

func marked(mark, mask uint32) clause {
	return clause{fmt.Sprintf("meta mark & %#08x == %#08x", mask, mark), []expr.Any{
		meta(expr.MetaKeyMARK), masked(native(mask), native(0)), equal(native(mark)),
	}}
}

// setMark replaces the bits of the packet's mark that mask has.
func setMark(mark, mask uint32) clause {
	return clause{fmt.Sprintf("meta mark set meta mark & %#08x | %#08x", ^mask, mark), []expr.Any{
		meta(expr.MetaKeyMARK), masked(native(^mask), native(mark)),
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: register},
	}}
}

// untracked keeps connection tracking from looking at a packet.
func untracked() clause { return clause{"notrack", []expr.Any{&expr.Notrack{}}} }

func accept() clause { return verdict("accept", expr.VerdictAccept, "") }

// discard ends a packet without a word.
func discard() clause { return verdict("drop", expr.VerdictDrop, "") }

// leave ends the chain, so that the packet goes on as if there were no rules.
func leave() clause { return verdict("return", expr.VerdictReturn, "") }

func jump(chain string) clause { return verdict("jump "+chain, expr.VerdictJump, chain) }

// follow goes on in the chain and, unlike jump, does not come back.
func follow(chain string) clause { return verdict("goto "+chain, expr.VerdictGoto, chain) }

func verdict(text string, kind expr.VerdictKind, chain string) clause {
	return clause{text, []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}}
}

// refuse answers with a reset.
func refuse() clause {
	return clause{"reject with tcp reset", []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

// unreachable answers as a host does where nothing has the port.
func unreachable() clause { return icmp("port-unreachable", unix.NFT_REJECT_ICMPX_PORT_UNREACH) }

// prohibit answers as a firewall does.
func prohibit() clause { return icmp("admin-prohibited", unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED) }

// icmp answers with an error of the packet's family.
func icmp(name string, code byte) clause {
	return clause{"reject with icmpx type " + name, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: code}}}
}
