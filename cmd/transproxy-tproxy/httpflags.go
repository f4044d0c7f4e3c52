package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
)

// httpSettings is what is asked for about plain HTTP and about clients that use the
// gateway as their proxy.
type httpSettings struct {
	ports        []netfilter.PortRange // captured ones, whose requests are carried one by one
	via          bool
	forwardedFor bool

	passing, authenticating   []netip.AddrPort // explicit listeners; none for off
	allow, allowAuthenticated []netip.Prefix   // who may use them; nil for the default
	allowTo                   []netip.Prefix
	only                      bool // nothing is captured
}

// httpOptions are the flags about both.
func httpOptions() []option {
	return []option{
		{
			groupHTTP, "http-ports", "PORTS|off", "80", "captured ports whose HTTP requests are passed to the proxy one by one, in absolute\n" +
				"form; off tunnels them like all others (CONNECT)",
			setHTTPPorts,
		},
		{groupHTTP, "http-via", "", "", "say in requests and answers that they came through here (Via)", setSwitch(func(s *settings, on bool) { s.http.via = on })},
		{
			groupHTTP, "http-forwarded-for", "", "", "tell the proxy the client's address (X-Forwarded-For)",
			setSwitch(func(s *settings, on bool) { s.http.forwardedFor = on }),
		},
		{
			groupHTTP, "explicit-proxy-listen", "[ADDR]:PORT|off", ":3132", "be a proxy for clients that have proxy settings, and bring their own credentials",
			setExplicit(func(s *settings, at []netip.AddrPort) { s.http.passing = at }),
		},
		{
			groupHTTP, "explicit-proxy-with-auth-listen", "[ADDR]:PORT|off", ":3133", "the same with the credentials of --upstream added",
			setExplicit(func(s *settings, at []netip.AddrPort) { s.http.authenticating = at }),
		},
		{groupHTTP, "explicit-proxy-only", "", "", "be just that: capture nothing, change nothing in the kernel", setSwitch(func(s *settings, on bool) { s.http.only = on })},
		{
			groupHTTP, "explicit-allow", "PREFIX,...", "", "who may use the first (default: this host and the networks of the capturing\n" +
				"interfaces)",
			func(s *settings, v string) (err error) { s.http.allow, err = parsePrefixes(v); return err },
		},
		{
			groupHTTP, "explicit-with-auth-allow", "PREFIX,...", "", "who may use the second (default: this host)",
			func(s *settings, v string) (err error) { s.http.allowAuthenticated, err = parsePrefixes(v); return err },
		},
		{
			groupHTTP, "explicit-allow-to", "PREFIX,...", "", "addresses of this host, loopback or link-local ones that they may reach through\n" +
				"it (default: none)",
			func(s *settings, v string) (err error) { s.http.allowTo, err = parsePrefixes(v); return err },
		},
	}
}

// validate finds flags that contradict one another.
func (h *httpSettings) validate() error {
	if h.only && len(h.passing) == 0 && len(h.authenticating) == 0 {
		return errors.New("--explicit-proxy-only: there is nothing to serve: give --explicit-proxy-listen or --explicit-proxy-with-auth-listen")
	}
	return nil
}

// plain reports whether requests to a port are carried one by one.
func (h *httpSettings) plain(port uint16) bool {
	return slices.ContainsFunc(h.ports, func(r netfilter.PortRange) bool { return r.First <= port && port <= r.Last })
}

func setHTTPPorts(s *settings, value string) (err error) {
	s.http.ports = nil
	if value != "off" {
		s.http.ports, err = parsePorts(value)
	}
	if err == nil && s.http.plain(443) {
		return fmt.Errorf("%q: port 443 is that of HTTPS, which is tunnelled", value)
	}
	return err
}

// setExplicit takes the address of an explicit listener; without one it listens on all.
func setExplicit(store func(*settings, []netip.AddrPort)) func(*settings, string) error {
	return func(s *settings, value string) error {
		if value == "off" || value == "" {
			store(s, nil)
			return nil
		}
		var addresses []netip.AddrPort
		for _, text := range splitList(value) {
			texts := []string{text}
			if !strings.Contains(text, ":") {
				text = ":" + text
			}
			if strings.HasPrefix(text, ":") {
				texts = []string{"0.0.0.0" + text, "[::]" + text}
			}
			for _, text := range texts {
				address, err := netip.ParseAddrPort(text)
				if err != nil || address.Port() == 0 {
					return fmt.Errorf("%q: write an address and a port, like 192.168.0.1:3132 or :3132, or off", value)
				}
				addresses = append(addresses, address)
			}
		}
		store(s, addresses)
		return nil
	}
}
