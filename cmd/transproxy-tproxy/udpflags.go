package main

import (
	"fmt"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
)

// udpSettings is what becomes of the clients' UDP, by destination port. What is in
// neither is left to the kernel.
type udpSettings struct {
	refused, dropped []netfilter.PortRange
}

// What --udp says of a port.
const (
	udpDirect = iota // the zero value: left to the kernel
	udpReject
	udpDrop
)

// portQUIC is that of QUIC (RFC 9114 section 3.1), which no HTTP proxy carries: browsers
// that are refused turn to TCP at once, those whose packets vanish wait.
const portQUIC = 443

// setUDP reads `PORTS=reject|drop|direct,...`. Where several speak of a port the last
// one counts, but `other` stands for the ports of which none does. QUIC is refused unless
// another word is said about it, and DNS is not meant by `other`.
func setUDP(s *settings, value string) error {
	var verdicts [1 << 16]uint8
	var named [1 << 16]bool
	other := uint8(udpDirect)
	for _, text := range splitList(value) {
		ports, word, found := strings.Cut(text, "=")
		verdict, known := map[string]uint8{"direct": udpDirect, "reject": udpReject, "drop": udpDrop}[word]
		if !found || !known {
			return fmt.Errorf("%q: write a port, a range or other, and what becomes of it: 443=reject, 123=direct, other=drop", text)
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
		switch {
		case named[port]:
		case port == portQUIC:
			verdicts[port] = udpReject
		case port != portDNS:
			verdicts[port] = other
		}
	}
	s.udp = udpSettings{refused: portsWith(&verdicts, udpReject), dropped: portsWith(&verdicts, udpDrop)}
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
