package netfilter

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
)

// DNS says which queries to port 53 are captured, whatever server they ask. The zero value leaves port 53 like any other.
type DNS struct {
	// Listen are the transparent DNS listeners: one for each family of [Config].Listen, all on the same port. Where UDP is
	// captured, their UDP sockets carry the mark [Config].Exempt and answer from the address that was asked; the rules put
	// port 53 in the place of the listeners' port as source of these answers. Other programs may so hold port 53.
	Listen []netip.AddrPort
	// UDP and TCP say which of the two transports is captured. What is not is left alone over UDP, and is like any other
	// port over TCP.
	UDP, TCP bool
}

// dnsPort is where servers are asked (RFC 1035, section 4.2).
const dnsPort = 53

// captured reports whether any query is.
func (d DNS) captured() bool { return d.UDP || d.TCP }

// validate names the first value that cannot work beside the transparent listeners of other flows, which take UDP as well or
// do not.
func (d DNS) validate(others []netip.AddrPort, othersUDP bool) error {
	if !d.captured() {
		return nil
	}
	if err := validateListen("transparent DNS listeners", d.Listen); err != nil {
		return err
	}
	for _, f := range families() {
		listener, ok := f.listener(d.Listen)
		other, want := f.listener(others)
		switch {
		case ok != want:
			return fmt.Errorf("%s is captured, but there is not one listener for DNS and one for other flows: give both, or neither", f.proto)
		case !ok:
		case listener.Port() != d.Listen[0].Port():
			return fmt.Errorf("transparent DNS listeners on %v and %v: they must have the same port, that of --dns-tproxy-listen",
				d.Listen[0], listener)
		case (d.TCP || othersUDP) && listener == other:
			return fmt.Errorf("%v is to be the transparent listener of DNS and of other flows: choose another port with --dns-tproxy-listen", listener)
		}
	}
	return nil
}

// transport is one of those that carry queries.
type transport struct {
	name   string
	is     clause
	query  clause // matches what is sent to the port of servers
	refuse clause // ends what cannot be answered
}

// transports are those that are captured.
func (d DNS) transports() []transport {
	var captured []transport
	if d.UDP {
		captured = append(captured, transport{"UDP", udp(), udpPort(dnsPort), prohibit()})
	}
	if d.TCP {
		captured = append(captured, transport{"TCP", tcp(), tcpPort(dnsPort), refuse()})
	}
	return captured
}

// dnsRules hand queries to the listeners, as interceptRules do with other flows.
func dnsRules(c *Config) []rule {
	rules := append([]rule{ownRule()}, c.remember()...)
	for _, f := range families() {
		listener, ok := f.listener(c.DNS.Listen)
		if !ok {
			continue
		}
		for _, t := range c.DNS.transports() {
			rules = append(rules, rule{
				"to the transparent listener for DNS over " + t.name + " and " + f.proto,
				append([]clause{f.is(), t.is}, c.hand(f, listener, setMark(c.LAN, c.Mask), accept())...),
			})
		}
	}
	if c.FailClosed {
		for _, t := range c.DNS.transports() {
			rules = append(rules, rule{"nobody listens for DNS over " + t.name, []clause{t.is, t.refuse}})
		}
	}
	return rules
}

// answersOf makes the answers of the DNS listeners come from the port that was asked; that they come from the address that
// was asked is the listeners' part. A socket could not have both while another program holds port 53: bind(2) refuses the
// port then, on any address.
//
// Of the answers to captured UDP, queries among it, connection tracking is to know nothing. Else one that comes after it has forgotten the client's
// packets would begin a connection, of which the client's next packet were the reply: those are not captured.
func answersOf(c *Config) chain {
	var rules []rule
	if c.capturesUDP() {
		rules = append(rules, rule{
			"answers to captured UDP begin no connection",
			[]clause{marked(c.Exempt, c.Mask), udp(), ofTransparentSocket(), untracked()},
		})
	}
	if c.DNS.UDP {
		rules = append(rules, rule{
			"answers over UDP leave from the port that was asked",
			[]clause{marked(c.Exempt, c.Mask), udpSource(c.DNS.Listen[0].Port()), setUDPSource(dnsPort)},
		})
	}
	return chain{name: answersChain, hook: answersHook(), rules: rules}
}

// answersHook lies ahead of connection tracking (NF_IP_PRI_RAW is -300, NF_IP_PRI_CONNTRACK -200 in
// linux/netfilter_ipv4.h), which is to see an answer come from the port that was asked.
func answersHook() *hook {
	return &hook{
		text:   "type filter hook output priority raw - 10",
		number: nftables.ChainHookOutput, priority: nftables.ChainPriorityRef(*nftables.ChainPriorityRaw - 10),
	}
}
