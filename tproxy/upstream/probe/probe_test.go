package probe_test

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// want compares verdicts.
func want(t *testing.T, r *probe.Report, verdicts map[probe.Check]probe.Verdict) {
	t.Helper()
	for check, verdict := range verdicts {
		if got := r.Verdict(check); got != verdict {
			t.Errorf("%s: %s and not %s", check, got, verdict)
		}
	}
}

// wantProof wants a text in the proof of a check.
func wantProof(t *testing.T, r *probe.Report, check probe.Check, text string) {
	t.Helper()
	for _, f := range r.Findings {
		if f.Check == check && strings.Contains(f.Proof, text) {
			return
		}
	}
	t.Errorf("%s: no proof has %q", check, text)
}

const (
	yes, no, unclear, skipped = probe.Yes, probe.No, probe.Unclear, probe.Skipped

	plainURL   = "http://%s"
	rightURL   = "http://user:right@%s"
	wrongURL   = "http://user:wr0ng@%s"
	name443    = probe.Check("connect_443_name")
	address443 = probe.Check("connect_443_address")
	sixth443   = probe.Check("connect_443_ipv6")
)

// only443 is what many companies allow.
func only443(target string) int {
	if strings.HasSuffix(target, ":443") {
		return http.StatusOK
	}
	return http.StatusForbidden
}

func TestProxyThatAllows443Only(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	p := &httpProxy{password: "right", first: only443, far: far, server: "stand-in"}
	p.first = func(target string) int {
		if target == host { // absolute form
			return http.StatusOK
		}
		return only443(target)
	}
	r := ask(t, rightURL, serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
	want(t, r, map[probe.Check]probe.Verdict{
		probe.Reachable: yes, probe.Protocol: yes, probe.Authentication: yes,
		name443: yes, address443: yes, sixth443: yes,
		"connect_80_name": no, "connect_80_address": no, "connect_22_name": no, "connect_53_address": no, "connect_853_name": no,
		probe.AbsoluteForm: yes, probe.IntactTLS: yes, probe.TCPDNS: no, probe.SystemDNS: no,
		probe.UDPAssociate: skipped, probe.Idle: skipped,
	})
	if !r.Usable || r.Refused || !slices.Equal(r.Schemes, []string{"Negotiate", "Basic"}) || r.Issuer != `"Public Root"` {
		t.Errorf("%+v", r)
	}
	wantProof(t, r, probe.Protocol, "407")
	wantProof(t, r, probe.Protocol, "Server: stand-in; Via: 1.1 proxy.test (stand-in)")
	wantProof(t, r, probe.Authentication, "accepts those given")
	wantProof(t, r, "connect_22_name", "403 Forbidden")
	wantProof(t, r, probe.TCPDNS, "403 Forbidden")
	wantProof(t, r, probe.SystemDNS, "NXDOMAIN")
	if p.denied.Load() != 0 || p.without.Load() != 2 { // by the first question, and to learn what is offered
		t.Errorf("%d credentials were refused, and %d requests came without one", p.denied.Load(), p.without.Load())
	}
	// To get in, 11 tunnels, the absolute form, TLS, and once for DNS, whose resolver would try thrice.
	if n := p.with.Load(); n != 15 {
		t.Errorf("%d requests came with the credential", n)
	}
}

func TestProxyThatAllowsEverything(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	p := &httpProxy{far: far}
	r := ask(t, plainURL, serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
	for _, f := range r.Findings {
		if f.Verdict != yes && f.Check != probe.SystemDNS {
			t.Errorf("%s: %s: %s", f.Check, f.Verdict, f.Proof)
		}
	}
	wantProof(t, r, "connect_22_name", "SSH-2.0-standin ?[31mred?")
	wantProof(t, r, "connect_80_name", "204 No Content")
	wantProof(t, r, "connect_853_name", "TLS 1.3")
	wantProof(t, r, probe.TCPDNS, "192.0.2.7")
	if !r.Usable {
		t.Error("it is not usable")
	}
	text, err := json.Marshal(r)
	if err != nil || !strings.Contains(string(text), `"check":"connect_443_name","asked":"CONNECT host.test:443","verdict":"yes"`) {
		t.Errorf("%v: %s", err, text)
	}
}

func TestCredentialIsWantedAndNotGiven(t *testing.T) {
	t.Parallel()
	p := &httpProxy{password: "right"}
	r := ask(t, plainURL, serve(t, p.serve), nil)
	want(t, r, map[probe.Check]probe.Verdict{
		probe.Protocol: yes, probe.Authentication: no, name443: skipped, probe.AbsoluteForm: skipped, probe.TCPDNS: skipped, probe.SystemDNS: no,
	})
	wantProof(t, r, probe.Authentication, "(Negotiate, Basic), and none was given")
	if r.Usable || p.without.Load() != 1 {
		t.Errorf("usable: %t; it was asked %d times", r.Usable, p.without.Load())
	}
}

// TestWrongPasswordIsSentOnce: whatever makes the proxy look at it.
func TestWrongPasswordIsSentOnce(t *testing.T) {
	t.Parallel()
	forbids := func(targets ...string) func(string) int {
		return func(target string) int {
			if slices.Contains(targets, target) {
				return http.StatusForbidden
			}
			return http.StatusOK
		}
	}
	for name, p := range map[string]*httpProxy{
		"at the first tunnel": {password: "right"},
		"at a later one":      {password: "right", first: forbids("host.test:443", "192.0.2.7:443", "host.test:80")},
		"in absolute form": {password: "right", first: func(target string) int {
			if target == host {
				return http.StatusOK
			}
			return http.StatusForbidden
		}},
		"without an answer": {password: "right", drop: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := ask(t, wrongURL, serve(t, p.serve), nil)
			if p.drop {
				if p.with.Load() != 1 || r.Usable {
					t.Errorf("the credential was sent %d times", p.with.Load())
				}
				wantProof(t, r, probe.TCPDNS, "the answer to the credential did not come")
				return
			}
			if n := p.denied.Load(); n != 1 || !r.Refused || r.Usable {
				t.Errorf("it was refused %d times; %+v", n, r)
			}
			want(t, r, map[probe.Check]probe.Verdict{probe.Authentication: no, probe.TCPDNS: skipped})
			wantProof(t, r, probe.Authentication, "refuses those given")
			wantProof(t, r, probe.TCPDNS, "not asked: the credential was refused")
		})
	}
}

// TestTLSInspection: who signed what is seen through the tunnel.
func TestTLSInspection(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, certificate string
		logged, trusted   bool
		verdict           probe.Verdict
		proof             string
	}{
		{"public", host, true, true, yes, `certificate by "Some CA"`},
		{"inspected", host, false, false, no, `certificate by "Some CA" is not from a public root: the proxy inspects TLS`},
		{"inspected, CA installed here", host, false, true, unclear, "company's own CA?"},
		{"another host", "other.test", true, true, unclear, "other.test"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			far, roots := certify(t, test.certificate, "Some CA", test.logged)
			if !test.trusted {
				_, roots = certify(t, host, "Public Root", true)
			}
			p := &httpProxy{far: far}
			r := ask(t, plainURL, serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
			want(t, r, map[probe.Check]probe.Verdict{probe.IntactTLS: test.verdict, name443: yes})
			wantProof(t, r, probe.IntactTLS, test.proof)
		})
	}
}

// TestNotTheProxy: what is at the address is named, and nothing more is asked.
func TestNotTheProxy(t *testing.T) {
	t.Parallel()
	far, _ := certify(t, host, "Some CA", false)
	says := func(text string) func(net.Conn) {
		return func(conn net.Conn) {
			io.WriteString(conn, text)
			io.Copy(io.Discard, conn)
		}
	}
	for _, test := range []struct {
		name, url string
		serve     func(net.Conn)
		proof     string
	}{
		{"mail", plainURL, says("220 mail.test ESMTP\r\n"), `"220 mail.test ESMTP`},
		{"escape sequences", plainURL, says("\x1b]0;owned\x07\x1b[31m"), `]0;owned`},
		{"silent", rightURL, says(""), "no answer in time"},
		{"closes", plainURL, func(net.Conn) {}, "closed without an answer"},
		{"endless", plainURL, func(conn net.Conn) {
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			for {
				if _, err := io.WriteString(conn, "X: "+strings.Repeat("x", 1000)+"\r\n"); err != nil {
					return
				}
			}
		}, "HTTP/1.1 200"},
		{"TLS", plainURL, func(conn net.Conn) { farSide(conn, conn, ":443", far, 0) }, "TLS is answered there"},
		{"SOCKS5", rightURL, (&socksProxy{}).serve, "socks5://"},
		{"HTTP", "socks5://user:right@%s", (&httpProxy{}).serve, "http://"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			r := ask(t, test.url, serve(t, test.serve), nil)
			want(t, r, map[probe.Check]probe.Verdict{probe.Reachable: yes, probe.Protocol: no, probe.Authentication: skipped, name443: skipped})
			wantProof(t, r, probe.Protocol, test.proof)
			if took := time.Since(start); r.Usable || took > 10*time.Second {
				t.Errorf("usable: %t, after %s", r.Usable, took)
			}
		})
	}
}

// TestTunnelsThatLeadNowhere: a 200 alone proves nothing.
func TestTunnelsThatLeadNowhere(t *testing.T) {
	t.Parallel()
	p := &httpProxy{deaf: true}
	r := ask(t, plainURL, serve(t, p.serve), nil)
	want(t, r, map[probe.Check]probe.Verdict{
		name443: unclear, "connect_22_name": unclear, "connect_80_name": unclear, "connect_53_name": yes, probe.IntactTLS: unclear,
	})
	if r.Usable {
		t.Error("it is usable")
	}
}

// TestUnreached: what the proxy did not reach is no refusal.
func TestUnreached(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	p := &httpProxy{far: far, plain: "HTTP/1.1 302 Found\r\nLocation: http://login.corp.test/?u=1\r\n\r\n", answer: func(target string) int {
		if strings.HasSuffix(target, ":22") {
			return http.StatusServiceUnavailable
		}
		return http.StatusOK
	}}
	r := ask(t, plainURL, serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
	want(t, r, map[probe.Check]probe.Verdict{"connect_22_name": unclear, probe.AbsoluteForm: unclear, name443: yes})
	wantProof(t, r, "connect_22_name", "503 Service Unavailable: allowed, it seems")
	wantProof(t, r, probe.AbsoluteForm, "302 Found to login.corp.test")
}

func TestIdle(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	for _, test := range []struct {
		rest    time.Duration
		verdict probe.Verdict
		proof   string
	}{
		{0, yes, "longer than 500ms"},
		{100 * time.Millisecond, no, "closed after 100ms"},
	} {
		p := &httpProxy{far: far, rest: test.rest}
		r := ask(t, plainURL, serve(t, p.serve), func(c *probe.Config) { c.Roots, c.Idle = roots, 500*time.Millisecond })
		want(t, r, map[probe.Check]probe.Verdict{probe.Idle: test.verdict})
		wantProof(t, r, probe.Idle, test.proof)
	}
}
