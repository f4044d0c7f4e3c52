//go:build interop

package interop

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// probeWorld is a company's network, its own name server and all, and the outside: a host
// with SSH, HTTP, TLS and a name server in three ways.
type probeWorld struct {
	*world
	certificate certificate
}

// newProbeWorld builds it without a proxy. direct: public name servers are reached past
// the proxy; own: those of the company know public names.
func newProbeWorld(t *testing.T, direct, own bool) *probeWorld {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &probeWorld{world: &world{Lab: l, t: t, program: buildProgram(t), origin: &lab.Origin{Label: "origin", Ports: []int{22, 80}}}}
	w.certificate = newCertificate(t, []string{"www.public.test", "dns.google", "dns.public.test"}, lab.Origin4, lab.Origin6)
	startUnbound(t, l.Origin, w.certificate, publicZones("public"), lab.Origin4, lab.Origin6)
	must(t, w.origin.Start(l.Origin, nil, nil))
	t.Cleanup(w.origin.Close)
	if direct {
		startUnbound(t, l.Router, w.certificate, publicZones("direct"), lab.Origin4)
	}
	records := privateRecords
	if own {
		records = append(slices.Clone(records), "--host-record=www.public.test,203.0.113.80")
	}
	startDnsmasq(t, l.Neighbour, lab.Neighbour4, records...)
	return w
}

// outside are the names that a proxy resolves.
var outside = map[string]netip.Addr{"www.public.test": lab.Origin4, "dns.google": lab.Origin4, "dns.public.test": lab.Origin4}

// printed is what probe --json prints, as far as it counts here.
type printed struct {
	Usable            bool
	CredentialRefused bool `json:"credential_refused"`
	Schemes           []string
	Environment       string
	Flags             []string
	Notes             []string
	Findings          []finding
}

type finding struct {
	Check, Asked, Verdict, Proof string
	Milliseconds                 int
}

// probe runs the program on the gateway without any privilege, and returns its exit
// status.
func (w *probeWorld) probe(arguments ...string) (p printed, status int) {
	w.t.Helper()
	command := exec.Command(w.program, append([]string{
		"probe", "--json", "--private-dns", lab.Neighbour4.String(), "--public-dns", lab.Origin4.String(), "--dns-over-tls", "dns.public.test",
		"--probe-host", "www.public.test", "--probe-address", lab.Origin4.String() + "," + lab.Origin6.String(), "--no-proxy", "corp.test",
	}, arguments...)...)
	command.Env = []string{}
	// In a namespace of its own the user has no say over the network.
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
	}
	var out, diagnostics bytes.Buffer
	command.Stdout, command.Stderr = &out, &diagnostics
	start := time.Now()
	err := w.Gateway.Do(command.Run)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		status = exit.ExitCode()
	} else {
		must(w.t, err)
	}
	if took := time.Since(start); took > 30*time.Second {
		w.t.Errorf("it took %s", took)
	}
	for _, secret := range []string{squidPassword, squidUserInfo, "wr0ng"} {
		if strings.Contains(out.String()+diagnostics.String(), secret) {
			w.t.Errorf("%q is in the output", secret)
		}
	}
	if err := json.Unmarshal(out.Bytes(), &p); err != nil {
		w.t.Fatalf("%v: %s%s", err, out.String(), diagnostics.String())
	}
	for _, f := range p.Findings {
		w.t.Logf("%-8s %-40s %s (%d ms)", f.Verdict, f.Asked, f.Proof, f.Milliseconds)
	}
	w.t.Logf("%s: %s", p.Environment, strings.Join(p.Flags, " "))
	for _, note := range p.Notes {
		w.t.Logf("note: %s", note)
	}
	return p, status
}

// proof is what was seen by a check.
func (p printed) proof(check string) string {
	for _, f := range p.Findings {
		if f.Check == check {
			return f.Proof
		}
	}
	return ""
}

// want compares the verdicts, written as "check=verdict ...".
func (p printed) want(t *testing.T, verdicts string) {
	t.Helper()
	for text := range strings.FieldsSeq(verdicts) {
		check, verdict, _ := strings.Cut(text, "=")
		at := slices.IndexFunc(p.Findings, func(f finding) bool { return f.Check == check })
		if at < 0 {
			t.Errorf("%s is not there", check)
		} else if f := p.Findings[at]; f.Verdict != verdict {
			t.Errorf("%s: %s (%s), and not %s", check, f.Verdict, f.Proof, verdict)
		}
	}
}

// TestProbeSquid: what real squids allow, and whether the flags that are printed then do
// what they are for: a client behind a gateway with them resolves public names.
func TestProbeSquid(t *testing.T) {
	const base = "reachable=yes protocol=yes authentication=yes connect_443_name=yes connect_443_address=yes connect_443_ipv6=yes absolute_form=yes intact_tls=no "
	for _, test := range []struct {
		name        string
		ports       []int
		direct, own bool
		ca          bool
		verdicts    string
		environment string
		flags       string
	}{
		{
			"443 only",
			[]int{443},
			false, false, true,
			"connect_80_name=no connect_22_name=no connect_53_address=no connect_853_name=no dns_tcp=no dns_tls=no dns_https=yes direct_dns=no system_dns=no",
			"dns_over_https", "--no-proxy corp.test --private-dns 198.51.100.20 --dns-over-https-enabled --dns-ca CA",
		},
		{
			"443 only, CA not known",
			[]int{443},
			false, false, false,
			"dns_https=no", "no_public_dns", "--no-proxy corp.test --private-dns 198.51.100.20 --fake-ip",
		},
		{
			"443 and 53",
			[]int{443, 53},
			false, false, true,
			"connect_53_address=yes connect_53_name=yes connect_853_address=no dns_tcp=yes dns_https=yes",
			"public_dns_through_connect", "--no-proxy corp.test --private-dns 198.51.100.20 --public-dns 203.0.113.7",
		},
		{
			"443 and 853, and another host's DNS over HTTPS",
			[]int{443, 853, 22, 80},
			false, false, true,
			"connect_22_name=yes connect_22_address=yes connect_80_name=yes connect_853_name=yes dns_tls=yes",
			"dns_over_https", "--no-proxy corp.test --private-dns 198.51.100.20 --dns-over-https-enabled --dns-ca CA",
		},
		{
			"public servers are reached directly",
			[]int{443},
			true, false, true, "direct_dns=yes",
			"public_dns_direct", "--no-proxy corp.test --private-dns 198.51.100.20 --public-dns 203.0.113.7 --dns-over-tcp-disabled",
		},
		{
			"names resolve",
			[]int{443},
			false, true, false, "system_dns=yes",
			"names_resolve", "--no-proxy corp.test",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newProbeWorld(t, test.direct, test.own)
			w.squid = startSquid(t, w.Proxy, outside, test.ports)
			arguments := []string{"--upstream", upstream()}
			if test.ca {
				arguments = append(arguments, "--dns-ca", w.certificate.chain)
			}
			p, status := w.probe(arguments...)
			p.want(t, base+test.verdicts)
			if !p.Usable || status != 0 || !slices.Equal(p.Schemes, []string{"Basic"}) {
				t.Errorf("status %d, %+v", status, p)
			}
			shown := "--upstream http://198.51.100.10:3128 " + test.flags
			if got := strings.ReplaceAll(strings.Join(p.Flags, " "), w.certificate.chain, "CA"); got != shown || p.Environment != test.environment {
				t.Errorf("%s: %s\nwant %s: %s", p.Environment, got, test.environment, shown)
			}
			if log := w.squid.log(t); strings.Count(log, "/407") != 2 { // the first question, and to learn what is offered
				t.Errorf("squid demanded a password from more than two requests:\n%s", log)
			}
			if test.own {
				return // port 53 is left alone, and the client has no resolver but the gateway's
			}
			flags := slices.Concat(p.Flags, []string{"--upstream", upstream(), "--log-format", "json"})
			background(t, w.Gateway, exec.Command(w.program, flags...)).waitFor(`"message":"ready"`)
			if answer := dig(t, w.Client, anyServers[0], "+short", "www.public.test", "A"); test.environment != "no_public_dns" && answer != "203.0.113.80\n" {
				t.Errorf("with the flags that were printed a client gets %q", answer)
			} else if test.environment == "no_public_dns" && !strings.HasPrefix(answer, "198.18.") {
				t.Errorf("with the flags that were printed a client gets %q", answer)
			}
			if answer := dig(t, w.Client, anyServers[0], "+short", "www.corp.test", "A"); answer != "198.51.100.80\n" {
				t.Errorf("of the company's own name it gets %q", answer)
			}
		})
	}
}

// TestProbeSquidPassword: squid sees exactly one wrong password, or none.
func TestProbeSquidPassword(t *testing.T) {
	w := newProbeWorld(t, false, false)
	w.squid = startSquid(t, w.Proxy, outside, []int{443, 53})
	requests := func() int { return strings.Count(w.squid.log(t), "CONNECT") + strings.Count(w.squid.log(t), "GET") }

	p, status := w.probe("--upstream", "http://us%20er:wr0ng@198.51.100.10:3128")
	p.want(t, "protocol=yes authentication=no connect_443_name=skipped absolute_form=skipped dns_tcp=skipped dns_https=skipped")
	if status != 1 || p.Usable || !p.CredentialRefused || len(p.Flags) > 0 || !strings.Contains(strings.Join(p.Notes, ""), "correct them") {
		t.Errorf("status %d, %+v", status, p)
	}
	if !within(func() bool { return requests() == 3 }) {
		t.Errorf("squid was asked otherwise than twice without and once with the password:\n%s", w.squid.log(t))
	}
	if n := strings.Count(w.squid.log(t), ":443 us er "); n != 1 {
		t.Errorf("squid saw %d requests with the wrong password:\n%s", n, w.squid.log(t))
	}

	p, status = w.probe("--upstream", "http://198.51.100.10:3128")
	p.want(t, "protocol=yes authentication=no connect_443_name=skipped")
	if status != 1 || p.CredentialRefused || !strings.Contains(strings.Join(p.Notes, ""), "wants to know who asks") {
		t.Errorf("status %d, %+v", status, p)
	}
	if !within(func() bool { return requests() == 4 }) {
		t.Errorf("squid was asked more than once:\n%s", w.squid.log(t))
	}
}

// TestProbeSquidInspects: a squid that opens TLS is found out by its certificate.
func TestProbeSquidInspects(t *testing.T) {
	w := newProbeWorld(t, false, false)
	dir := t.TempDir()
	authority := filepath.Join(dir, "ca.pem")
	for _, command := range [][]string{
		{"openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", authority, "-out", filepath.Join(dir, "ca.crt"), "-days", "2", "-subj", "/O=Example Corp/CN=Corporate Proxy CA"},
		{"sh", "-c", "cat ca.crt >>ca.pem && chmod 600 ca.pem"},
		{"/usr/lib/squid/security_file_certgen", "-c", "-s", filepath.Join(dir, "certificates"), "-M", "4MB"},
	} {
		run := exec.Command(command[0], command[1:]...)
		run.Dir = dir
		if output, err := run.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", command, err, output)
		}
	}
	w.squid = startSquidWith(t, w.Proxy, outside, []int{443}, strings.ReplaceAll(`
http_port 3129 ssl-bump tls-cert=TLS/ca.pem generate-host-certificates=on
sslcrtd_program /usr/lib/squid/security_file_certgen -s TLS/certificates -M 4MB
sslcrtd_children 1 startup=1 idle=1
ssl_bump bump all
tls_outgoing_options flags=DONT_VERIFY_PEER
sslproxy_cert_error allow all
`, "TLS", dir))
	bumping := "http://" + squidUserInfo + "@198.51.100.10:3129"
	p, status := w.probe("--upstream", bumping)
	p.want(t, "authentication=yes connect_443_name=yes intact_tls=no dns_https=no")
	if got := p.proof("dns_https"); !strings.Contains(got, "Corporate Proxy CA") {
		t.Errorf("without the CA DNS over HTTPS is %q", got)
	}
	notes := strings.Join(p.Notes, "\n")
	if status != 0 || !strings.Contains(notes, `the proxy inspects TLS: clients have to trust its CA, "Corporate Proxy CA" of Example Corp`) || !strings.Contains(notes, "--dns-ca") {
		t.Errorf("status %d: %s", status, notes)
	}
	// With the CA the handshake succeeds; that unbound speaks only HTTP/2 and squid does not
	// is another matter.
	p, _ = w.probe("--upstream", bumping, "--dns-ca", filepath.Join(dir, "ca.crt"))
	p.want(t, "intact_tls=no")
	if got := p.proof("dns_https"); got != "HTTP status 502" {
		t.Errorf("with the CA DNS over HTTPS is %q", got)
	}
}

// TestProbeSquidByTLS: a proxy that is talked to by TLS, whose authority is known or not.
func TestProbeSquidByTLS(t *testing.T) {
	authority, key := squidCertificate(t)
	w := newProbeWorld(t, false, false)
	w.squid = startSquidWith(t, w.Proxy, outside, []int{443, 53}, fmt.Sprintf("https_port %d tls-cert=%s tls-key=%s\n", squidTLSPort, authority, key))
	shown := fmt.Sprintf("https://%s:%d", lab.Proxy4, squidTLSPort)
	upstream := strings.Replace(shown, "//", "//"+squidUserInfo+"@", 1)

	p, status := w.probe("--upstream", upstream, "--upstream-ca", authority)
	p.want(t, "reachable=yes protocol=yes authentication=yes connect_443_name=yes connect_22_name=no absolute_form=yes dns_tcp=yes")
	if want := "--upstream " + shown + " --upstream-ca " + authority + " "; status != 0 || !strings.HasPrefix(strings.Join(p.Flags, " "), want) {
		t.Errorf("status %d: %v", status, p.Flags)
	}

	p, status = w.probe("--upstream", upstream)
	p.want(t, "reachable=no protocol=skipped")
	if status != 1 || !strings.Contains(p.proof("reachable"), `by "proxy.test", leads to no root`) || !strings.Contains(strings.Join(p.Notes, ""), "--upstream-ca") {
		t.Errorf("status %d: %+v", status, p)
	}

	p, _ = w.probe("--upstream", strings.Replace(upstream, "https:", "http:", 1))
	p.want(t, "reachable=yes protocol=no")
	if got := p.proof("protocol"); !strings.Contains(got, "https://") {
		t.Errorf("of TLS on the port it says %q", got)
	}
}

// TestProbeDante: the same of a real SOCKS5 proxy, which allows the ports 22, 80 and 443
// and no UDP.
func TestProbeDante(t *testing.T) {
	for _, test := range []struct {
		name, method, userInfo string
		status                 int
		verdicts               string
		failures               int
	}{
		{"password", "username", squidUserInfo + "@", 0, "connect_443_name=yes connect_443_ipv6=yes connect_22_address=yes connect_80_name=yes connect_53_address=no dns_https=yes udp_associate=yes", 0},
		{"wrong password", "username", "us%20er:wr0ng@", 1, "authentication=no connect_443_name=skipped udp_associate=skipped", 1},
		{"open", "none", "", 0, "authentication=yes connect_443_name=yes connect_53_name=no udp_associate=yes", 0},
		{"password not given", "username", "", 1, "authentication=no", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newProbeWorld(t, false, false)
			d := startDante(t, w.Proxy, outside, test.method)
			p, status := w.probe("--upstream", "socks5://"+test.userInfo+lab.Proxy4.String(), "--dns-ca", w.certificate.chain)
			p.want(t, "reachable=yes protocol=yes "+test.verdicts)
			if status != test.status || p.Usable != (status == 0) {
				t.Errorf("status %d, usable %t", status, p.Usable)
			}
			refusals := func() int { return strings.Count(d.text(), "authentication failed") }
			if !within(func() bool { return refusals() >= test.failures }) || refusals() != test.failures {
				t.Errorf("dante refused the password %d times and not %d:\n%s", refusals(), test.failures, d.text())
			}
		})
	}
}

// TestProbeIsReadable: the table of a run, which the README shows.
func TestProbeIsReadable(t *testing.T) {
	w := newProbeWorld(t, false, false)
	w.squid = startSquid(t, w.Proxy, outside, []int{443, 53})
	output, err := run(t, w.Gateway, "env", "TRANSPROXY_UPSTREAM="+upstream(), "SSL_CERT_FILE="+w.certificate.chain, w.program, "probe", "--private-dns", lab.Neighbour4.String(),
		"--public-dns", lab.Origin4.String(), "--dns-over-tls", "dns.public.test",
		"--probe-host", "www.public.test", "--probe-address", lab.Origin4.String()+","+lab.Origin6.String(), "--no-proxy", "corp.test")
	must(t, err)
	t.Log("\n" + output)
	for _, want := range []string{
		"\n  no       CONNECT www.public.test:22 ", " 403 Forbidden\n", "\n  yes      DNS over TCP, 203.0.113.7 ",
		`certificate by "Public CA"` + "\n",
		"\n  sudo transproxy-tproxy --upstream http://198.51.100.10:3128 --no-proxy corp.test --private-dns 198.51.100.20 --public-dns 203.0.113.7\n",
		"TRANSPROXY_UPSTREAM",
	} {
		if !strings.Contains(output, want) {
			t.Errorf("the output lacks %q", want)
		}
	}
	if strings.Contains(output, squidPassword) || strings.Contains(output, squidUserInfo) || strings.Contains(output, "\x1b") {
		t.Error("the output has the password or colours")
	}
	for line := range strings.Lines(output) {
		if len(line) > 160 {
			t.Errorf("a line has %d characters: %s", len(line), line)
		}
	}
}
