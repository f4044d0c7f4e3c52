package docker

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// natLikeDocker gives a host the rules that Docker makes for a bridge and for a
// container there whose port 80 is published:
//
//	table ip by-hand {
//	  chain prerouting  { type nat hook prerouting priority dstnat;  iifname != bridge fib daddr type local tcp dport 80 dnat to container:80 }
//	  chain postrouting { type nat hook postrouting priority srcnat; ip saddr subnet oifname != bridge masquerade }
//	  chain forward     { type filter hook forward priority filter; policy drop
//	                      ct state established,related accept; iifname bridge accept; ct status dnat accept }
//	}
func natLikeDocker(ns *netns.NS, bridge string, subnet netip.Prefix, container netip.Addr) error {
	return ns.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Name: "by-hand", Family: nftables.TableFamilyIPv4})
		drop := nftables.ChainPolicyDrop
		add := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority,
			policy *nftables.ChainPolicy, rules ...[]expr.Any,
		) {
			chain := conn.AddChain(&nftables.Chain{
				Name: name, Table: table, Type: kind, Hooknum: hook, Priority: priority, Policy: policy,
			})
			for _, rule := range rules {
				conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule})
			}
		}
		mask := ^uint32(0) << (32 - subnet.Bits())
		add("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nil, join(
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: interfaceName(bridge)},
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(80)},
			&expr.Immediate{Register: 1, Data: container.AsSlice()},
			&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(80)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
		))
		add("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nil, join(
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}, // the source
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.BigEndian.PutUint32(mask), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: subnet.Masked().Addr().AsSlice()},
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: interfaceName(bridge)},
			&expr.Masq{},
		))
		accept := &expr.Verdict{Kind: expr.VerdictAccept}
		add("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, &drop,
			join(&expr.Ct{Key: expr.CtKeySTATE, Register: 1}, anyBit(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), isNotZero(), accept),
			join(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: interfaceName(bridge)}, accept),
			join(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}, anyBit(destinationTranslated), isNotZero(), accept),
		)
		return conn.Flush()
	})
}

// destinationTranslated is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const destinationTranslated = 1 << 5

func join(expressions ...expr.Any) []expr.Any { return expressions }

// interfaceName is a name as the kernel compares it.
func interfaceName(name string) []byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return padded
}

func anyBit(bits uint32) *expr.Bitwise {
	return &expr.Bitwise{
		SourceRegister: 1, DestRegister: 1, Len: 4,
		Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4),
	}
}

func isNotZero() *expr.Cmp {
	return &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}
}
