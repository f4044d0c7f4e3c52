//go:build interop

package interop

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// startSSH has an OpenSSH client in the proxy's namespace forward (ssh(1), -D and -L) to a
// server there, which resolves the names. The server is Dropbear: that of OpenSSH gives up
// groups, which nobody may in the namespaces of a test.
func (w *world) startSSH(forwards ...string) {
	t := w.t
	t.Helper()
	const port = "2222"
	home := t.TempDir()
	key, hostKey := filepath.Join(home, "key"), filepath.Join(home, "host")
	for _, command := range []*exec.Cmd{
		exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key),
		exec.Command("dropbearkey", "-t", "ed25519", "-f", hostKey),
	} {
		if output, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, output)
		}
	}
	var names strings.Builder
	for name, address := range hosts {
		fmt.Fprintf(&names, "%s %s\n", address, name)
	}
	must(t, os.WriteFile(filepath.Join(home, "hosts"), []byte(names.String()), 0o644))
	must(t, os.Mkdir(filepath.Join(home, ".ssh"), 0o700))
	must(t, os.Rename(key+".pub", filepath.Join(home, ".ssh/authorized_keys")))
	must(t, os.Chmod(filepath.Join(home, ".ssh/authorized_keys"), 0o600), os.Chmod(home, 0o700))
	server := exec.Command("sh", "-c", `
mount --bind "$0/hosts" /etc/hosts && mount --bind "$0" /root || exit
exec dropbear -F -E -r /root/host -p 127.0.0.1:$1 -P /root/pid`, home, port)
	server.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	background(t, w.Proxy, server)
	if !within(func() bool { return listens(w.Proxy, netip.MustParseAddrPort("127.0.0.1:"+port)) }) {
		t.Fatal("dropbear does not listen")
	}
	arguments := append([]string{
		"-N", "-F", "/dev/null", "-i", key, "-p", port, "-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes",
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@127.0.0.1",
	}, forwards...)
	background(t, w.Proxy, exec.Command("ssh", arguments...))
}

// TestOpenSSHSOCKS4a: curl and ssh by the SOCKS4a of an OpenSSH client, by name and by
// address.
func TestOpenSSHSOCKS4a(t *testing.T) {
	w := newWorld(t)
	proxy := netip.AddrPortFrom(lab.Proxy4, lab.SOCKSPort)
	w.startSSH("-D", proxy.String())
	if !within(func() bool { return listens(w.Proxy, proxy) }) {
		t.Fatal("ssh does not listen")
	}
	w.gateway("--upstream", "socks4a://user@"+proxy.String(), "--tcp-proxy-dports", "22")
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
	}
	conn := dial(t, w, lab.Origin4, 22)
	text := make([]byte, len(lab.Banner))
	if _, err := io.ReadFull(conn, text); err != nil || string(text) != lab.Banner {
		t.Errorf("ssh: %q, %v", text, err)
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past ssh", sources)
	}
}

// TestSquidBySocket: curl, ssh and bytes in bulk through squid, by a unix socket that an
// OpenSSH client forwards.
func TestSquidBySocket(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "proxy.sock")
	w.startSSH("-L", fmt.Sprintf("%s:%s:%d", path, lab.Proxy4, squidPort))
	if !within(func() bool { _, err := os.Stat(path); return err == nil }) {
		t.Fatal("ssh does not listen")
	}
	w.gateway("--upstream", fmt.Sprintf("http+unix://%s@%s", squidUserInfo, path), "--tcp-proxy-dports", fmt.Sprintf("22,%d,%d", lab.PortSized, lab.PortSource))
	w.wantMainJob()
	w.wantBulk(64 << 20)
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past squid", sources)
	}
}
