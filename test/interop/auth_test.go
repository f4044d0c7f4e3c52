//go:build interop

package interop

import (
	"crypto/md5"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// The account of these tests, as the kinds of authentication write it.
const (
	accountUser     = "gateway"
	accountPassword = "pa:ss w@rd"
	accountRealm    = "COMPANY.TEST"
)

// wrongPassword is none that is in a text of the program.
const wrongPassword = "wr0ng s3cret"

// method is a way to authenticate that squid is set up for.
type method struct {
	name   string
	config string                     // of squid: DIR is its directory
	prove  func(w *world, dir string) // prepares what the helper needs; may be nil
	says   string                     // of the refusal
}

// newAuthWorld is a world whose squid takes one method alone. Its helpers write what they
// are asked to DIR/helper.log.
func newAuthWorld(t *testing.T, m method) *world {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &world{Lab: l, t: t, program: buildProgram(t), origin: &lab.Origin{Label: "origin"}, direct: &lab.Origin{Label: "direct"}}
	must(t, w.origin.Start(l.Origin, []string{"origin.test", "six.test"}, []netip.Addr{lab.Origin4, lab.Origin6}))
	t.Cleanup(w.origin.Close)
	must(t, w.direct.Start(l.Router, nil, nil))
	t.Cleanup(w.direct.Close)
	w.squid = startSquidAuth(t, l.Proxy, hosts, m.config, func(dir string) {
		if m.prove != nil {
			m.prove(w, dir)
		}
	})
	return w
}

// credentials writes a file of them.
func (w *world) credentials(lines ...string) string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "credentials")
	must(w.t, os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600))
	return path
}

// gatewayWith starts the program with a credentials file and a proxy given by URL.
func (w *world) gatewayWith(url, credentials string, flags ...string) *process {
	w.t.Helper()
	arguments := append([]string{"--upstream", url, "--upstream-credentials", credentials, "--log-format", "json"}, flags...)
	p := background(w.t, w.Gateway, exec.Command(w.program, arguments...))
	p.waitFor(`"message":"ready"`)
	return p
}

func (m method) url() string {
	return fmt.Sprintf("http://%s:%d", lab.Proxy4, squidPort)
}

// basicAuth, digestAuth and ntlmAuth have squid take one method alone.
func basicAuth() method {
	return method{
		name: "basic", says: "sent by Basic",
		config: "auth_param basic program /usr/lib/squid/basic_ncsa_auth DIR/account\nauth_param basic realm company\n",
		prove: func(w *world, dir string) {
			hash, err := run(w.t, w.Proxy, "openssl", "passwd", "-apr1", accountPassword)
			must(w.t, err, os.WriteFile(filepath.Join(dir, "account"), []byte(accountUser+":"+hash), 0o600))
		},
	}
}

func digestAuth() method {
	return method{
		name: "digest", says: "sent by Digest",
		config: "auth_param digest program /usr/lib/squid/digest_file_auth -c DIR/account\nauth_param digest realm company\n" +
			"auth_param digest nonce_max_count 5\nauth_param basic program /usr/lib/squid/basic_fake_auth\nauth_param basic realm leak\n",
		prove: func(w *world, dir string) {
			line := fmt.Sprintf("%s:company:%s\n", accountUser, fmt.Sprintf("%x", md5.Sum([]byte(accountUser+":company:"+accountPassword))))
			must(w.t, os.WriteFile(filepath.Join(dir, "account"), []byte(line), 0o600))
		},
	}
}

// ntlmAuth has Samba's own helper check the proofs. Given the account it needs no domain
// controller, so that the arithmetic is Samba's and not ours.
func ntlmAuth() method {
	return method{
		name: "ntlm", says: "sent by NTLM",
		config: "auth_param ntlm program /usr/bin/ntlm_auth --helper-protocol=squid-2.5-ntlmssp --configfile=DIR/smb.conf" +
			" --username=" + accountUser + " --domain=COMPANY --password=" + ntlmPassword + "\nauth_param ntlm children 4\n",
		prove: func(w *world, dir string) {
			smb := "[global]\nworkgroup = COMPANY\nnetbios name = PROXY\n"
			for _, kind := range []string{"private dir", "lock directory", "state directory", "cache directory", "pid directory"} {
				smb += kind + " = " + dir + "\n"
			}
			must(w.t, os.WriteFile(filepath.Join(dir, "smb.conf"), []byte(smb), 0o600))
		},
	}
}

// ntlmPassword stands on the helper's command line, which squid splits at spaces.
const ntlmPassword = "pa:ssw@rd"

func (m method) lines(password string) []string {
	if m.name == "ntlm" && password == accountPassword {
		password = ntlmPassword
	}
	user := accountUser
	if m.name == "ntlm" {
		user = `COMPANY\` + user
	}
	return []string{"# made by a test", "user = " + user, "password = " + password}
}

// TestAuthentication carries tunnels and plain requests, with bodies and without, through a
// real squid that wants one method, at once from several clients.
func TestAuthentication(t *testing.T) {
	for _, m := range []method{basicAuth(), digestAuth(), ntlmAuth()} {
		t.Run(m.name, func(t *testing.T) {
			w := newAuthWorld(t, m)
			g := w.gatewayWith(m.url(), w.credentials(m.lines(accountPassword)...))
			w.carries(t)
			w.noSecret(t, g)
			t.Logf("squid's log:\n%s", w.squid.log(t))
		})
	}
}

// carries sends all kinds of traffic through.
func (w *world) carries(t *testing.T) {
	t.Helper()
	for i := range 3 {
		for _, arguments := range [][]string{
			{"-k", fmt.Sprintf("https://origin.test/%d", i)},
			{fmt.Sprintf("http://origin.test/%d", i)},
			{"-d", "x=y", fmt.Sprintf("http://origin.test/post%d", i)},
			{"-H", "Transfer-Encoding: chunked", "-d", "x=y", fmt.Sprintf("http://six.test/chunked%d", i)},
		} {
			if output, err := w.curl(append(arguments, "-f", "-o", "/dev/null", "-w", "%{http_code}")...); err != nil || output != "200" {
				t.Errorf("curl %q: %q, %v", arguments, output, err)
			}
		}
	}
	parallel := []string{"-k", "--parallel", "--parallel-immediate", "--parallel-max", "30", "-f", "-w", "%{http_code};"}
	for i := range 30 {
		parallel = append(parallel, "-o", "/dev/null", fmt.Sprintf("https://origin.test/p%d", i))
	}
	if output, err := w.curl(parallel...); err != nil || strings.Count(output, "200;") != 30 {
		t.Errorf("at once: %v, %q", err, output)
	}
}

// noSecret wants nothing of the account in what the program has said.
func (w *world) noSecret(t *testing.T, g *process) {
	t.Helper()
	for _, secret := range []string{accountPassword, ntlmPassword, wrongPassword, "TlRMTVNT", "Negotiate ", "response="} {
		if strings.Contains(g.text(), secret) {
			t.Errorf("the log has %q:\n%s", secret, g.text())
		}
	}
}

// TestWrongPasswordOnce: of a minute of traffic (3 seconds with -short) squid's helper sees
// exactly one refused proof.
func TestWrongPasswordOnce(t *testing.T) {
	for _, m := range []method{basicAuth(), digestAuth(), ntlmAuth()} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			m.config = traced(m.config)
			w := newAuthWorld(t, m)
			credentials := w.credentials(m.lines(wrongPassword)...)
			g := w.gatewayWith(m.url(), credentials)
			lasts := time.Minute
			if testing.Short() {
				lasts = 3 * time.Second
			}
			flows := 0
			for end := time.Now().Add(lasts); time.Now().Before(end); flows++ {
				w.curl("-k", "--max-time", "2", "https://origin.test/")
				w.curl("--max-time", "2", "http://origin.test/")
				w.curl("--max-time", "2", "-d", "x=y", "http://origin.test/")
			}
			proofs := w.squid.proofs(t, m)
			if proofs != 1 || flows < 3 {
				t.Errorf("%d proofs in %d rounds of flows", proofs, flows)
			}
			t.Logf("%s: %d refused proof in %d rounds of flows within %s", m.name, proofs, flows, lasts)
			if !strings.Contains(g.text(), m.says) {
				t.Errorf("the log does not say %q:\n%s", m.says, g.text())
			}
			// The right password is used as soon as it is in the file.
			right := strings.Join(m.lines(accountPassword), "\n")
			must(t, os.WriteFile(credentials, []byte(right), 0o600))
			g.waitFor("the credentials are read again")
			w.carries(t)
			w.noSecret(t, g)
		})
	}
}

// traced has each helper write what squid asks it to a file: through a shell that copies.
func traced(config string) string {
	var lines []string
	for line := range strings.Lines(config) {
		if before, program, found := strings.Cut(line, " program "); found && !strings.Contains(program, "fake") {
			line = before + " program DIR/traced " + program
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "")
}

// tracedScript is the shell's part: it runs the helper that it is given.
const tracedScript = "#!/bin/sh\nexec tee -a DIR/helper.log | \"$@\"\n"

// proofs counts what squid asked its helper about.
func (s *squid) proofs(t *testing.T, m method) int {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(s.dir, "helper.log"))
	must(t, err)
	if m.name == "ntlm" {
		return strings.Count(string(log), "KK ") // the third message
	}
	if m.name == "digest" {
		// It asks for the hash of a user, once, and compares by itself.
		return strings.Count(s.log(t), " "+accountUser+" ")
	}
	return strings.Count(string(log), "\n")
}
