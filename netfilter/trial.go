package netfilter

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// ruleset is what other programs have in nf_tables, read as far as a trial asks for it.
type ruleset struct {
	netlink *nftables.Conn
	chains  []*nftables.Chain
	rules   map[string][]*nftables.Rule
	sets    map[string][]nftables.SetElement // nil for one that cannot be read
}

// key names a chain or a set of a table.
func key(table *nftables.Table, name string) string {
	return fmt.Sprint(table.Family, " ", table.Name, " ", name)
}

func readRuleset() (*ruleset, error) {
	netlink, err := nftables.New()
	if err != nil {
		return nil, err
	}
	chains, err := netlink.ListChains()
	if err != nil {
		return nil, err
	}
	return &ruleset{netlink, chains, map[string][]*nftables.Rule{}, map[string][]nftables.SetElement{}}, nil
}

// hooked are the chains at a hook that see packets of a family, in their order.
func (r *ruleset) hooked(hook nftables.ChainHook, family byte) []*nftables.Chain {
	var found []*nftables.Chain
	for _, c := range r.chains {
		sees := c.Table.Family == nftables.TableFamilyINet || byte(c.Table.Family) == family
		if sees && c.Hooknum != nil && *c.Hooknum == hook && c.Priority != nil {
			found = append(found, c)
		}
	}
	slices.SortStableFunc(found, func(a, b *nftables.Chain) int { return cmp.Compare(*a.Priority, *b.Priority) })
	return found
}

func (r *ruleset) chain(table *nftables.Table, name string) *nftables.Chain {
	i := slices.IndexFunc(r.chains, func(c *nftables.Chain) bool {
		return c.Name == name && c.Table.Name == table.Name && c.Table.Family == table.Family
	})
	if i < 0 {
		return nil
	}
	return r.chains[i]
}

func (r *ruleset) rulesOf(c *nftables.Chain) []*nftables.Rule {
	name := key(c.Table, c.Name)
	rules, known := r.rules[name]
	if !known {
		rules, _ = r.netlink.GetRules(c.Table, c) // a chain that cannot be read ends no packet
		r.rules[name] = rules
	}
	return rules
}

// elements are those of a set; nil, and not just none, if it cannot be read.
func (r *ruleset) elements(table *nftables.Table, set string) []nftables.SetElement {
	name := key(table, set)
	elements, known := r.sets[name]
	if !known {
		found, err := r.netlink.GetSetElements(&nftables.Set{Table: table, Name: set})
		if err == nil {
			elements = append([]nftables.SetElement{}, found...)
		}
		r.sets[name] = elements
	}
	return elements
}

// sample is a packet as a trial sees it.
type sample struct {
	family             byte
	protocol           byte
	incoming           string    // interface
	outgoing           string    // interface; empty at hooks that know none
	mark, connection   uint32    // its own mark, and that in connection tracking
	network, transport []byte    // headers
	ports              PortRange // those for which its destination port stands
}

// fate is what becomes of a packet.
type fate uint8

const (
	goesOn    fate = iota // to the next rule, and at the end to the next chain
	accepted              // by a chain
	ended                 // dropped or refused
	rewritten             // its addresses were translated
)

// trial follows a packet through chains. It knows nothing for sure that it does not understand: a rule that may match counts if it
// accepts, and not if it ends the packet. So what it says is ended is.
type trial struct {
	*ruleset
	packet sample
	steps  int    // bound the work
	where  string // by what the packet was ended
	chain  string // in which chain
}

// maxSteps bounds the number of rules that a trial looks at.
const maxSteps = 20_000

// pass runs the packet through a base chain.
func (t *trial) pass(base *nftables.Chain) fate {
	result := t.follow(base, 0)
	if result == goesOn && base.Policy != nil && *base.Policy == nftables.ChainPolicyDrop {
		t.where, t.chain = "its policy drop", base.Name
		return ended
	}
	return result
}

// maxDepth is how deep chains call one another (NFT_JUMP_STACK_SIZE of net/netfilter/nf_tables.h).
const maxDepth = 16

func (t *trial) follow(c *nftables.Chain, depth int) fate {
	if c == nil || depth > maxDepth {
		return accepted
	}
	for _, rule := range t.rulesOf(c) {
		if t.steps++; t.steps > maxSteps {
			return accepted
		}
		result, returned := t.apply(rule, c, depth)
		if result != goesOn {
			return result
		}
		if returned {
			return goesOn
		}
	}
	return goesOn
}

// registers of a rule (NFT_REG_1 to NFT_REG32_15 of linux/netfilter/nf_tables.h), and which of their bytes are known.
type registers struct {
	bytes  [64]byte
	known  [64]bool
	native bool // what was loaded last is a number in this machine's order of bytes
}

func registerAt(number uint32) int {
	if number >= unix.NFT_REG32_00 {
		return int(number-unix.NFT_REG32_00) * 4
	}
	return int(number-1) * 16
}

func (r *registers) store(number uint32, data []byte) {
	at := registerAt(number)
	for i := range (len(data) + 3) / 4 * 4 {
		if at+i >= len(r.bytes) || at+i < 0 {
			return
		}
		r.known[at+i] = true
		r.bytes[at+i] = 0
		if i < len(data) {
			r.bytes[at+i] = data[i]
		}
	}
}

func (r *registers) forget(number uint32) {
	at := registerAt(number)
	for i := at; i >= 0 && i < at+16 && i < len(r.known); i++ {
		r.known[i] = false
	}
}

func (r *registers) load(number uint32, length int) ([]byte, bool) {
	at := registerAt(number)
	if at < 0 || at+length > len(r.bytes) || slices.Contains(r.known[at:at+length], false) {
		return nil, false
	}
	return r.bytes[at : at+length], true
}

// answer is whether something matches.
type answer uint8

const (
	no answer = iota
	yes
	maybe
)

func is(condition bool) answer {
	if condition {
		return yes
	}
	return no
}

// apply is one rule: what becomes of the packet, and whether the chain ends.
func (t *trial) apply(rule *nftables.Rule, c *nftables.Chain, depth int) (result fate, returned bool) {
	var reg registers
	sure := true
	for _, e := range rule.Exprs {
		matches := yes
		var verdict *expr.Verdict
		switch e := e.(type) {
		case *expr.Meta:
			if e.SourceRegister {
				t.setMeta(e, &reg, sure)
			} else {
				t.loadMeta(e, &reg)
			}
		case *expr.Payload:
			t.loadPayload(e, &reg)
		case *expr.Ct:
			t.loadCt(e, &reg)
		case *expr.Fib:
			reg.forget(e.Register)
			if e.ResultADDRTYPE && e.FlagDADDR {
				// What is captured is for other hosts.
				reg.store(e.Register, native(unix.RTN_UNICAST))
			}
		case *expr.Immediate:
			reg.store(e.Register, e.Data)
		case *expr.Bitwise:
			value, known := reg.load(e.SourceRegister, int(e.Len))
			if known && len(e.Mask) == int(e.Len) && len(e.Xor) == int(e.Len) {
				changed := make([]byte, e.Len)
				for i := range changed {
					changed[i] = value[i]&e.Mask[i] ^ e.Xor[i]
				}
				reg.store(e.DestRegister, changed)
			} else {
				reg.forget(e.DestRegister)
			}
		case *expr.Cmp:
			matches = compare(e, &reg)
		case *expr.Range:
			matches = maybe
			if value, known := reg.load(e.Register, len(e.FromData)); known && !reg.native {
				within := bytes.Compare(value, e.FromData) >= 0 && bytes.Compare(value, e.ToData) <= 0
				matches = is(within == (e.Op == expr.CmpOpEq))
			}
		case *expr.Lookup:
			matches, verdict = t.lookup(e, c.Table, &reg)
		case *expr.Match:
			matches = t.extension(e)
		case *expr.Limit, *expr.Quota, *expr.Connlimit:
			matches = maybe
		case *expr.Verdict:
			verdict = e
		case *expr.Reject:
			verdict = &expr.Verdict{Kind: expr.VerdictDrop}
		case *expr.Target:
			switch e.Name {
			case "REJECT", "DROP":
				verdict = &expr.Verdict{Kind: expr.VerdictDrop}
			case "DNAT", "REDIRECT":
				if sure {
					t.where, t.chain = fmt.Sprintf("rule handle %d, %s", rule.Handle, e.Name), c.Name
					return rewritten, false
				}
			case "MARK", "CONNMARK":
				t.targetMark(e, sure)
			}
		case *expr.NAT:
			if e.Type == expr.NATTypeDestNAT && sure {
				t.where, t.chain = fmt.Sprintf("rule handle %d, dnat", rule.Handle), c.Name
				return rewritten, false
			}
		case *expr.Redir:
			if sure {
				t.where, t.chain = fmt.Sprintf("rule handle %d, redirect", rule.Handle), c.Name
				return rewritten, false
			}
		case *expr.Counter, *expr.Log, *expr.Notrack, *expr.Objref, *expr.Masq:
		default:
			matches = maybe
		}
		switch matches {
		case no:
			return goesOn, false
		case maybe:
			sure = false
		}
		if verdict != nil {
			return t.decide(verdict, rule, c, depth, sure)
		}
	}
	return goesOn, false
}

// decide is a verdict of a rule that matches, for sure or not.
func (t *trial) decide(v *expr.Verdict, rule *nftables.Rule, c *nftables.Chain, depth int, sure bool) (result fate, returned bool) {
	switch v.Kind {
	case expr.VerdictAccept, expr.VerdictQueue:
		return accepted, false
	case expr.VerdictDrop:
		if !sure {
			return goesOn, false
		}
		t.where, t.chain = fmt.Sprintf("rule handle %d", rule.Handle), c.Name
		return ended, false
	case expr.VerdictReturn:
		return goesOn, sure
	case expr.VerdictJump, expr.VerdictGoto:
		before := *t
		result := t.follow(t.ruleset.chain(c.Table, v.Chain), depth+1)
		if !sure && result != accepted {
			steps := t.steps
			*t = before
			t.steps = steps
			return goesOn, false
		}
		return result, sure && v.Kind == expr.VerdictGoto
	}
	return goesOn, false
}

func (t *trial) loadMeta(e *expr.Meta, reg *registers) {
	p := t.packet
	reg.native = false
	switch e.Key {
	case expr.MetaKeyIIFNAME:
		reg.forget(e.Register)
		if p.incoming != "" {
			reg.store(e.Register, interfaceKey(p.incoming))
		}
	case expr.MetaKeyOIFNAME:
		reg.forget(e.Register)
		if p.outgoing != "" {
			reg.store(e.Register, interfaceKey(p.outgoing))
		}
	case expr.MetaKeyIIF, expr.MetaKeyOIF:
		name := p.incoming
		if e.Key == expr.MetaKeyOIF {
			name = p.outgoing
		}
		reg.forget(e.Register)
		if index, found := interfaceIndex(name); found {
			reg.store(e.Register, native(index))
		}
		reg.native = true
	case expr.MetaKeyMARK:
		reg.store(e.Register, native(p.mark))
		reg.native = true
	case expr.MetaKeyNFPROTO:
		reg.store(e.Register, []byte{p.family})
	case expr.MetaKeyPROTOCOL:
		number := uint16(unix.ETH_P_IP)
		if p.family == unix.NFPROTO_IPV6 {
			number = unix.ETH_P_IPV6
		}
		reg.store(e.Register, network(number))
	case expr.MetaKeyL4PROTO:
		reg.store(e.Register, []byte{p.protocol})
	case expr.MetaKeyPKTTYPE:
		reg.store(e.Register, []byte{unix.PACKET_HOST})
	default:
		reg.forget(e.Register)
	}
}

// setMeta changes the packet's mark if the rule matches for sure.
func (t *trial) setMeta(e *expr.Meta, reg *registers, sure bool) {
	if value, known := reg.load(e.Register, 4); e.Key == expr.MetaKeyMARK && known && sure {
		t.packet.mark = binary.NativeEndian.Uint32(value)
	}
}

func (t *trial) loadPayload(e *expr.Payload, reg *registers) {
	if e.OperationType == expr.PayloadWrite {
		return
	}
	reg.native = false
	reg.forget(e.DestRegister)
	header := t.packet.network
	switch e.Base {
	case expr.PayloadBaseTransportHeader:
		header = t.packet.transport
	case expr.PayloadBaseNetworkHeader:
	default:
		return
	}
	if end := e.Offset + e.Len; int(end) <= len(header) {
		reg.store(e.DestRegister, header[e.Offset:end])
	}
}

// loadCt knows that the packet is the first of its connection.
func (t *trial) loadCt(e *expr.Ct, reg *registers) {
	if e.SourceRegister {
		return
	}
	reg.forget(e.Register)
	reg.native = true
	switch e.Key {
	case expr.CtKeySTATE:
		reg.store(e.Register, native(expr.CtStateBitNEW))
	case expr.CtKeyDIRECTION:
		reg.store(e.Register, []byte{0})
	case expr.CtKeySTATUS:
		reg.store(e.Register, native(0))
	case expr.CtKeyMARK:
		reg.store(e.Register, native(t.packet.connection))
	}
}

func compare(e *expr.Cmp, reg *registers) answer {
	value, known := reg.load(e.Register, len(e.Data))
	if !known {
		return maybe
	}
	switch order := bytes.Compare(value, e.Data); {
	case e.Op == expr.CmpOpEq:
		return is(order == 0)
	case e.Op == expr.CmpOpNeq:
		return is(order != 0)
	case reg.native:
		return maybe
	case e.Op == expr.CmpOpLt:
		return is(order < 0)
	case e.Op == expr.CmpOpLte:
		return is(order <= 0)
	case e.Op == expr.CmpOpGt:
		return is(order > 0)
	default:
		return is(order >= 0)
	}
}

// lookup asks a set, or a map for a verdict.
func (t *trial) lookup(e *expr.Lookup, table *nftables.Table, reg *registers) (answer, *expr.Verdict) {
	elements := t.elements(table, e.SetName)
	if elements == nil {
		return maybe, nil
	}
	if len(elements) == 0 {
		return is(e.Invert), nil
	}
	value, known := reg.load(e.SourceRegister, len(elements[0].Key))
	if !known {
		return maybe, nil
	}
	element, found := member(elements, value)
	switch {
	case found && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT:
		verdict, read := verdictOf(element.Val)
		if !read {
			return maybe, nil
		}
		return yes, verdict
	case found && e.IsDestRegSet:
		reg.store(e.DestRegister, element.Val)
	}
	return is(found != e.Invert), nil
}

// member finds the element, or the interval, that has the value.
func member(elements []nftables.SetElement, value []byte) (nftables.SetElement, bool) {
	intervals := slices.ContainsFunc(elements, func(e nftables.SetElement) bool { return e.IntervalEnd || e.IntervalOpen })
	var start *nftables.SetElement
	for i, e := range elements {
		switch {
		case len(e.KeyEnd) == len(value) && len(e.KeyEnd) > 0:
			if bytes.Compare(value, e.Key) >= 0 && bytes.Compare(value, e.KeyEnd) <= 0 {
				return e, true
			}
		case !intervals:
			if bytes.Equal(e.Key, value) {
				return e, true
			}
		case bytes.Compare(e.Key, value) <= 0 && (start == nil || bytes.Compare(e.Key, start.Key) > 0 || bytes.Equal(e.Key, start.Key) && !e.IntervalEnd):
			start = &elements[i] // the nearest bound below
		}
	}
	if start != nil && !start.IntervalEnd {
		return *start, true
	}
	return nftables.SetElement{}, false
}

// verdictOf reads the attributes of a verdict (NFTA_DATA_VERDICT), which the library leaves as they are in elements of maps.
func verdictOf(attributes []byte) (*expr.Verdict, bool) {
	const header, code, chain = 4, 1, 2 // NLA_HDRLEN, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN
	v := new(expr.Verdict)
	read := false
	for len(attributes) >= header {
		length := int(binary.NativeEndian.Uint16(attributes))
		if length < header || length > len(attributes) {
			return nil, false
		}
		data := attributes[header:length]
		switch binary.NativeEndian.Uint16(attributes[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER) {
		case code:
			if len(data) != 4 {
				return nil, false
			}
			v.Kind, read = expr.VerdictKind(int32(binary.BigEndian.Uint32(data))), true
		case chain:
			v.Chain = string(bytes.TrimRight(data, "\x00"))
		}
		attributes = attributes[min(len(attributes), (length+3)&^3):]
	}
	return v, read
}

// extension is a match of iptables'.
func (t *trial) extension(e *expr.Match) answer {
	switch info := e.Info.(type) {
	case *xt.ConntrackMtinfo3:
		return connectionState(info.MatchFlags, info.InvertFlags, info.StateMask)
	case *xt.ConntrackMtinfo2:
		return connectionState(info.MatchFlags, info.InvertFlags, info.StateMask)
	case *xt.AddrTypeV1:
		const invertSource, invertDestination, ofInterface = 1, 2, 4 | 8 // linux/netfilter/xt_addrtype.h
		if info.Source != 0 || info.Flags&^invertDestination != 0 {
			return maybe
		}
		unicast := info.Dest&(1<<unix.RTN_UNICAST) != 0
		return is(unicast != (info.Flags&invertDestination != 0))
	case *xt.Comment:
		return yes
	case *xt.Tcp:
		if info.Option != 0 || info.FlagsMask != 0 || t.packet.protocol != unix.IPPROTO_TCP {
			return maybe
		}
		return t.ports(info.SrcPorts, info.DstPorts, uint8(info.InvFlags))
	case *xt.Udp:
		if t.packet.protocol != unix.IPPROTO_UDP {
			return maybe
		}
		return t.ports(info.SrcPorts, info.DstPorts, uint8(info.InvFlags))
	case *xt.Unknown:
		if e.Name == "comment" {
			return yes
		}
		if data := []byte(*info); e.Name == "mark" && e.Rev == 1 && len(data) >= 9 {
			mark, mask := binary.NativeEndian.Uint32(data), binary.NativeEndian.Uint32(data[4:])
			return is((t.packet.mark&mask == mark) != (data[8] != 0))
		}
	}
	return maybe
}

// connectionState is iptables' conntrack match, as far as it asks for the state alone.
func connectionState(match, invert, states uint16) answer {
	const state, stateAlias = 1 << 0, 1 << 13 // XT_CONNTRACK_STATE, XT_CONNTRACK_STATE_ALIAS
	const opening uint16 = 1 << (2 + 1)       // XT_CONNTRACK_STATE_BIT(IP_CT_NEW)
	if match&^(state|stateAlias) != 0 {
		return maybe
	}
	return is((states&opening != 0) != (invert&state != 0))
}

// ports is iptables' match of the ports, which begin the headers of TCP and UDP alike.
func (t *trial) ports(source, destination [2]uint16, invert uint8) answer {
	if source != [2]uint16{0, 65535} || invert != 0 {
		return maybe
	}
	port := binary.BigEndian.Uint16(t.packet.transport[2:])
	return is(destination[0] <= port && port <= destination[1])
}

// targetMark is iptables' MARK, revision 2, which alone is in use, and CONNMARK where it restores.
func (t *trial) targetMark(e *expr.Target, sure bool) {
	info, plain := e.Info.(*xt.Unknown)
	if !plain || !sure {
		return
	}
	data := []byte(*info)
	switch {
	case e.Name == "MARK" && len(data) >= 8: // struct xt_mark_tginfo2
		mark, mask := binary.NativeEndian.Uint32(data), binary.NativeEndian.Uint32(data[4:])
		t.packet.mark = t.packet.mark&^mask ^ mark
	case e.Name == "CONNMARK" && len(data) >= 15: // struct xt_connmark_tginfo1, or tginfo2 with two bytes more before the last
		const restore = 2 // XT_CONNMARK_RESTORE
		if mode := data[min(12+2*(max(e.Rev, 1)-1), 14)]; mode == restore {
			nfmask, ctmask := binary.NativeEndian.Uint32(data[8:]), binary.NativeEndian.Uint32(data[4:])
			t.packet.mark = t.packet.mark&^nfmask ^ t.packet.connection&ctmask
		}
	}
}
