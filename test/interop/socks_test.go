//go:build interop

package interop

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// danteHash is squidPassword as crypt(5) has it: openssl passwd -6 -salt company.
const danteHash = "$6$company$IHIX9S9GHVs9GSBcmoRojiQKZ/.klyfxQOE6Yo4VLx5LkNSeELEyfO9dQuiMr5AHf3rivUJtMwyw4bpii1nXx0"

// dante is a real Dante in a namespace.
type dante struct {
	*process
}

// startDante starts it with a method of authentication, as socksmethod in danted.conf(5).
func startDante(t *testing.T, ns *netns.NS, hosts map[string]netip.Addr, method string) dante {
	t.Helper()
	dir := t.TempDir()
	var names strings.Builder
	for name, address := range hosts {
		fmt.Fprintf(&names, "%s %s\n", address, name)
	}
	for file, content := range map[string]string{
		"hosts":  names.String(),
		"passwd": "root:x:0:0::/:/bin/false\n" + squidUser + ":x:1000:1000::/:/bin/false\n",
		"shadow": squidUser + ":" + danteHash + ":19000:0:99999:7:::\n",
		"danted.conf": fmt.Sprintf(`logoutput: stderr
internal: %s port = %d
external: 203.0.113.1
external: 2001:db8:3::1
socksmethod: %s
clientmethod: none
user.privileged: root
user.unprivileged: root
client pass {
  from: 0/0 to: 0/0
  log: error
}
socks pass {
  from: 0/0 to: 0/0 port = 22
  command: connect
  log: error connect
}
socks pass {
  from: 0/0 to: 0/0 port = 80
  command: connect
  log: error connect
}
socks pass {
  from: 0/0 to: 0/0 port = 443
  command: connect
  log: error connect
}
socks pass {
  from: 0/0 to: 0/0
  command: udpassociate udpreply
  log: error connect
}
`, lab.Proxy4, lab.SOCKSPort, method),
	} {
		must(t, os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600))
	}
	// It asks the system for names and passwords: it gets a view of its own of the
	// files, and a process tree of its own, which ends with its first process.
	command := exec.Command("sh", "-c", `
for file in hosts passwd shadow; do mount --bind "$0/$file" "/etc/$file" || exit; done
PATH=$PATH:/usr/sbin exec danted -f "$0/danted.conf" -p "$0/pid"`, dir)
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	d := dante{background(t, ns, command)}
	if !within(func() bool { return listens(ns, netip.AddrPortFrom(lab.Proxy4, lab.SOCKSPort)) }) {
		t.Fatal("dante does not listen")
	}
	return d
}

// socksGateway starts the program with Dante as upstream.
func (w *world) socksGateway(userInfo string) *process {
	w.t.Helper()
	upstream := fmt.Sprintf("socks5://%s%s", userInfo, lab.Proxy4)
	p := background(w.t, w.Gateway, exec.Command(w.program, "--upstream", upstream, "--log-format", "json", "--tcp-proxy-dports", "22,9003"))
	p.waitFor(`"message":"ready"`)
	return p
}

// TestDante: unmodified curl and ssh, and no other way out than a real SOCKS5 proxy,
// that wants a password and one that does not, with and without one given.
func TestDante(t *testing.T) {
	for _, test := range []struct{ name, method, userInfo, logged string }{
		{"password", "username", squidUserInfo + "@", "username%" + squidUser},
		{"open", "none", "", ""},
		{"open, password given", "none", squidUserInfo + "@", ""},
		{"either, password given", "username none", squidUserInfo + "@", ""},
		{"either, none given", "username none", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			d := startDante(t, w.Proxy, hosts, test.method)
			g := w.socksGateway(test.userInfo)
			for name, address := range hosts {
				literal := address.String()
				if address.Is6() {
					literal = "[" + literal + "]"
				}
				for scheme, port := range map[string]string{"https": "443", "http": "80"} {
					output, err := run(t, w.Client, "curl", "-sSk", "--noproxy", "", "--max-time", "10",
						"--resolve", name+":"+port+":"+literal, scheme+"://"+name+"/path")
					if want := fmt.Sprintf("origin %s://%s/path\n", scheme, name); err != nil || output != want {
						t.Errorf("curl %s://%s: %v: %q", scheme, name, err, output)
					}
				}
				output, _ := run(t, w.Client, "ssh", "-v", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=no", address.String())
				if !strings.Contains(output, "remote software version lab") {
					t.Errorf("ssh %s: %s", address, output)
				}
			}
			if !strings.Contains(d.text(), test.logged) {
				t.Errorf("dante's log has no %q", test.logged)
			}
			if sources := w.direct.Sources(); len(sources) > 0 {
				t.Errorf("%v went past dante", sources)
			}

			output, err := run(t, w.Client, "curl", "-sS", "--noproxy", "", "--max-time", "10", "telnet://"+lab.Origin4.String()+":9003")
			if err == nil {
				t.Errorf("a port that dante forbids is reached: %s", output)
			}
			g.waitFor("not allowed by ruleset")
		})
	}
}

// TestDanteWrongPassword: Dante refuses the password once.
func TestDanteWrongPassword(t *testing.T) {
	w := newWorld(t)
	d := startDante(t, w.Proxy, hosts, "username")
	g := w.socksGateway("us%20er:wrong@")
	for range 5 {
		output, err := run(t, w.Client, "curl", "-sS", "--noproxy", "", "--max-time", "10", "-w", "%{http_code}", "http://"+lab.Origin4.String()+"/")
		if err != nil || !strings.HasSuffix(output, "502") || !strings.Contains(output, "made by the gateway") {
			t.Errorf("it is answered with %q, %v", output, err)
		}
	}
	g.waitFor("the upstream refuses the credential")
	if n := strings.Count(d.text(), "authentication failed"); n != 1 {
		t.Errorf("dante refused the password %d times and not once", n)
	}
}

// TestDanteSOCKS4: by SOCKS4, of which Dante does not know the extension for names, flows
// by IPv4 address are carried.
func TestDanteSOCKS4(t *testing.T) {
	w := newWorld(t)
	startDante(t, w.Proxy, hosts, "none")
	upstream := fmt.Sprintf("socks4a://us%%20er@%s", lab.Proxy4)
	g := background(t, w.Gateway, exec.Command(w.program, "--upstream", upstream, "--log-format", "json", "--tcp-proxy-dports", "22,9003"))
	g.waitFor(`"message":"ready"`)
	output, _ := run(t, w.Client, "ssh", "-v", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=no", lab.Origin4.String())
	if !strings.Contains(output, "remote software version lab") {
		t.Errorf("ssh: %s", output)
	}
	output, err := run(t, w.Client, "curl", "-sS", "--noproxy", "", "--max-time", "10", "telnet://"+lab.Origin4.String()+":9003")
	if err == nil {
		t.Errorf("a port that dante forbids is reached: %s", output)
	}
	g.waitFor("91 Request rejected or failed")
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past dante", sources)
	}
}
