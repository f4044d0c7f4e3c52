package netfilter

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	masqueradeChain = "postrouting"
	clampChain      = "forward_mangle"
	privateSet      = "private"
)

// unique local addresses (RFC 4193) are known nowhere else. All other IPv6 addresses of clients are routed as they are.
var uniqueLocal = netip.MustParsePrefix("fc00::/7")

func masqueradeHook() *hook {
	return &hook{
		text: "type nat hook postrouting priority srcnat", kind: nftables.ChainTypeNAT,
		number: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource,
	}
}

func clampHook() *hook {
	return &hook{
		text:   "type filter hook forward priority mangle",
		number: nftables.ChainHookForward, priority: nftables.ChainPriorityMangle,
	}
}

// routerSets are the sets that the duties of a router need beside the others.
func routerSets(c *Config) []set {
	if !c.Router {
		return nil
	}
	return []set{{
		name: privateSet, kind: nftables.TypeIP6Addr, interval: true,
		comment:  "sources of IPv6 that are known nowhere else",
		elements: families()[1].elements(ranges([]netip.Prefix{uniqueLocal})),
	}}
}

// routerChains are what a router does for the flows that it does not capture.
func routerChains(c *Config) []chain {
	if !c.Router {
		return nil
	}
	ipv4, ipv6 := families()[0], families()[1]
	outside := rule{"stays in the clients' networks", []clause{outgoingNotIn(interfacesSet), leave()}}
	if len(c.Interfaces) > 0 {
		outside.clauses = []clause{outgoingIn(interfacesSet), leave()}
	}
	return []chain{
		{name: masqueradeChain, hook: masqueradeHook(), rules: []rule{
			outside,
			{"what clients send directly gets this host's address", []clause{ipv4.sourceIn(clientsSet + ipv4.suffix), masquerade()}},
			{
				"and of IPv6 what is known nowhere else",
				[]clause{ipv6.sourceIn(clientsSet + ipv6.suffix), ipv6.sourceIn(privateSet), masquerade()},
			},
		}},
		{name: clampChain, hook: clampHook(), rules: []rule{
			{"segments fit the way, also where ICMP errors are lost", []clause{opening(), clampMSS()}},
		}},
	}
}

func (f family) sourceIn(set string) clause {
	return clause{f.header + " saddr @" + set, append(f.match(), f.address(f.source), lookup(set, false))}
}

func outgoingIn(set string) clause {
	return clause{"oifname @" + set, []expr.Any{meta(expr.MetaKeyOIFNAME), lookup(set, false)}}
}

func outgoingNotIn(set string) clause {
	return clause{"oifname != @" + set, []expr.Any{meta(expr.MetaKeyOIFNAME), lookup(set, true)}}
}

func masquerade() clause { return clause{"masquerade", []expr.Any{&expr.Masq{}}} }

// opening matches TCP packets with SYN and without RST, which carry the option.
func opening() clause {
	const syn, rst = 0x02, 0x04
	return clause{"tcp flags & (syn | rst) == syn", append(matchTCP(),
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		masked([]byte{syn | rst}, []byte{0}), equal([]byte{syn}))}
}

// clampMSS lowers the maximum segment size (RFC 9293 section 3.7.1) to what the route takes; the kernel never raises it.
func clampMSS() clause {
	const optionMSS = 2
	return clause{"tcp option maxseg size set rt mtu", []expr.Any{
		&expr.Rt{Key: expr.RtTCPMSS, Register: register},
		&expr.Byteorder{
			SourceRegister: register, DestRegister: register, Op: expr.ByteorderHton, Len: 2, Size: 2,
		},
		&expr.Exthdr{SourceRegister: register, Type: optionMSS, Offset: 2, Len: 2, Op: unix.NFT_EXTHDR_OP_TCPOPT},
	}}
}
