package test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// The public DNS server, which the proxy alone reaches. Its network is a part of
// the origin's, so that whoever goes past the proxy ends at the router.
var (
	public4 = netip.MustParseAddr("203.0.113.50")
	public6 = netip.MustParseAddr("2001:db8:3:1::50")
)

// anywhere are servers that clients ask, as they were told at home: none exists.
var anywhere = []netip.Addr{netip.MustParseAddr("203.0.113.53"), netip.MustParseAddr("2001:db8:3::53")}

// Each server has its own answer to the same question.
const (
	fromPublic4, fromPublic6   = "203.0.113.7", "2001:db8:3::7" // the origin
	fromPrivate4, fromPrivate6 = "10.0.0.1", "2001:db8:77::1"
	fromPast4, fromPast6       = "192.0.2.66", "2001:db8:66::66"
)

// Of these, bigTXT is more than fits into UDP without EDNS, and hugeTXT more than the
// 1,232 bytes that servers and clients agree upon with it.
var (
	bigTXT  = strings.Repeat(` "`+strings.Repeat("x", 100)+`"`, 8)
	hugeTXT = strings.Repeat(` "`+strings.Repeat("y", 100)+`"`, 40)
)

// dnsWorld is a world with DNS servers.
type dnsWorld struct {
	*world
	public  *lab.Nameserver // behind the proxy: TCP, TLS and HTTPS
	private *lab.Nameserver // in the company's network, reached directly
	past    *lab.Nameserver // answers what is sent to public servers past the proxy

	publicHost *netns.NS
}

// newDNSWorld is the routed layout; the private server is a neighbour on the uplink.
func newDNSWorld(t *testing.T) *dnsWorld {
	t.Helper()
	w := &dnsWorld{world: newWorld(t)}
	w.populate(w.Neighbour)
	return w
}

// newOneArmedDNSWorld has one card; the private server is beside the clients.
func newOneArmedDNSWorld(t *testing.T) *dnsWorld {
	t.Helper()
	w := &dnsWorld{world: newOneArmedWorld(t)}
	w.populate(w.Server)
	return w
}

func (w *dnsWorld) populate(private *netns.NS) {
	w.t.Helper()
	w.public = &lab.Nameserver{
		Records: []string{
			"*.public.test 300 A " + fromPublic4, "*.public.test 300 AAAA " + fromPublic6,
			"big.public.test 300 TXT" + bigTXT, "huge.public.test 300 TXT" + hugeTXT,
			"*.notcorp.test 300 A " + fromPublic4, "notcorp.test 300 A " + fromPublic4,
			"alias.public.test 300 CNAME target.public.test",
			"*.in-addr.arpa 300 PTR from.public.test", "*.ip6.arpa 300 PTR from.public.test",
		},
		Certified: []string{"dns.test", "dns.google"},
	}
	w.private = &lab.Nameserver{Records: []string{
		"*.corp.test 300 A " + fromPrivate4, "*.corp.test 300 AAAA " + fromPrivate6,
		"corp.test 300 A " + fromPrivate4,
		"big.corp.test 300 TXT" + bigTXT, "huge.corp.test 300 TXT" + hugeTXT,
		"*.other.test 300 A " + fromPrivate4,
		"*.in-addr.arpa 300 PTR from.corp.test", "*.ip6.arpa 300 PTR from.corp.test",
	}}
	w.past = &lab.Nameserver{Records: []string{
		"*. 300 A " + fromPast4, "*. 300 AAAA " + fromPast6, "*. 300 TXT" + hugeTXT,
	}}
	host, err := netns.New()
	must(w.t, err)
	w.t.Cleanup(func() { host.Close() })
	w.publicHost = host
	must(w.t,
		netns.Connect(w.Proxy, "dns", host, "eth0"),
		w.Proxy.Addr("dns", "203.0.113.49/28", "2001:db8:3:1::1/64"),
		host.Addr("eth0", public4.String()+"/28", public6.String()+"/64"),
		w.Router.Local("2001:db8:3:1::/64"))
	w.startNameserver(w.public, host)
	w.startNameserver(w.private, private)
	w.startNameserver(w.past, w.Router)
	w.knows(map[string]netip.Addr{"dns.test": public4, "dns.google": public6})
}

func (w *dnsWorld) startNameserver(server *lab.Nameserver, ns *netns.NS) {
	w.t.Helper()
	must(w.t, server.Start(ns))
	w.t.Cleanup(server.Close)
}

// knows teaches the proxy names.
func (w *dnsWorld) knows(names map[string]netip.Addr) {
	w.proxy.Change(func() {
		known := maps.Clone(w.proxy.Hosts)
		maps.Copy(known, names)
		w.proxy.Hosts = known
	})
}

// upstream is the --upstream of the layout.
func (w *dnsWorld) upstream() string {
	if w.Neighbour == nil {
		return fmt.Sprintf("http://%s%s:%d", proxyUser, lab.OneArmedProxy4, lab.ProxyPort)
	}
	return upstream()
}

// gateway starts the program with the lab's proxy as upstream.
func (w *dnsWorld) gateway(arguments ...string) *gateway {
	w.t.Helper()
	return startGateway(w.t, w.Gateway, append([]string{"--upstream", w.upstream()}, arguments...)...)
}

// authority writes the public server's certificate to a file, for --dns-ca.
func (w *dnsWorld) authority() string {
	w.t.Helper()
	name := filepath.Join(w.t.TempDir(), "ca.pem")
	must(w.t, os.WriteFile(name, w.public.CA(), 0o600))
	return name
}

// questionLimit bounds a question, all of which take milliseconds, with time for a
// resolver's second attempt.
const questionLimit = 5 * time.Second

// ask asks a server on port 53 from a host.
func ask(t *testing.T, ns *netns.NS, network string, server netip.Addr, name, kind string) (*dns.Msg, error) {
	t.Helper()
	return exchange(t.Context(), ns, network, netip.AddrPortFrom(server, 53), newQuestion(name, kind), questionLimit)
}

func newQuestion(name, kind string) *dns.Msg {
	return new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.StringToType[kind])
}

// exchange asks a server. The socket is connected: an answer from another address
// or port than those asked does not reach it.
func exchange(ctx context.Context, ns *netns.NS, network string, server netip.AddrPort, query *dns.Msg, limit time.Duration) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	socket, err := ns.Dial(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	deadline, _ := ctx.Deadline()
	if err := socket.SetDeadline(deadline); err != nil {
		return nil, err
	}
	return converse(socket, query)
}

// converse asks on an open socket.
func converse(socket net.Conn, query *dns.Msg) (*dns.Msg, error) {
	conn := &dns.Conn{Conn: socket, UDPSize: dns.MaxMsgSize}
	if err := conn.WriteMsg(query); err != nil {
		return nil, err
	}
	answer, err := conn.ReadMsg()
	if err != nil {
		return nil, err
	}
	if answer.Id != query.Id || !answer.Response || !slices.Equal(answer.Question, query.Question) {
		return nil, fmt.Errorf("it is the answer to another question: %s", answer)
	}
	return answer, nil
}

// data are the contents of the answer section that are of the type asked for, in
// the form of zone files.
func data(answer *dns.Msg) string {
	var found []string
	for _, record := range answer.Answer {
		if record.Header().Rrtype == answer.Question[0].Qtype {
			found = append(found, strings.TrimPrefix(record.String(), record.Header().String()))
		}
	}
	return strings.Join(found, " ")
}

// wantAnswer asks a server on port 53 and wants an answer.
func wantAnswer(t *testing.T, ns *netns.NS, network string, server netip.Addr, name, kind, want string) {
	t.Helper()
	answer, err := ask(t, ns, network, server, name, kind)
	if err != nil {
		t.Errorf("%s %s of %s over %s: %v", name, kind, server, network, err)
		return
	}
	if got := data(answer); answer.Rcode != dns.RcodeSuccess || got != want {
		t.Errorf("%s %s of %s over %s: %s, %q; want %q", name, kind, server, network, dns.RcodeToString[answer.Rcode], got, want)
	}
}

// resolve asks for an address of a name, over its own family.
func resolve(t *testing.T, ns *netns.NS, name, kind string) netip.Addr {
	t.Helper()
	server := anywhere[0]
	if kind == "AAAA" {
		server = anywhere[1]
	}
	answer, err := ask(t, ns, "udp", server, name, kind)
	if err != nil {
		t.Fatalf("%s %s: %v", name, kind, err)
	}
	address, err := netip.ParseAddr(data(answer))
	if err != nil {
		t.Fatalf("%s %s is not an address: %s", name, kind, answer)
	}
	return address
}

// wantRcode asks a server on port 53 over UDP and wants no more than a code.
func wantRcode(t *testing.T, ns *netns.NS, name, kind string, rcode int) {
	t.Helper()
	answer, err := ask(t, ns, "udp", anywhere[0], name, kind)
	if err != nil {
		t.Errorf("%s %s: %v", name, kind, err)
	} else if answer.Rcode != rcode || len(answer.Answer) > 0 {
		t.Errorf("%s %s: want %s and no records:\n%s", name, kind, dns.RcodeToString[rcode], answer)
	}
}

// wantSilence wants a question to be dropped or refused.
func wantSilence(t *testing.T, ns *netns.NS, network string, server netip.AddrPort, name string) {
	t.Helper()
	answer, err := exchange(t.Context(), ns, network, server, newQuestion(name, "A"), 300*time.Millisecond)
	if err == nil && (answer.Rcode != dns.RcodeRefused || len(answer.Answer) > 0) {
		t.Errorf("%s answers over %s: %s", server, network, answer)
	}
}

// transports are those over which a name's questions came, each once.
func transports(questions []lab.Question) []string {
	var found []string
	for _, q := range questions {
		found = append(found, q.Transport)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// names are the names of questions, each once, in order of the alphabet.
func names(questions []lab.Question) []string {
	var found []string
	for _, q := range questions {
		found = append(found, q.Name)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// wantNothingPast wants no question to have gone past the proxy.
func (w *dnsWorld) wantNothingPast() {
	w.t.Helper()
	if asked := w.past.Asked(); len(asked) > 0 {
		w.t.Errorf("past the proxy went %v", asked)
	}
}

// wantPortUnreachable wants a datagram of a host to be refused at once.
func wantPortUnreachable(t *testing.T, ns *netns.NS, to netip.AddrPort) {
	t.Helper()
	socket, err := ns.Dial(t.Context(), "udp", to.String())
	must(t, err)
	defer socket.Close()
	must(t, socket.SetDeadline(time.Now().Add(time.Second)))
	if _, err := socket.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := socket.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a datagram to %s: %v and not a refusal", to, err)
	}
}
