package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
)

// dnsSettings is what is asked for about DNS. Without a way to resolve names port 53
// is left alone.
type dnsSettings struct {
	private, public []netip.AddrPort
	routes          []dnsRoute
	direct          bool           // public servers without the proxy
	https           bool           // public names by DNS over HTTPS
	endpoint        *url.URL       // of DNS over HTTPS
	tls             dnsOverTLS     // public names by DNS over TLS; the zero value is off
	roots           *x509.CertPool // nil for those of the system
	rootsFile       string         // where those besides came from
	fake            bool
	fakeRange       []netip.Prefix // at most one a family
	fakeStore       string

	udp, tcp     bool             // captured transports
	port         uint16           // of the transparent listeners
	listen       []netip.AddrPort // ordinary listeners
	allow        []netip.Prefix   // who may ask there; nil for the default
	ecs          bool
	allowPrivate bool
	cacheBytes   int
}

// dnsRoute sends a zone to servers of its own.
type dnsRoute struct {
	suffix  string
	servers []netip.AddrPort
}

// dnsOverTLS is a server of DNS over TLS: the certificate's name, and where to
// connect to: the name again, or an address.
type dnsOverTLS struct {
	name, host string
	port       uint16
}

// Ports of servers: RFC 1035 section 4.2, RFC 7858 section 3.1, RFC 8484.
const (
	portDNS          = 53
	portDNSOverTLS   = 853
	portDNSOverHTTPS = 443
)

// dnsOptions are the flags about DNS.
func dnsOptions() []option {
	return []option{
		{
			groupDNS, "private-dns", "ADDRESS,...", "", "servers for the names of --no-proxy and for its addresses backwards; asked directly",
			setServers(func(s *settings, servers []netip.AddrPort) { s.dns.private = servers }),
		},
		{
			groupDNS, "public-dns", "ADDRESS,...", "", "servers for all other names; asked over TCP through the upstream, which must allow\n" +
				"CONNECT to port 53",
			setServers(func(s *settings, servers []netip.AddrPort) { s.dns.public = servers }),
		},
		{groupDNS, "dns-over-tcp-disabled", "", "", "ask --public-dns directly instead, over UDP", setSwitch(func(s *settings, on bool) { s.dns.direct = on })},
		{
			groupDNS, "dns-over-https-enabled", "", "", "ask for public names by HTTPS instead, through the upstream (CONNECT to port 443)",
			setSwitch(func(s *settings, on bool) { s.dns.https = on }),
		},
		{groupDNS, "dns-over-https-endpoint", "URL", defaultEndpoint, "where (RFC 8484); the upstream resolves its name", setEndpoint},
		{
			groupDNS, "dns-over-tls", "HOST[@IP][:PORT]", "", "ask for public names by TLS instead, through the upstream (CONNECT to port 853);\n" +
				"HOST is the name in the certificate, IP where to connect to",
			setDNSOverTLS,
		},
		{groupDNS, "dns-ca", "FILE", "", "certificates (PEM) to trust for the two, besides those of the system", setDNSRoots},
		{groupDNS, "dns-route", "ZONE=ADDRESS,...", "", "servers of another zone, asked directly; several times, or with ; between", setRoutes},
		{
			groupDNS, "fake-ip", "", "", "answer for public names with an address of our own and hand the upstream the name:\n" +
				"for networks where public names cannot be resolved at all",
			setSwitch(func(s *settings, on bool) { s.dns.fake = on }),
		},
		{
			groupDNS, "fake-ip-range", "PREFIX,...", "198.18.0.0/15,fd0f:a4e1:b0d5:c0de::/64", "where these addresses come from, one prefix a family",
			setFakeRange,
		},
		{
			groupDNS, "fake-ip-store", "FILE", "", "keep them over a restart",
			func(s *settings, v string) error { s.dns.fakeStore = v; return nil },
		},
		{groupDNS, "dns-udp", "", "true", "capture DNS over UDP (with any way to resolve names)", setSwitch(func(s *settings, on bool) { s.dns.udp = on })},
		{groupDNS, "dns-tcp", "", "true", "capture DNS over TCP", setSwitch(func(s *settings, on bool) { s.dns.tcp = on })},
		{
			groupDNS, "dns-proxy-listen", "[ADDR]:PORT", "", "be an ordinary DNS server there as well: for the gateway's own programs, and to be\n" +
				"announced by DHCP",
			setDNSListen,
		},
		{
			groupDNS, "dns-allow", "PREFIX,...", "", "who may ask there (default: this host and the networks of the capturing interfaces)",
			func(s *settings, v string) (err error) { s.dns.allow, err = parsePrefixes(v); return err },
		},
		{groupDNS, "dns-cache", "BYTES", "16MiB", "memory for answers", setCache},
		{groupDNS, "ecs", "", "", "pass on what clients say about their network (EDNS client subnet)", setSwitch(func(s *settings, on bool) { s.dns.ecs = on })},
		{
			groupDNS, "allow-private-dns", "", "", "let browsers find out that they may use DNS over HTTPS of their own",
			setSwitch(func(s *settings, on bool) { s.dns.allowPrivate = on }),
		},
	}
}

// enabled reports whether there is a way to resolve names.
func (d *dnsSettings) enabled() bool {
	return d.hasPublic() || len(d.private) > 0 || len(d.routes) > 0
}

// hasPublic reports whether there is one for public names.
func (d *dnsSettings) hasPublic() bool {
	return len(d.public) > 0 || d.https || d.tls.name != "" || d.fake
}

// validate finds flags that contradict one another.
func (d *dnsSettings) validate() error {
	switch {
	case d.direct && len(d.public) == 0:
		return errors.New("--dns-over-tcp-disabled: there is no server to ask directly: give --public-dns, or leave it out")
	case d.https && d.tls.name != "":
		return errors.New("--dns-over-https-enabled and --dns-over-tls: choose one of them")
	case (d.https || d.tls.name != "") && d.direct:
		return errors.New("--dns-over-tcp-disabled contradicts --dns-over-https-enabled and --dns-over-tls: leave it out")
	case d.fake && (d.https || d.tls.name != "" || len(d.public) > 0):
		return errors.New("--fake-ip answers for all public names by itself: leave out --public-dns, --dns-over-https-enabled and --dns-over-tls")
	case !d.enabled() && len(d.listen) > 0:
		return errors.New("--dns-proxy-listen: there is no way to resolve names: give --private-dns, --public-dns, --dns-over-https-enabled or --fake-ip")
	case !d.fake && d.fakeStore != "":
		return errors.New("--fake-ip-store: nothing is kept without --fake-ip: give it as well, or leave this out")
	}
	return nil
}

// setServers takes addresses of DNS servers, with a port or without.
func setServers(store func(*settings, []netip.AddrPort)) func(*settings, string) error {
	return func(s *settings, value string) error {
		servers, err := parseServers(value)
		store(s, servers)
		return err
	}
}

func parseServers(value string) (servers []netip.AddrPort, err error) {
	for _, text := range splitList(value) {
		server, err := netip.ParseAddrPort(text)
		if err != nil {
			address, addressErr := netip.ParseAddr(strings.Trim(text, "[]"))
			if addressErr != nil {
				return nil, fmt.Errorf("%q is not the address of a server: write it like 192.168.0.100, 2001:db8::53 or 192.168.0.100:5353", text)
			}
			server = netip.AddrPortFrom(address, portDNS)
		}
		if server.Addr().IsUnspecified() || server.Port() == 0 {
			return nil, fmt.Errorf("%q is not the address of a server: nobody can be asked there", text)
		}
		servers = append(servers, netip.AddrPortFrom(server.Addr().Unmap(), server.Port()))
	}
	return servers, nil
}

// setRoutes adds zones.
func setRoutes(s *settings, value string) error {
	for text := range strings.SplitSeq(value, ";") {
		zone, list, found := strings.Cut(text, "=")
		servers, err := parseServers(list)
		if err != nil {
			return err
		}
		names, nameErr := bypass.Parse(zone)
		if !found || len(servers) == 0 || nameErr != nil || len(names.Suffixes()) != 1 {
			return fmt.Errorf("%q: write a zone and its servers, like corp.example.org=192.168.0.100", text)
		}
		s.dns.routes = append(s.dns.routes, dnsRoute{names.Suffixes()[0].Name, servers})
	}
	return nil
}

// defaultEndpoint is where DNS over HTTPS is asked.
const defaultEndpoint = "https://dns.google/dns-query"

// googleJSON is the ancestor's default, an interface of its own; the same server
// speaks RFC 8484 beside it.
const googleJSON = "https://dns.google/resolve"

func setEndpoint(s *settings, value string) error {
	if value == googleJSON {
		value = strings.TrimSuffix(googleJSON, "resolve") + "dns-query"
	}
	endpoint, err := url.Parse(value)
	if err != nil || endpoint.Scheme != "https" || endpoint.Hostname() == "" || endpoint.User != nil || endpoint.Fragment != "" {
		return fmt.Errorf("%q is not an endpoint: write it like https://dns.example.org/dns-query", value)
	}
	if port := endpoint.Port(); port != "" {
		if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
			return fmt.Errorf("%q: the port is not a number from 1 to 65535", value)
		}
	}
	s.dns.endpoint = endpoint
	return nil
}

func setDNSOverTLS(s *settings, value string) error {
	if value == "" {
		s.dns.tls = dnsOverTLS{}
		return nil
	}
	fault := fmt.Errorf("%q is not a server: write it like dns.example.org, dns.example.org@192.0.2.53 or dns.example.org:853", value)
	name, rest, pinned := strings.Cut(value, "@")
	server := dnsOverTLS{name: name, host: rest, port: portDNSOverTLS}
	if !pinned {
		server.name, rest = "", value
	}
	host, port, err := net.SplitHostPort(rest)
	if err != nil {
		host = strings.Trim(rest, "[]")
	} else if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
		return fault
	} else {
		server.port = uint16(number)
	}
	server.host = host
	_, addressErr := netip.ParseAddr(host)
	if pinned && addressErr != nil {
		return fault
	}
	if !pinned {
		server.name = host
	}
	if addressErr != nil || pinned {
		if names, err := bypass.Parse(server.name); err != nil || len(names.Suffixes()) != 1 {
			return fault
		}
	}
	s.dns.tls = server
	return nil
}

func setDNSRoots(s *settings, file string) (err error) {
	s.dns.rootsFile = file
	s.dns.roots, err = readRoots(file)
	return err
}

func setFakeRange(s *settings, value string) error {
	prefixes, err := parsePrefixes(value)
	if err != nil {
		return err
	}
	var ipv4, ipv6 int
	for _, prefix := range prefixes {
		if prefix.Addr().Is4() {
			ipv4++
		} else {
			ipv6++
		}
	}
	if ipv4 > 1 || ipv6 > 1 || ipv4+ipv6 == 0 {
		return fmt.Errorf("%q: give one prefix, or one of each family", value)
	}
	s.dns.fakeRange = prefixes
	return nil
}

func setDNSListen(s *settings, value string) error {
	s.dns.listen = nil
	for _, text := range splitList(value) {
		addresses := []string{text}
		if strings.HasPrefix(text, ":") {
			addresses = []string{"0.0.0.0" + text, "[::]" + text}
		}
		for _, text := range addresses {
			address, err := netip.ParseAddrPort(text)
			if err != nil || address.Port() == 0 {
				return fmt.Errorf("%q: write an address and a port, like 192.168.0.1:53 or :53", text)
			}
			s.dns.listen = append(s.dns.listen, address)
		}
	}
	return nil
}

func setCache(s *settings, value string) error {
	number, factor := value, 1
	for _, unit := range []struct {
		name string
		size int
	}{{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}} {
		if rest, ok := strings.CutSuffix(value, unit.name); ok {
			number, factor = rest, unit.size
		}
	}
	bytes, err := strconv.ParseUint(number, 10, 32)
	if err != nil {
		return fmt.Errorf("%q is not a size: write it in bytes, or like 16MiB", value)
	}
	s.dns.cacheBytes = int(bytes) * factor
	return nil
}

func setDNSPort(s *settings, value string) error {
	port, err := strconv.ParseUint(value, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("%q is not a port: use a number from 1 to 65535", value)
	}
	s.dns.port = uint16(port)
	return nil
}
