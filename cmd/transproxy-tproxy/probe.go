package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// publicName and publicAddress are the public name server that is tried if no flag names
// another: it answers at the ports 53 and 853, and its certificate has the name.
const publicName, publicAddress = "one.one.one.one", "1.1.1.1"

// askTimeout bounds one question to a name server. It is more than in the gateway: that a
// slow proxy answers at all is of interest here.
const askTimeout = 7 * time.Second

// probed is all that the command probe finds out, as JSON has it.
type probed struct {
	*probe.Report
	advice
}

// probeProxy asks the proxy what it allows, and prints that and the flags to use. It needs
// no privilege and changes nothing. The exit status is 0 if the proxy can be used.
func probeProxy(s *settings) error {
	if err := s.resolve(); err != nil {
		return usageError{err}
	}
	proxy, err := s.probedProxy()
	if err != nil {
		return usageError{err}
	}
	if err := s.validateTLS(); err != nil {
		return usageError{err}
	}
	system := systemNames(resolvConf, resolvedConf)
	config, err := s.probeConfig(proxy, system)
	if err != nil {
		return usageError{err}
	}
	if !s.probe.json {
		fmt.Fprintf(os.Stderr, "asking %s; this takes some seconds, %s at most\n", proxy, probe.TimeLimit+s.probe.idle)
	}
	report := probe.Run(context.Background(), config)
	result := probed{report, s.advise(report, system)}
	if s.probe.json {
		out := json.NewEncoder(os.Stdout)
		out.SetIndent("", "  ")
		out.SetEscapeHTML(false)
		err = out.Encode(result)
	} else {
		err = result.write(os.Stdout, term.IsTerminal(int(os.Stdout.Fd())))
	}
	if err == nil && !report.Usable {
		return exitStatus(exitFailure)
	}
	return err
}

// probedProxy is the one proxy to ask.
func (s *settings) probedProxy() (*upstream.Proxy, error) {
	switch {
	case len(s.proxies) == 0:
		return nil, errors.New("no upstream proxy to ask: give --upstream http://host:port, or set https_proxy")
	case len(s.proxies) > 1:
		return nil, errors.New("--upstream: probe asks one proxy at a time: give one of them")
	case s.proxies[0].Direct():
		return nil, errors.New("--upstream: direct:// is no proxy, and there is nothing to ask: give http://host:port")
	}
	return s.proxies[0], nil
}

// probeConfig is what is asked. Sockets have no mark, which would need a privilege: a
// gateway that runs on this host does not capture what goes to its proxy.
func (s *settings) probeConfig(proxy *upstream.Proxy, system system) (probe.Config, error) {
	byTLS, err := s.tls.config()
	config := probe.Config{
		Dialer: &upstream.Dialer{TLS: byTLS, Sources: s.sources, ConnectTimeout: probe.ConnectLimit, HandshakeTimeout: s.replyTimeout},
		Proxy:  proxy,
		Host:   s.probe.host, Address: s.probe.address, IPv6: s.probe.ipv6,
		NameServer: s.overTLS().name, NameServerAddress: s.publicServer().Addr(),
		Ports: s.probe.ports, Idle: s.probe.idle,
	}
	public, overTLS := s.publicServer(), s.overTLS()
	endpoint := upstream.Target{Host: s.dns.endpoint.Hostname(), Port: portDNSOverHTTPS}
	if port, err := strconv.ParseUint(s.dns.endpoint.Port(), 10, 16); err == nil {
		endpoint.Port = uint16(port)
	}
	patient := exchange.Config{Timeout: askTimeout, ConnectTimeout: askTimeout}
	roots := &tls.Config{RootCAs: s.dns.roots}
	dial := dialers{direct: net.Dialer{Timeout: probe.ConnectLimit}}
	if servers := s.privateServers(system); len(servers) > 0 {
		config.Resolvers = append(config.Resolvers, probe.Resolver{
			Check: probe.SystemDNS, Asked: "public names from " + list(servers),
			Ask: ask(func(exchange.Dial) exchange.Server { return exchange.NewGroup("private", plain(servers, dial)...) }),
		})
	}
	config.Resolvers = append(
		config.Resolvers, probe.Resolver{
			Check: probe.DirectDNS, Asked: "public names from " + server(public) + ", without the proxy",
			Ask: ask(func(exchange.Dial) exchange.Server {
				return exchange.NewUDP(public.String(), dial.to("udp", public), dial.to("tcp", public), patient)
			}),
		}, probe.Resolver{
			Check: probe.TCPDNS, Asked: "DNS over TCP, " + server(public),
			Target: upstream.Target{Host: public.Addr().String(), Port: public.Port()},
			Ask:    ask(func(d exchange.Dial) exchange.Server { return exchange.NewTCP(public.String(), d, patient) }),
		}, probe.Resolver{
			Check: probe.HTTPSDNS, Asked: "DNS over HTTPS, " + s.dns.endpoint.Host, Target: endpoint,
			Ask: ask(func(d exchange.Dial) exchange.Server {
				return exchange.NewHTTPS(s.dns.endpoint, d, roots, patient)
			}),
		}, probe.Resolver{
			Check: probe.TLSDNS, Asked: "DNS over TLS, " + overTLS.text(), Target: upstream.Target{Host: overTLS.host, Port: overTLS.port},
			Ask: ask(func(d exchange.Dial) exchange.Server {
				return exchange.NewTLS(overTLS.name, d, &tls.Config{RootCAs: s.dns.roots, ServerName: overTLS.name}, patient)
			}),
		},
	)
	return config, err
}

// ask makes the Ask of a resolver of a server that is opened for one question.
func ask(open func(exchange.Dial) exchange.Server) func(context.Context, func(context.Context) (net.Conn, error), []byte) ([]byte, error) {
	return func(ctx context.Context, dial func(context.Context) (net.Conn, error), query []byte) ([]byte, error) {
		server := open(dial)
		defer server.Close()
		return server.Exchange(ctx, query)
	}
}

// publicServer is the public name server of the flags, or the usual one.
func (s *settings) publicServer() netip.AddrPort {
	if len(s.dns.public) > 0 {
		return s.dns.public[0]
	}
	return netip.AddrPortFrom(netip.MustParseAddr(publicAddress), portDNS)
}

// overTLS is the same for DNS over TLS.
func (s *settings) overTLS() dnsOverTLS {
	if s.dns.tls.name != "" {
		return s.dns.tls
	}
	return dnsOverTLS{name: publicName, host: publicName, port: portDNSOverTLS}
}

// text is a server as --dns-over-tls takes it.
func (d dnsOverTLS) text() string {
	text := d.name
	if d.host != d.name {
		text += "@" + d.host
		if strings.Contains(d.host, ":") && d.port != portDNSOverTLS {
			text = d.name + "@[" + d.host + "]"
		}
	}
	if d.port != portDNSOverTLS {
		text += ":" + strconv.Itoa(int(d.port))
	}
	return text
}

// server is a name server as --public-dns takes it.
func server(address netip.AddrPort) string {
	if address.Port() == portDNS {
		return address.Addr().String()
	}
	return address.String()
}

// list are name servers as --private-dns takes them.
func list(servers []netip.AddrPort) string {
	var texts []string
	for _, address := range servers {
		texts = append(texts, server(address))
	}
	return strings.Join(texts, ",")
}

// privateServers are the name servers of the flags, or of this host.
func (s *settings) privateServers(system system) []netip.AddrPort {
	if len(s.dns.private) > 0 {
		return s.dns.private
	}
	return system.servers
}

// Where this host says who is asked for names. The second is what systemd-resolved asks
// where the first names itself alone.
const resolvConf, resolvedConf = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"

// system is what this host knows of its network's names.
type system struct {
	servers []netip.AddrPort
	search  []string // the domains in which short names are looked for: the company's own
}

// systemNames reads the first of the files (resolv.conf(5)) that names a server which is
// not on this host; else the first that names any.
func systemNames(files ...string) system {
	var local system
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		found := parseResolvConf(string(text))
		if slices.ContainsFunc(found.servers, func(server netip.AddrPort) bool { return !server.Addr().IsLoopback() }) {
			return found
		}
		if len(local.servers) == 0 {
			local = found
		}
	}
	return local
}

func parseResolvConf(text string) system {
	var found system
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if address, err := netip.ParseAddr(fields[1]); err == nil && !address.IsUnspecified() {
				found.servers = append(found.servers, netip.AddrPortFrom(address.Unmap(), portDNS))
			}
		case "search", "domain": // the last one counts
			found.search = nil
			for _, domain := range fields[1:] {
				if domain = strings.Trim(domain, "."); strings.Contains(domain, ".") {
					found.search = append(found.search, domain)
				}
			}
		}
	}
	return found
}
