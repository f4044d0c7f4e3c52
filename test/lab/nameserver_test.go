package lab_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestNameserverAnswersFromItsTable(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	server := lab.Nameserver{
		Records: []string{
			"host.test 60 A 192.0.2.1", "*.wild.test 60 A 192.0.2.2", "alias.test 60 CNAME a.wild.test",
			"big.test 60 TXT" + strings.Repeat(` "`+strings.Repeat("x", 100)+`"`, 8),
		},
		Tricks: map[string]lab.Trick{"fails.test": {Rcode: dns.RcodeServerFailure}},
	}
	for range 2 { // it can be started again
		if err := server.Start(ns); err != nil {
			t.Fatal(err)
		}
		for _, test := range []struct {
			network, name string
			kind          uint16
			rcode, count  int
			truncated     bool
		}{
			{"udp", "HOST.test.", dns.TypeA, dns.RcodeSuccess, 1, false},
			{"tcp", "host.test.", dns.TypeA, dns.RcodeSuccess, 1, false},
			{"udp", "host.test.", dns.TypeAAAA, dns.RcodeSuccess, 0, false},
			{"udp", "a.b.wild.test.", dns.TypeA, dns.RcodeSuccess, 1, false},
			{"udp", "alias.test.", dns.TypeA, dns.RcodeSuccess, 2, false},
			{"udp", "wild.test.", dns.TypeA, dns.RcodeNameError, 0, false},
			{"udp", "big.test.", dns.TypeTXT, dns.RcodeSuccess, 0, true},
			{"tcp", "big.test.", dns.TypeTXT, dns.RcodeSuccess, 1, false},
			{"udp", "fails.test.", dns.TypeA, dns.RcodeServerFailure, 0, false},
		} {
			query := new(dns.Msg).SetQuestion(test.name, test.kind)
			for _, address := range []string{"127.0.0.2:53", "[::1]:53"} {
				answer := question(t, ns, test.network, address, query)
				if answer.Rcode != test.rcode || len(answer.Answer) != test.count || answer.Truncated != test.truncated {
					t.Errorf("%+v at %s: %s", test, address, answer)
				}
			}
		}
		server.Close()
	}
	asked := server.AskedFor("host.test")
	if len(asked) != 2*6 || asked[0].Transport != lab.TransportUDP || asked[2].Transport != lab.TransportTCP || asked[4].Type != "AAAA" ||
		asked[0].Source.Addr() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("it remembers %v", asked)
	}
	if slices.ContainsFunc(server.Asked(), func(q lab.Question) bool { return q.Name == "HOST.test" }) {
		t.Error("names are not in lower case")
	}
}

// question asks on a connected socket.
func question(t *testing.T, ns *netns.NS, network, address string, query *dns.Msg) *dns.Msg {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	socket, err := ns.Dial(ctx, network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	socket.SetDeadline(time.Now().Add(3 * time.Second))
	conn := &dns.Conn{Conn: socket}
	if err := conn.WriteMsg(query); err != nil {
		t.Fatal(err)
	}
	answer, err := conn.ReadMsg()
	if err != nil {
		t.Fatalf("%s over %s: %v", query.Question[0].Name, network, err)
	}
	return answer
}

func TestNameserverOverTLSAndHTTPS(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	server := lab.Nameserver{Records: []string{"host.test 60 A 192.0.2.1"}, Certified: []string{"dns.test"}}
	if err := server.Start(ns); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(server.CA()) {
		t.Fatal("the authority is not PEM")
	}
	query := new(dns.Msg).SetQuestion("host.test.", dns.TypeA)

	socket, err := ns.Dial(t.Context(), "tcp", "127.0.0.1:853")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	socket.SetDeadline(time.Now().Add(3 * time.Second))
	conn := &dns.Conn{Conn: tls.Client(socket, &tls.Config{RootCAs: roots, ServerName: "dns.test"})}
	if err := conn.WriteMsg(query); err != nil {
		t.Fatal(err)
	}
	if answer, err := conn.ReadMsg(); err != nil || len(answer.Answer) != 1 {
		t.Errorf("over TLS: %v, %v", answer, err)
	}

	client := lab.HTTPClient(ns, map[string]netip.Addr{"dns.test": netip.IPv6Loopback()}, roots)
	client.Timeout = 3 * time.Second
	client.Transport.(*http.Transport).ForceAttemptHTTP2 = true
	packed, err := query.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"/dns-query": http.StatusOK, "/resolve": http.StatusBadRequest} {
		response, err := client.Post("https://dns.test"+path, "application/dns-message", bytes.NewReader(packed))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != want {
			t.Fatalf("%s: %s, %v", path, response.Status, err)
		}
		answer := new(dns.Msg)
		if err := answer.Unpack(body); want == http.StatusOK && (err != nil || len(answer.Answer) != 1) {
			t.Errorf("over HTTPS: %v, %v", answer, err)
		}
	}
	var over []string
	for _, q := range server.Asked() {
		over = append(over, q.Transport)
	}
	if !slices.Equal(over, []string{lab.TransportTLS, lab.TransportHTTPS}) {
		t.Errorf("it was asked over %q", over)
	}
}

func TestNameserverTricks(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	server := lab.Nameserver{Records: []string{"*.test 60 A 192.0.2.1"}}
	if err := server.Start(ns); err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	const delay = 50 * time.Millisecond
	server.Change(func() {
		server.Tricks = map[string]lab.Trick{"late.test": {Delay: delay}, "forged.test": {Forge: true}, "silent.test": {Silent: true}}
	})
	for _, network := range []string{"udp", "tcp"} {
		start := time.Now()
		late := question(t, ns, network, "[::1]:53", new(dns.Msg).SetQuestion("late.test.", dns.TypeA))
		if took := time.Since(start); took < delay || len(late.Answer) != 1 {
			t.Errorf("%s: after %v: %s", network, took, late)
		}
		query := new(dns.Msg).SetQuestion("forged.test.", dns.TypeA)
		if forged := question(t, ns, network, "[::1]:53", query); forged.Id == query.Id || !strings.Contains(forged.String(), "192.0.2.99") {
			t.Errorf("%s: the first answer is %s", network, forged)
		}
	}
	socket, err := ns.Dial(t.Context(), "udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	socket.SetDeadline(time.Now().Add(delay))
	conn := &dns.Conn{Conn: socket}
	if err := conn.WriteMsg(new(dns.Msg).SetQuestion("silent.test.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if answer, err := conn.ReadMsg(); err == nil {
		t.Errorf("it answers %s", answer)
	}
	if len(server.AskedFor("silent.test")) != 1 {
		t.Error("it does not remember what it did not answer")
	}
}
