package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/udp"
)

// udpSettings is what becomes of the clients' UDP, by destination port. What is in
// none of these is left to the kernel.
type udpSettings struct {
	refused, dropped, upstream []netfilter.PortRange

	quic        bool // nothing is said of QUIC's port, which is in none
	filter      udp.Filter
	timeout     time.Duration
	maxSessions int // 0: from the limit of open files
}

// What --udp says of a port.
const (
	udpDirect = iota // the zero value: left to the kernel
	udpReject
	udpDrop
	udpUpstream
)

// portQUIC is that of QUIC (RFC 9114 section 3.1), which no HTTP proxy carries: browsers
// that are refused turn to TCP at once, those whose packets vanish wait.
const portQUIC = 443

// udpOptions are the flags about UDP other than DNS.
func udpOptions() []option {
	return []option{
		{
			groupCapture, "udp", "PORTS=WHAT,...", "other=direct", "what becomes of captured clients' UDP: upstream (a SOCKS5 proxy carries it), reject\n" +
				"(ICMP port unreachable: browsers leave QUIC for TCP at once), drop, or direct\n" +
				"(forwarded as ever); other is the rest. 443 is upstream where the proxy grants\n" +
				"it, else reject, unless something is said about it",
			setUDP,
		},
		{
			groupCapture, "udp-filter", "KIND", "address-dependent", "whose UDP reaches clients (RFC 4787): address-dependent, from addresses that they\n" +
				"sent to, or endpoint-independent, all that the proxy relays to their ports",
			setUDPFilter,
		},
		{
			groupLimits, "udp-timeout", "TIME", "5m", "a client's UDP port from which nothing is sent",
			setUDPTimeout,
		},
		{
			groupLimits, "max-udp-sessions", "NUMBER", "0", "clients' UDP ports at once, a quarter of them of one address; what more of them send\n" +
				"is dropped (default 0: what the limit of open files allows)",
			setNumber("number of sessions", 0, 1<<24, func(s *settings, n int) { s.udp.maxSessions = n }),
		},
	}
}

// setUDP reads `PORTS=upstream|reject|drop|direct,...`. Where several speak of a port the
// last one counts, but `other` stands for the ports of which none does. QUIC is decided
// elsewhere unless a word is said about it, and DNS is not meant by `other`.
func setUDP(s *settings, value string) error {
	var verdicts [1 << 16]uint8
	var named [1 << 16]bool
	other := uint8(udpDirect)
	for _, text := range splitList(value) {
		ports, word, found := strings.Cut(text, "=")
		verdict, known := map[string]uint8{"direct": udpDirect, "reject": udpReject, "drop": udpDrop, "upstream": udpUpstream}[word]
		if !found || !known {
			return fmt.Errorf("%q: write a port, a range or other, and what becomes of it: 443=upstream, 8000-8100=reject, 123=direct, other=drop", text)
		}
		if ports == "other" {
			other = verdict
			continue
		}
		ranges, err := parsePorts(ports)
		if err != nil {
			return err
		}
		if len(ranges) == 0 {
			return fmt.Errorf("%q: write the port before the equals sign", text)
		}
		for _, r := range ranges {
			for port := int(r.First); port <= int(r.Last); port++ {
				verdicts[port], named[port] = verdict, true
			}
		}
	}
	for port := 1; port < 1<<16; port++ {
		if !named[port] && port != portQUIC && port != portDNS {
			verdicts[port] = other
		}
	}
	s.udp.refused, s.udp.dropped = portsWith(&verdicts, udpReject), portsWith(&verdicts, udpDrop)
	s.udp.upstream, s.udp.quic = portsWith(&verdicts, udpUpstream), !named[portQUIC]
	return nil
}

// portsWith are the ports of a verdict.
func portsWith(verdicts *[1 << 16]uint8, verdict uint8) []netfilter.PortRange {
	var ranges []netfilter.PortRange
	for port := 1; port < 1<<16; port++ {
		if verdicts[port] != verdict {
			continue
		}
		if last := len(ranges) - 1; last >= 0 && int(ranges[last].Last) == port-1 {
			ranges[last].Last = uint16(port)
			continue
		}
		ranges = append(ranges, netfilter.PortRange{First: uint16(port), Last: uint16(port)})
	}
	return ranges
}

// udpPorts are the ports of each verdict once the upstream is known.
func (s *settings) udpPorts() (refused, dropped, captured []netfilter.PortRange) {
	refused, dropped, captured = s.udp.refused, s.udp.dropped, s.udp.upstream
	if s.udp.quic {
		quic := []netfilter.PortRange{{First: portQUIC, Last: portQUIC}}
		if s.datagramUpstreams() != nil {
			captured = append(quic, captured...)
		} else {
			refused = append(quic, refused...)
		}
	}
	if s.dns.enabled() && s.dns.udp {
		// What leaves from this port is an answer to a query, and is made to leave from another.
		captured = without(captured, s.dns.port)
	}
	return refused, dropped, captured
}

// without leaves a port out.
func without(ranges []netfilter.PortRange, port uint16) []netfilter.PortRange {
	var rest []netfilter.PortRange
	for _, r := range ranges {
		if port < r.First || port > r.Last {
			rest = append(rest, r)
			continue
		}
		if r.First < port {
			rest = append(rest, netfilter.PortRange{First: r.First, Last: port - 1})
		}
		if port < r.Last {
			rest = append(rest, netfilter.PortRange{First: port + 1, Last: r.Last})
		}
	}
	return rest
}

// validateUDP finds what cannot be carried.
func (s *settings) validateUDP() error {
	if len(s.udp.upstream) > 0 && s.datagramUpstreams() == nil {
		return fmt.Errorf("--udp %s=upstream: only a SOCKS5 proxy carries UDP: give one with --upstream socks5://host:port, or write reject", s.udp.upstream[0])
	}
	return nil
}

func setUDPFilter(s *settings, value string) error {
	kind, known := map[string]udp.Filter{
		"address-dependent": udp.AddressDependent, "endpoint-independent": udp.EndpointIndependent,
	}[value]
	if !known {
		return fmt.Errorf("%q: use address-dependent or endpoint-independent", value)
	}
	s.udp.filter = kind
	return nil
}

// leastUDPTimeout is that of RFC 4787 REQ-5, which recommends 5 minutes.
const leastUDPTimeout = 2 * time.Minute

func setUDPTimeout(s *settings, value string) error {
	err := setDuration(func(s *settings, d time.Duration) { s.udp.timeout = d })(s, value)
	if err == nil && s.udp.timeout < leastUDPTimeout {
		s.notes = append(s.notes, "--udp-timeout "+value+" is less than the 2m on which applications count (RFC 4787 REQ-5)")
	}
	return err
}

// fitSessions bounds the sessions by what is asked for and by what fits.
func (s *settings) fitSessions(c *capacity, log zerolog.Logger) {
	switch wanted := s.udp.maxSessions; {
	case c.sessions == 0 || wanted == 0:
	case wanted > c.sessions:
		log.Warn().Int("max_udp_sessions", wanted).Int("possible", c.sessions).Msg("--max-udp-sessions is more than the limit of open files allows")
	default:
		c.sessions = wanted
	}
}
