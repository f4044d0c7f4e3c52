package main

import (
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// settings is what the command line and the environment ask for, checked one by
// one; what they mean on this host is worked out in plan.go.
type settings struct {
	proxies []*upstream.Proxy // of the flag
	order   upstream.Order
	tls     tlsSettings
	warm    int // connections opened ahead
	noProxy *bypass.List

	pac    string  // where the script is, or pacAuto; empty for none
	script *script // nil without one, and before it is opened

	// The groups of upstreams are there once the settings are resolved.
	upstream     *upstream.Group // nil without any upstream
	httpUpstream *upstream.Group // for port 80 when http_proxy differs; nil for no difference

	sources []netip.Addr
	dns     dnsSettings
	http    httpSettings
	udp     udpSettings
	auth    authSettings
	output  outputSettings
	probe   probeSettings
	engine  string
	router  bool   // the duties of a router as well
	state   string // directory for what has to survive a kill

	interfaces []string
	clients    []netip.Prefix
	ports      []netfilter.PortRange
	listenPort uint16
	install    bool // change the kernel; false prints what to install
	firewalld  bool // have it let captured packets pass
	failClosed bool

	mark         uint32
	table        int
	rulePriority int
	nftTable     string

	maxConns       int // 0: from the limit of open files
	peekTimeout    time.Duration
	connectTimeout time.Duration
	replyTimeout   time.Duration
	idleTimeout    time.Duration
	halfClose      time.Duration
	drainTimeout   time.Duration

	level     zerolog.Level
	logFormat string
	accessLog string
	query     bool     // in the URLs of the access log
	notes     []string // flags that were accepted without effect; told once at start
}

// option is one flag. The table of options is the only place where a flag is
// described: parsing, environment names and help are made of it.
type option struct {
	group  string
	name   string
	value  string // placeholder in the help; empty for a switch
	preset string // default; set before the environment and the command line
	help   string
	set    func(*settings, string) error
}

// environment is the variable that sets the option when the command line does not.
func (o option) environment() string {
	return environmentPrefix + strings.ToUpper(strings.ReplaceAll(o.name, "-", "_"))
}

// environmentPrefix begins the names of all variables that set a flag.
const environmentPrefix = "TRANSPROXY_"

// Groups of the help, in its order.
const (
	groupUpstream = "Where the traffic goes"
	groupCapture  = "What is captured"
	groupDNS      = "How names are resolved (without any of these ways port 53 is left alone)"
	groupHTTP     = "Plain HTTP, and clients that have proxy settings"
	groupKernel   = "Numbers used in the kernel (change them when another program holds them)"
	groupLimits   = "Limits"
	groupLog      = "Logging"
	groupProbe    = "For probe alone"
	groupAncestor = "Accepted from go-transproxy"
)

var groups = []string{groupUpstream, groupCapture, groupDNS, groupHTTP, groupKernel, groupLimits, groupLog, groupProbe, groupAncestor}

// options is the table of all flags.
func options() []option {
	table := []option{
		{
			groupUpstream, "upstream", "URL,...", "", "the proxy: http://[user:password@]host:port, https://…, socks5://…, socks4a://…, or on a\n" +
				"unix socket http+unix:///run/proxy.sock; percent-encode special characters; of several\n" +
				"the next ones stand in for one that is down; direct:// is the way without a proxy\n" +
				"(default: $https_proxy, then $http_proxy; port 80 looks at $http_proxy first)",
			func(s *settings, v string) (err error) { s.proxies, err = upstream.ParseList(v); return err },
		},
		{
			groupUpstream, "pac", "URL|FILE|auto", "", "a PAC script says which upstream carries a flow, by host and port; --upstream carries\n" +
				"what it fails to answer. auto looks for http://wpad.DOMAIN/wpad.dat in the search domains",
			func(s *settings, v string) error { s.pac = v; return nil },
		},
		{
			groupUpstream, "upstream-policy", "first|least-latency|hash-client", "first", "which of several is used while it is up: the first, the one that is connected\n" +
				"to fastest, or one for each client, always the same", setOrder,
		},
		{
			groupUpstream, "warm-connections", "NUMBER", "32", "connections to the upstream opened ahead of the flows, at most, where it is 1 ms away or more;\n" +
				"how many is learnt from the flows that come at once; 0 for none",
			setNumber("number of connections", 0, 1024, func(s *settings, n int) { s.warm = n }),
		},
		{
			groupUpstream, "upstream-source", "ADDRESS,...", "", "addresses of this host to connect from, in turn, when one has too few ports\n" +
				"(each has about 28,000 towards one proxy)",
			setSources,
		},
		{
			groupUpstream, "no-proxy", "LIST", "", "reached directly: addresses, CIDR prefixes, domain suffixes, *, each with :port if need be\n" +
				"(default: $no_proxy; nothing is exempt when it is unset)",
			func(s *settings, v string) (err error) { s.noProxy, err = bypass.Parse(v); return err },
		},

		{
			groupCapture, "interface", "NAME,...", "", "capture what comes in on these (default: all but the ones of the default routes,\n" +
				"unless there is only one)",
			func(s *settings, v string) error { s.interfaces = splitList(v); return nil },
		},
		{groupCapture, "allow-clients", "PREFIX,...", "", "capture only these sources (default: the networks of the capturing interfaces)", setClients},
		{groupCapture, "tcp-proxy-dports", "PORTS", "22", "captured TCP ports besides 80 and 443: numbers, ranges (8000-8999) or all", setPorts},
		{
			groupCapture, "gateway", "", "", "be the clients' router as well: forwarding on, redirects off, masquerade and fitting\n" +
				"segments for what is not captured; all of it undone at the stop",
			setSwitch(func(s *settings, on bool) { s.router = on }),
		},
		{
			groupCapture, "state-dir", "DIR", "/run/transproxy-tproxy", "where it is kept what --gateway and --firewalld have changed",
			func(s *settings, v string) error { s.state = v; return nil },
		},
		{
			groupCapture, "firewalld", "", "", "have firewalld let captured packets pass, over D-Bus; undone at the stop",
			setSwitch(func(s *settings, on bool) { s.firewalld = on }),
		},
		{groupCapture, "fail", "open|closed", "open", "what happens to these flows when this program is gone without a stop:\n" +
			"open forwards them as if it were not there, closed resets them", setFail},

		{
			groupKernel, "engine", "auto|tproxy|sk_lookup", engineAuto, "what gives captured packets to the listeners: the rules (tproxy), or a\n" +
				"BPF program (sk_lookup), which serves bridges under bridge-nf-call-iptables as well", setChoice("engine",
				func(s *settings) *string { return &s.engine }, engineAuto, engineTPROXY, engineLookup),
		},
		{groupKernel, "tcp-proxy-listen", "PORT", "15001", "port of the transparent listeners on 127.0.0.1 and [::1]", setListen},
		{groupKernel, "dns-tproxy-listen", "PORT", "15053", "the same for DNS", setDNSPort},
		{groupKernel, "mark", "MASK", "0x07000000", "three bits of the packet mark", setMask},
		{groupKernel, "table", "NUMBER", "4219", "routing table", setNumber("table", 1, 1<<31-1, func(s *settings, n int) { s.table = n })},
		{groupKernel, "rule-priority", "NUMBER", "4218", "first of three rule priorities", setNumber("priority", 1, 32763, func(s *settings, n int) { s.rulePriority = n })},
		{
			groupKernel, "nft-table", "NAME", "transproxy", "nftables table (family inet)",
			func(s *settings, v string) error { s.nftTable = v; return nil },
		},

		{
			groupLimits, "max-conns", "NUMBER", "0", "flows at once; more are reset (default 0: what the limit of open files allows)",
			setNumber("number of flows", 0, 1<<24, func(s *settings, n int) { s.maxConns = n }),
		},
		{
			groupLimits, "peek-timeout", "TIME", "5s", "waiting for a client's first bytes on ports 80 and 443",
			setDuration(func(s *settings, d time.Duration) { s.peekTimeout = d }),
		},
		{
			groupLimits, "connect-timeout", "TIME", "5s", "opening a connection to the upstream or directly",
			setDuration(func(s *settings, d time.Duration) { s.connectTimeout = d }),
		},
		{
			groupLimits, "reply-timeout", "TIME", "30s", "the upstream's answer to CONNECT, its own dialling included",
			setDuration(func(s *settings, d time.Duration) { s.replyTimeout = d }),
		},
		// RFC 5382 REQ-5: at least 2 h 4 min for an established connection, 4 min for one half closed.
		{
			groupLimits, "idle-timeout", "TIME", "2h4m", "a flow on which nothing moves",
			setDuration(func(s *settings, d time.Duration) { s.idleTimeout = d }),
		},
		{
			groupLimits, "half-close-timeout", "TIME", "4m", "the same, once one side has closed",
			setDuration(func(s *settings, d time.Duration) { s.halfClose = d }),
		},
		{
			groupLimits, "drain-timeout", "TIME", "5s", "how long flows may run on at a stop",
			setDuration(func(s *settings, d time.Duration) { s.drainTimeout = d }),
		},

		{groupLog, "loglevel", "LEVEL", "info", "debug, info, warn, error", setLevel},
		{groupLog, "log-format", "FORMAT", "auto", "console, json, or auto: console on a terminal", setChoice("log format",
			func(s *settings) *string { return &s.logFormat }, "auto", "console", "json")},
		{
			groupLog, "access-log", "FILE", "-", "one line a tunnel or an HTTP request at its end: a file, - for standard output, or off",
			func(s *settings, v string) error { s.accessLog = v; return nil },
		},
		{groupLog, "access-log-query", "", "", "with the query in URLs, which may hold secrets", setSwitch(func(s *settings, on bool) { s.query = on })},

		{
			groupAncestor, "disable-iptables", "", "", "change nothing in the kernel; print what to install and serve",
			setSwitch(func(s *settings, on bool) { s.install = !on }),
		},
		{groupAncestor, "http-proxy-listen", "ADDRESS", "", "no effect: one transparent listener serves all ports", setNote("http-proxy-listen")},
		{groupAncestor, "https-proxy-listen", "ADDRESS", "", "no effect: one transparent listener serves all ports", setNote("https-proxy-listen")},
	}
	table = append(table, tlsOptions()...)
	table = append(table, udpOptions()...)
	table = append(table, authOptions()...)
	table = append(table, outputOptions()...)
	table = append(table, dnsOptions()...)
	table = append(table, probeOptions()...)
	return append(table, httpOptions()...)
}

func setOrder(s *settings, value string) error {
	switch value {
	case "first":
		s.order = upstream.First
	case "least-latency":
		s.order = upstream.LeastLatency
	case "hash-client":
		s.order = upstream.HashClient
	default:
		return fmt.Errorf("%q: use first, least-latency or hash-client", value)
	}
	return nil
}

func setSources(s *settings, value string) error {
	s.sources = nil
	for _, text := range splitList(value) {
		address, err := netip.ParseAddr(text)
		if err != nil || address.IsUnspecified() {
			return fmt.Errorf("%q is not an address: give addresses of this host, such as 192.168.1.2", text)
		}
		s.sources = append(s.sources, address.Unmap())
	}
	return nil
}

func setClients(s *settings, value string) (err error) {
	s.clients, err = parsePrefixes(value)
	return err
}

// parsePrefixes reads prefixes; an address stands for itself alone.
func parsePrefixes(value string) (prefixes []netip.Prefix, err error) {
	for _, text := range splitList(value) {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			address, addressErr := netip.ParseAddr(text)
			if addressErr != nil || address.Zone() != "" {
				return nil, fmt.Errorf("%q is not a prefix: write it like 192.168.1.0/24 or 2001:db8::/64", text)
			}
			prefix = netip.PrefixFrom(address, address.BitLen())
		}
		prefixes = append(prefixes, prefix.Masked())
	}
	return prefixes, nil
}

func setPorts(s *settings, value string) error {
	ports, err := parsePorts(value)
	s.ports = append([]netfilter.PortRange{{First: 80, Last: 80}, {First: 443, Last: 443}}, ports...)
	return err
}

// parsePorts reads ports and ranges of them.
func parsePorts(value string) (ports []netfilter.PortRange, err error) {
	for _, text := range splitList(value) {
		if text == "all" {
			return []netfilter.PortRange{{First: 1, Last: 65535}}, nil
		}
		first, last, isRange := strings.Cut(text, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 16)
		to, errLast := strconv.ParseUint(last, 10, 16)
		if err != nil || errLast != nil || from == 0 || to < from {
			return nil, fmt.Errorf("%q is not a port: use numbers from 1 to 65535, ranges like 8000-8999, or all", text)
		}
		ports = append(ports, netfilter.PortRange{First: uint16(from), Last: uint16(to)})
	}
	return ports, nil
}

func setFail(s *settings, value string) error {
	switch value {
	case "open", "closed":
		s.failClosed = value == "closed"
		return nil
	}
	return fmt.Errorf("%q: use open or closed", value)
}

// setListen takes a port, and as the ancestor did ":port". An address other than
// loopback is refused: nobody but the kernel may deliver to these listeners.
func setListen(s *settings, value string) error {
	text := strings.TrimPrefix(value, ":")
	if address, err := netip.ParseAddrPort(value); err == nil {
		if !address.Addr().IsLoopback() {
			return fmt.Errorf("%q: transparent listeners are on loopback only: give just the port", value)
		}
		text = strconv.Itoa(int(address.Port()))
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("%q is not a port: use a number from 1 to 65535", value)
	}
	s.listenPort = uint16(port)
	return nil
}

func setMask(s *settings, value string) error {
	mask, err := strconv.ParseUint(value, 0, 32)
	if err != nil || bits.OnesCount64(mask) != 3 {
		return fmt.Errorf("%q is not a mask of three bits: use one like 0x07000000", value)
	}
	s.mark = uint32(mask)
	return nil
}

func setLevel(s *settings, value string) error {
	if value == "fatal" || value == "panic" {
		s.notes = append(s.notes, "--loglevel "+value+" is taken for error")
		value = "error"
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, strings.ToLower(value)) {
		return fmt.Errorf("%q: use debug, info, warn or error", value)
	}
	level, err := zerolog.ParseLevel(strings.ToLower(value))
	s.level = level
	return err
}

func setNumber(what string, least, most int, store func(*settings, int)) func(*settings, string) error {
	return func(s *settings, value string) error {
		number, err := strconv.Atoi(value)
		if err != nil || number < least || number > most {
			return fmt.Errorf("%q is not a %s: use a number from %d to %d", value, what, least, most)
		}
		store(s, number)
		return nil
	}
}

func setDuration(store func(*settings, time.Duration)) func(*settings, string) error {
	return func(s *settings, value string) error {
		duration, err := time.ParseDuration(value)
		if err != nil || duration < 10*time.Millisecond {
			return fmt.Errorf("%q is not a time: write it like 500ms, 10s or 2h", value)
		}
		store(s, duration)
		return nil
	}
}

func setChoice(what string, field func(*settings) *string, choices ...string) func(*settings, string) error {
	return func(s *settings, value string) error {
		if !slices.Contains(choices, value) {
			return fmt.Errorf("%q is not a %s: use %s", value, what, strings.Join(choices, ", "))
		}
		*field(s) = value
		return nil
	}
}

func setSwitch(store func(*settings, bool)) func(*settings, string) error {
	return func(s *settings, value string) error {
		on, err := strconv.ParseBool(value)
		if err != nil {
			return fmt.Errorf("%q: use true or false", value)
		}
		store(s, on)
		return nil
	}
}

func setNote(name string) func(*settings, string) error {
	return func(s *settings, _ string) error {
		s.notes = append(s.notes, "--"+name+" has no effect: one transparent listener serves all ports (--tcp-proxy-listen)")
		return nil
	}
}

// splitList cuts a value at commas and leaves out what is empty.
func splitList(value string) []string {
	return strings.FieldsFunc(value, func(r rune) bool { return r == ',' || r == ' ' })
}

// firstSet returns the value of the first of these variables that is not empty,
// and its name.
func firstSet(names ...string) (value, name string) {
	for _, name := range names {
		if value := os.Getenv(name); value != "" {
			return value, name
		}
	}
	return "", ""
}

// resolve fills what the flags left open from the variables that other programs
// read as well. The order for https is the ancestor's; lower case goes first, as in
// curl. Without any upstream there is no error.
func (s *settings) resolve() error {
	var forHTTP []*upstream.Proxy
	if len(s.proxies) == 0 {
		var err error
		if s.proxies, err = upstreamsOf("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"); err != nil {
			return err
		}
		if forHTTP, err = upstreamsOf("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"); err != nil {
			return err
		}
		if same(s.proxies, forHTTP) {
			forHTTP = nil
		}
	}
	if len(s.proxies) > 0 {
		s.upstream = upstream.NewGroup(s.order, s.proxies...)
	}
	if len(forHTTP) > 0 {
		s.httpUpstream = upstream.NewGroup(s.order, forHTTP...)
	}
	if s.noProxy == nil {
		value, name := firstSet("no_proxy", "NO_PROXY")
		list, err := bypass.Parse(value)
		if err != nil {
			return fmt.Errorf("$%s: %w", name, err)
		}
		s.noProxy = list
	}
	return nil
}

// upstreamsOf are the proxies that the first of these variables names; nil for none.
func upstreamsOf(variables ...string) ([]*upstream.Proxy, error) {
	value, name := firstSet(variables...)
	if value == "" {
		return nil, nil
	}
	proxies, err := upstream.ParseList(value)
	if err != nil {
		return nil, fmt.Errorf("$%s: %w", name, err)
	}
	return proxies, nil
}

// same reports whether two lists are the same proxies. What they share of credentials is
// one account from then on.
func same(these, those []*upstream.Proxy) bool {
	alike := len(these) == len(those)
	for i, that := range those {
		for j, this := range these {
			if joined := that.Join(this); i == j && !joined {
				alike = false
			}
		}
	}
	return alike
}
