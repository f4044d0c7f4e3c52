//go:build interop

package interop

import (
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

// kdc is MIT's key distribution centre on the proxy's host.
type kdc struct {
	t    *testing.T
	w    *world
	dir  string
	conf string // krb5.conf
}

// kdcPort is not the usual one, which a test without root could not have.
const kdcPort = 8888

// startKDC creates a realm with the account and the proxy's service, and serves it.
func startKDC(t *testing.T, w *world) *kdc {
	t.Helper()
	dir := t.TempDir()
	k := &kdc{t: t, w: w, dir: dir, conf: filepath.Join(dir, "krb5.conf")}
	must(t, os.WriteFile(k.conf, fmt.Appendf(nil, `[libdefaults]
	default_realm = %[1]s
	dns_lookup_kdc = false
	rdns = false
[realms]
	%[1]s = {
		kdc = %[2]s:%[3]d
	}
`, accountRealm, lab.Proxy4, kdcPort), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "kdc.conf"), fmt.Appendf(nil, `[kdcdefaults]
	kdc_ports = %[1]d
	kdc_tcp_ports = %[1]d
[realms]
	%[2]s = {
		database_name = %[3]s/principal
		key_stash_file = %[3]s/stash
		max_life = 1h
	}
[logging]
	kdc = FILE:%[3]s/kdc.log
`, kdcPort, accountRealm, dir), 0o600))
	k.run("kdb5_util", "create", "-s", "-P", "master", "-r", accountRealm)
	k.admin("addprinc +requires_preauth -pw \"" + accountPassword + "\" " + accountUser)
	k.admin("addprinc +requires_preauth -randkey machine")
	k.admin("addprinc -randkey " + service)
	k.admin("ktadd -k " + filepath.Join(dir, "http.keytab") + " " + service)
	k.admin("ktadd -k " + filepath.Join(dir, "machine.keytab") + " machine")
	command := exec.Command("krb5kdc", "-n", "-r", accountRealm)
	command.Env = k.environment()
	background(t, w.Proxy, command)
	if !within(func() bool { return listens(w.Proxy, netip.AddrPortFrom(lab.Proxy4, kdcPort)) }) {
		t.Fatalf("the KDC does not listen:\n%s", k.log())
	}
	return k
}

// service is that of the proxy, which the tests know by its address.
var service = "HTTP/" + lab.Proxy4.String()

func (k *kdc) environment() []string {
	return []string{
		"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME=" + k.dir,
		"KRB5_CONFIG=" + k.conf, "KRB5_KDC_PROFILE=" + filepath.Join(k.dir, "kdc.conf"), "KRB5CCNAME=FILE:" + filepath.Join(k.dir, "ccache"),
	}
}

func (k *kdc) run(name string, arguments ...string) {
	k.t.Helper()
	k.feed("", name, arguments...)
}

func (k *kdc) admin(query string) {
	k.t.Helper()
	k.run("kadmin.local", "-r", accountRealm, "-q", query)
}

// feed runs a program with an input, in the proxy's namespace.
func (k *kdc) feed(input, name string, arguments ...string) {
	k.t.Helper()
	command := exec.Command(name, arguments...)
	command.Env, command.Stdin = k.environment(), strings.NewReader(input)
	var output []byte
	err := k.w.Proxy.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	if err != nil {
		k.t.Fatalf("%s: %v\n%s", name, err, output)
	}
}

func (k *kdc) log() string {
	log, _ := os.ReadFile(filepath.Join(k.dir, "kdc.log"))
	return string(log)
}

// TestKerberos authenticates by a password, by a keytab and by tickets that kinit got.
func TestKerberos(t *testing.T) {
	for name, lines := range map[string]func(k *kdc) []string{
		"password": func(*kdc) []string {
			return []string{"user = " + accountUser + "@" + accountRealm, "password = " + accountPassword}
		},
		"keytab": func(k *kdc) []string {
			return []string{"user = machine", "keytab = " + filepath.Join(k.dir, "machine.keytab")}
		},
		"ccache": func(k *kdc) []string {
			k.feed(accountPassword+"\n", "kinit", accountUser)
			return []string{"ccache = FILE:" + filepath.Join(k.dir, "ccache")}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, k := newKerberosWorld(t)
			g := w.gatewayWith(fmt.Sprintf("http://%s:%d", lab.Proxy4, squidPort), w.credentials(lines(k)...), "--krb5-conf", k.conf)
			w.carries(t)
			w.noSecret(t, g)
			if log := w.squid.log(t); !strings.Contains(log, "@"+accountRealm+" ") {
				t.Errorf("squid's log:\n%s", log)
			}
			t.Logf("%d requests to the KDC:\n%s", strings.Count(k.log(), "_REQ"), k.log())
		})
	}
}

// newKerberosWorld is a world with a KDC whose squid takes Negotiate.
func newKerberosWorld(t *testing.T) (*world, *kdc) {
	t.Helper()
	var k *kdc
	m := method{
		config: "auth_param negotiate program /usr/lib/squid/negotiate_kerberos_auth -k DIR/http.keytab -s " + service + "@" + accountRealm + "\n" +
			"auth_param negotiate children 8 startup=8\nauth_param basic program /usr/lib/squid/basic_fake_auth\nauth_param basic realm leak\n",
		prove: func(w *world, dir string) {
			k = startKDC(t, w)
			keys, err := os.ReadFile(filepath.Join(k.dir, "http.keytab"))
			must(t, err, os.WriteFile(filepath.Join(dir, "http.keytab"), keys, 0o600))
		},
	}
	return newAuthWorld(t, m), k
}

// TestKerberosWrongPasswordOnce: the KDC sees one refused proof, and squid nothing but a bare
// request.
func TestKerberosWrongPasswordOnce(t *testing.T) {
	w, k := newKerberosWorld(t)
	g := w.gatewayWith(fmt.Sprintf("http://%s:%d", lab.Proxy4, squidPort),
		w.credentials("user = "+accountUser+"@"+accountRealm, "password = "+wrongPassword), "--krb5-conf", k.conf)
	lasts := time.Minute
	if testing.Short() {
		lasts = 3 * time.Second
	}
	flows := 0
	for end := time.Now().Add(lasts); time.Now().Before(end); flows++ {
		w.curl("-k", "--max-time", "2", "https://origin.test/")
		w.curl("--max-time", "2", "http://origin.test/")
	}
	if refused := strings.Count(k.log(), "PREAUTH_FAILED"); refused != 1 {
		t.Errorf("%d refused proofs in %d rounds of flows:\n%s", refused, flows, k.log())
	} else {
		t.Logf("1 refused proof in %d rounds of flows within %s", flows, lasts)
	}
	if !strings.Contains(g.text(), "the password is wrong") {
		t.Errorf("the log does not say so:\n%s", g.text())
	}
	w.noSecret(t, g)
}
