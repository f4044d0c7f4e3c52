package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
)

// probeSettings is what is asked for about the command probe.
type probeSettings struct {
	host          string
	address, ipv6 netip.Addr
	ports         []uint16
	idle          time.Duration
	json          bool
	given         string // one of the flags that were given, as it is written; empty for none
}

// probeOptions are the flags of the command probe.
func probeOptions() []option {
	return []option{
		{groupProbe, "probe-host", "NAME", "gitlab.com", "a public host with HTTP, TLS and SSH at their usual ports", setProbeHost},
		// What the default of --probe-host has had since 2019.
		{
			groupProbe, "probe-address", "ADDRESS,...", "172.65.251.78,2606:4700:90:0:f22e:fbec:5bed:a9b9", "its address, or another\n" +
				"such host's, one of each family", setProbeAddress,
		},
		{groupProbe, "probe-ports", "PORT,...", "80,22,53,853", "the ports besides 443 to which tunnels are asked for; 53 and 853 at --public-dns and\n" +
			"--dns-over-tls", setProbePorts},
		{
			groupProbe, "idle", "TIME", "", "find out as well whether a tunnel lives that long at rest",
			setDuration(func(s *settings, d time.Duration) { s.probe.idle, s.probe.given = d, "--idle" }),
		},
		{
			groupProbe, "json", "", "", "print the findings as JSON",
			setSwitch(func(s *settings, on bool) { s.probe.json, s.probe.given = on, "--json" }),
		},
	}
}

func setProbeHost(s *settings, value string) error {
	names, err := bypass.Parse(value)
	if err != nil || len(names.Suffixes()) != 1 || names.Suffixes()[0].Name == "" || names.Suffixes()[0].Below {
		return fmt.Errorf("%q is not a host's name: write it like www.example.org, and addresses to --probe-address", value)
	}
	s.probe.host = names.Suffixes()[0].Name
	return nil
}

func setProbeAddress(s *settings, value string) error {
	s.probe.address, s.probe.ipv6 = netip.Addr{}, netip.Addr{}
	for _, text := range splitList(value) {
		address, err := netip.ParseAddr(text)
		field := &s.probe.address
		if address.Is6() && !address.Is4In6() {
			field = &s.probe.ipv6
		}
		if err != nil || address.Zone() != "" || field.IsValid() {
			return fmt.Errorf("%q: give one address, or one of each family, like 192.0.2.7,2001:db8::7", value)
		}
		*field = address.Unmap()
	}
	return nil
}

func setProbePorts(s *settings, value string) error {
	s.probe.ports = nil
	for _, text := range splitList(value) {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			return fmt.Errorf("%q is not a port: use numbers from 1 to 65535", text)
		}
		if port != portHTTPS && !slices.Contains(s.probe.ports, uint16(port)) {
			s.probe.ports = append(s.probe.ports, uint16(port))
		}
	}
	const most = 16 // tunnels are asked for at once: no more than a browser does, twice
	if len(s.probe.ports) > most {
		return fmt.Errorf("%q: give up to %d ports", value, most)
	}
	return nil
}
