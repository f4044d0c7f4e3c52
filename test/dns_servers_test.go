package test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestDNSUntrusted: a server whose certificate nobody vouches for is told nothing.
func TestDNSUntrusted(t *testing.T) {
	for _, arguments := range [][]string{
		{"--dns-over-https-enabled", "--dns-over-https-endpoint", "https://dns.test/dns-query"},
		{"--dns-over-tls", "dns.test"},
	} {
		t.Run(arguments[0], func(t *testing.T) {
			w := newDNSWorld(t)
			w.gateway(arguments...)
			wantRcode(t, w.Client, "a.public.test", "A", dns.RcodeServerFailure)
			if asked := w.public.Asked(); len(asked) > 0 || len(w.proxy.Targets()) == 0 {
				t.Errorf("it was asked %v; the proxy saw %q", asked, w.proxy.Targets())
			}
		})
	}
}

// TestForgedAnswers: neither over UDP nor on a stream is a false answer taken.
func TestForgedAnswers(t *testing.T) {
	w := newDNSWorld(t)
	for name, server := range map[string]*lab.Nameserver{"a.corp.test": w.private, "a.public.test": w.public} {
		server.Change(func() { server.Tricks = map[string]lab.Trick{name: {Forge: true}} })
	}
	w.gateway("--public-dns", public4.String(), "--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test")
	wantAnswer(t, w.Client, "udp", anywhere[0], "a.corp.test", "A", fromPrivate4)
	wantAnswer(t, w.Client, "udp", anywhere[0], "a.public.test", "A", fromPublic4)
	for _, forged := range []string{"other.a.corp.test", "other.a.public.test"} {
		if answer, err := ask(t, w.Client, "udp", anywhere[0], forged, "A"); err != nil || data(answer) == "192.0.2.99" {
			t.Errorf("%s was remembered: %v, %v", forged, answer, err)
		}
	}
}

// TestSlowQuestionsDelayNoOthers, on the one connection that there is.
func TestSlowQuestionsDelayNoOthers(t *testing.T) {
	w := newDNSWorld(t)
	w.public.Change(func() { w.public.Tricks = map[string]lab.Trick{"silent.public.test": {Silent: true}} })
	w.gateway("--public-dns", public4.String())
	wantAnswer(t, w.Client, "udp", anywhere[0], "first.public.test", "A", fromPublic4)
	socket, err := w.Client.Dial(t.Context(), "udp", net.JoinHostPort(anywhere[0].String(), "53"))
	must(t, err)
	defer socket.Close()
	conn := &dns.Conn{Conn: socket}
	must(t, conn.WriteMsg(newQuestion("silent.public.test", "A")))
	if !within(questionLimit, func() bool { return len(w.public.AskedFor("silent.public.test")) > 0 }) {
		t.Fatal("the question did not arrive")
	}
	answer, err := exchange(t.Context(), w.Client, "udp", netip.AddrPortFrom(anywhere[0], 53), newQuestion("second.public.test", "A"), time.Second)
	if err != nil || data(answer) != fromPublic4 {
		t.Errorf("another question: %v, %v", answer, err)
	}
}

// TestDNSFailOver: the second server answers in place of one that is silent, one
// that cannot say, and one to which the proxy finds no way.
func TestDNSFailOver(t *testing.T) {
	w := newDNSWorld(t)
	w.private.Change(func() {
		w.private.Tricks = map[string]lab.Trick{
			"silent.corp.test": {Silent: true}, "fails.corp.test": {Rcode: dns.RcodeServerFailure},
		}
	})
	second := &lab.Nameserver{Records: []string{"*.corp.test 300 A 10.0.0.2"}}
	w.startNameserver(second, w.Server)
	w.proxy.Change(func() {
		w.proxy.Answer = func(target string) (raw string, silent bool) { return "", target == "203.0.113.51:53" }
	})
	w.gateway("--private-dns", lab.Neighbour4.String()+","+lab.Server4.String(), "--no-proxy", "corp.test",
		"--public-dns", "203.0.113.51,"+public4.String())
	// The first use of a credential is alone on its way: not behind the proxy's silence.
	wantBanner(t, w.Client, lab.Origin4)
	for name, want := range map[string]string{
		"a.corp.test": fromPrivate4, "silent.corp.test": "10.0.0.2", "fails.corp.test": "10.0.0.2", "a.public.test": fromPublic4,
	} {
		start := time.Now()
		wantAnswer(t, w.Client, "udp", anywhere[0], name, "A", want)
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s took %v", name, took)
		}
	}
}
