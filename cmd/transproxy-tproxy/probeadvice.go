package main

import (
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// The environments, as JSON has them: in which way public names are had.
const (
	namesResolve  = "names_resolve" // already
	namesDirect   = "public_dns_direct"
	namesOverTCP  = "public_dns_through_connect"
	namesHTTPS    = "dns_over_https"
	namesOverTLS  = "dns_over_tls"
	namesFromFake = "no_public_dns"
)

// Ports whose findings decide something (RFC 4253 section 4.1, RFC 9110 section 4.2).
const portSSH, portHTTP, portHTTPS = 22, 80, 443

// advice is what follows from a report.
type advice struct {
	Environment string   `json:"environment,omitempty"` // how public names are had; empty if the proxy cannot be used
	Flags       []string `json:"flags"`                 // of run, each value an element of its own; without the credential
	Notes       []string `json:"notes"`                 // for people: what to know besides

	credential bool // one belongs to --upstream, and is left out
}

// advise makes the flags of what was found. Each of them is there because without it
// something would fail that can work.
func (s *settings) advise(r *probe.Report, system system) advice {
	a := advice{Flags: []string{}, Notes: []string{}, credential: s.hasCredential()}
	if !r.Usable {
		a.Notes = append(a.Notes, s.whyNot(r))
		return a
	}
	a.flag("--upstream", r.Proxy)
	for _, f := range [][2]string{
		{"--upstream-ca", s.tls.rootsFile},
		{"--upstream-server-name", s.tls.serverName},
		{"--upstream-cert", s.tls.certificate},
		{"--upstream-key", s.tls.keys},
	} {
		if f[1] != "" {
			a.flag(f[:]...)
		}
	}
	a.names(s, r, system)
	a.plainHTTP(s, r)
	a.limits(s, r)
	if s.httpUpstream != nil {
		a.note("http_proxy names another proxy than https_proxy: it was not asked, and --upstream stands for both")
	}
	return a
}

// hasCredential reports whether a user name and a password are to be sent to the proxy.
func (s *settings) hasCredential() bool {
	lease, settled := s.proxies[0].Standing()
	return !settled || lease != nil
}

func (a *advice) flag(words ...string) { a.Flags = append(a.Flags, words...) }
func (a *advice) note(text string)     { a.Notes = append(a.Notes, text) }

// whyNot names the first reason for which the proxy cannot be used.
func (s *settings) whyNot(r *probe.Report) string {
	switch {
	case r.Verdict(probe.Reachable) != probe.Yes && isHTTPS(s.proxies[0]):
		return "the proxy cannot be talked to by TLS: look at its name and port, and at --upstream-ca and --upstream-server-name"
	case r.Verdict(probe.Reachable) != probe.Yes:
		return "the proxy cannot be connected to: look at its name and port, and at the way there"
	case r.Verdict(probe.Protocol) != probe.Yes:
		return "what answers there is not the proxy that --upstream says: look at its scheme and port"
	case r.Refused:
		return "the proxy refuses the user name or the password: correct them before anything else is tried (special characters are percent-encoded)"
	case r.Verdict(probe.Authentication) != probe.Yes && s.hasCredential():
		return "the proxy owes the answer to the credential, and nothing more was asked lest an account be locked: ask its operator, or try again later"
	case r.Verdict(probe.Authentication) != probe.Yes:
		return "the proxy wants to know who asks: give --upstream scheme://user:password@host:port, or set TRANSPROXY_UPSTREAM to it"
	}
	return "TLS of " + s.probe.host + " does not get through: if the company forbids that host, name one that it allows: --probe-host, --probe-address"
}

// names chooses how public names are resolved.
func (a *advice) names(s *settings, r *probe.Report, system system) {
	yes := func(check probe.Check) bool { return r.Verdict(check) == probe.Yes }
	byName := r.Verdict(probe.Tunnel(portHTTPS, probe.ByAddress)) == probe.No // only so are tunnels to be had
	private := s.privateServers(system)
	var flags []string
	switch {
	case yes(probe.SystemDNS):
		a.Environment = namesResolve
		if byName {
			a.note("the proxy takes names, not addresses: --private-dns has the gateway see which name each address stands for")
			flags = []string{"--private-dns", list(private)}
		}
	case yes(probe.DirectDNS):
		a.Environment = namesDirect
		flags = []string{"--public-dns", server(s.publicServer()), "--dns-over-tcp-disabled"}
	case yes(probe.TCPDNS):
		a.Environment = namesOverTCP
		flags = []string{"--public-dns", server(s.publicServer())}
	case yes(probe.HTTPSDNS):
		a.Environment = namesHTTPS
		flags = []string{"--dns-over-https-enabled"}
		if endpoint := s.dns.endpoint.String(); endpoint != defaultEndpoint {
			flags = append(flags, "--dns-over-https-endpoint", endpoint)
		}
	case yes(probe.TLSDNS):
		a.Environment = namesOverTLS
		flags = []string{"--dns-over-tls", s.overTLS().text()}
	default:
		a.Environment = namesFromFake
		flags = []string{"--fake-ip"}
	}
	if s.dns.rootsFile != "" && (a.Environment == namesHTTPS || a.Environment == namesOverTLS) {
		flags = append(flags, "--dns-ca", s.dns.rootsFile)
	}
	a.internal(s, r, system)
	a.flag(flags...)
}

// internal names what is the company's own: as the user has it, or as this host looks for
// short names. Once port 53 is captured somebody has to be asked for such names.
func (a *advice) internal(s *settings, r *probe.Report, system system) {
	exempt := s.noProxy
	captured := a.Environment != namesResolve
	private := s.privateServers(system)
	if exempt.String() == "" && captured && len(private) > 0 && len(system.search) > 0 {
		if list, err := bypass.Parse(strings.Join(system.search, ",")); err == nil {
			exempt = list
			a.note("--no-proxy is the search list of " + resolvConf + ": add your internal networks and names")
		}
	}
	if len(private) == 0 && len(exempt.Suffixes()) > 0 && a.Environment == namesFromFake {
		a.note("--no-proxy " + exempt.String() + " is left out, as nobody is known who resolves its names: give --private-dns with it")
		return
	}
	if exempt.String() != "" {
		a.flag("--no-proxy", exempt.String())
	}
	if !captured {
		return
	}
	switch {
	case len(exempt.Suffixes()) == 0:
		a.note("if there are internal names: --no-proxy corp.example.org --private-dns with who resolves them")
	case len(private) == 0:
		a.note("nobody is known who resolves the internal names: give --private-dns")
	default:
		a.flag("--private-dns", list(private))
		if verdict := r.Verdict(probe.SystemDNS); verdict == probe.Unclear || verdict == probe.Skipped {
			a.note("--private-dns " + list(private) + " gave no answer now: see that it is right")
		}
	}
}

// plainHTTP chooses how HTTP at port 80 is carried, for proxies of HTTP.
func (a *advice) plainHTTP(s *settings, r *probe.Report) {
	if r.Verdict(probe.AbsoluteForm) == probe.Yes || r.Verdict(probe.AbsoluteForm) == probe.Skipped {
		return
	}
	if r.Verdict(probe.Tunnel(portHTTP, probe.ByName)) == probe.Yes {
		a.flag("--http-ports", "off")
		a.note("plain HTTP goes through CONNECT to port 80, as requests in absolute form do not")
		return
	}
	a.note("plain HTTP does not get through: neither in absolute form nor by CONNECT to port 80")
}

// limits tells what will not work whatever the flags are, and what clients need.
func (a *advice) limits(s *settings, r *probe.Report) {
	if r.Verdict(probe.IntactTLS) == probe.No {
		a.note("the proxy inspects TLS: clients have to trust its CA, " + r.Issuer)
		if a.Environment == namesFromFake && s.dns.rootsFile == "" {
			a.note("DNS over HTTPS may work with that CA's certificate: probe again with --dns-ca FILE")
		}
	}
	ssh := probe.Tunnel(portSSH, probe.ByName)
	if slices.Contains(s.probe.ports, portSSH) && r.Verdict(ssh) == probe.No {
		a.note("ssh does not get through: CONNECT to port 22 is refused")
	}
	address := r.Verdict(probe.Tunnel(portHTTPS, probe.ByAddress))
	if address == probe.No {
		a.note("CONNECT to addresses is refused: connections fail whose name the gateway cannot know")
	}
	if r.Verdict(probe.Tunnel(portHTTPS, probe.ByIPv6)) == probe.No && address == probe.Yes {
		a.note("IPv6 addresses are not reached through the proxy")
	}
}
