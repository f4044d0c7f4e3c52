//go:build interop

package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// squidTLSPort is where squid is talked to by TLS.
const squidTLSPort = 3443

// squidCertificate makes one for the proxy, by openssl, and returns the files that hold it and its
// key.
func squidCertificate(t *testing.T) (file, key string) {
	t.Helper()
	dir := t.TempDir()
	file, key = filepath.Join(dir, "certificate.pem"), filepath.Join(dir, "key.pem")
	command := exec.Command("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", file,
		"-subj", "/CN=proxy.test", "-addext", fmt.Sprintf("subjectAltName=DNS:proxy.test,IP:%s,IP:%s", lab.Proxy4, lab.Proxy6))
	if output, err := command.CombinedOutput(); err != nil {
		t.Fatalf("openssl: %v\n%s", err, output)
	}
	return file, key
}

// TestSquidByTLS: curl and ssh through a squid that is talked to by TLS (https_port), and
// bytes in bulk.
func TestSquidByTLS(t *testing.T) {
	authority, key := squidCertificate(t)
	w := newWorldWith(t, fmt.Sprintf("https_port %d tls-cert=%s tls-key=%s\n", squidTLSPort, authority, key))
	w.gateway("--upstream", fmt.Sprintf("https://%s@%s:%d", squidUserInfo, lab.Proxy4, squidTLSPort), "--upstream-ca", authority,
		"--tcp-proxy-dports", fmt.Sprintf("22,%d,%d", lab.PortSized, lab.PortSource))
	w.wantMainJob()

	w.wantBulk(64 << 20)
}

// wantBulk wants so many bytes each way to arrive as they were sent.
func (w *world) wantBulk(size int64) {
	t := w.t
	t.Helper()
	digest := sha256.New()
	io.CopyN(digest, lab.Noise(), size)
	want := hex.EncodeToString(digest.Sum(nil))
	up := dial(t, w, lab.Origin4, lab.PortSized)
	fmt.Fprintln(up, size)
	_, err := io.Copy(up, io.LimitReader(lab.Noise(), size))
	must(t, err)
	answer := make([]byte, hex.EncodedLen(sha256.Size))
	_, err = io.ReadFull(up, answer)
	must(t, err, up.Close())
	if string(answer) != want {
		t.Errorf("upload: sha256 %s and not %s", answer, want)
	}
	down := dial(t, w, lab.Origin6, lab.PortSource)
	fmt.Fprintln(down, size)
	digest.Reset()
	if n, err := io.Copy(digest, down); err != nil || n != size || hex.EncodeToString(digest.Sum(nil)) != want {
		t.Errorf("download: %d bytes, %v", n, err)
	}
}

// nghttpxPort is where nghttpx speaks HTTP/2.
const nghttpxPort = 3444

// TestNghttpx: curl, ssh and bytes in bulk through an nghttpx that speaks HTTP/2, in front
// of squid: the tunnels share a connection.
func TestNghttpx(t *testing.T) {
	authority, key := squidCertificate(t)
	w := newWorld(t)
	proxy := background(t, w.Proxy, exec.Command("nghttpx", "--http2-proxy", "--conf=/dev/null", "--single-process",
		fmt.Sprintf("--frontend=%s,%d", lab.Proxy4, nghttpxPort), fmt.Sprintf("--backend=%s,%d", lab.Proxy4, squidPort),
		"--backend-connections-per-host=100", key, authority))
	t.Cleanup(func() { proxy.end(syscall.SIGTERM) })
	address := netip.AddrPortFrom(lab.Proxy4, nghttpxPort)
	if !within(func() bool { return listens(w.Proxy, address) }) {
		t.Fatal("nghttpx does not listen")
	}
	// It does not pass the end of one direction on to squid, and keeps the other until it
	// is cut off.
	g := w.gateway("--upstream", fmt.Sprintf("https://%s@%s", squidUserInfo, address), "--upstream-ca", authority, "--half-close-timeout", "1s",
		"--tcp-proxy-dports", fmt.Sprintf("22,%d,%d", lab.PortSized, lab.PortSource))
	w.wantMainJob()
	w.wantBulk(256 << 20)

	// The tunnels share a connection; requests in absolute form have their own.
	var conns []net.Conn
	for range 30 {
		conns = append(conns, dial(t, w, lab.Origin4, 22))
	}
	for _, conn := range conns {
		if _, err := io.ReadFull(conn, make([]byte, len(lab.Banner))); err != nil {
			t.Fatal(err)
		}
	}
	if connections := established(t, g.command.Process.Pid, address); connections > 2 {
		t.Errorf("%d connections to nghttpx for 30 tunnels", connections)
	}
}

// established counts a process's connections to an address.
func established(t *testing.T, pid int, to netip.AddrPort) (count int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	must(t, err)
	bytes := to.Addr().As4()
	remote := fmt.Sprintf("%02X%02X%02X%02X:%04X 01", bytes[3], bytes[2], bytes[1], bytes[0], to.Port())
	return strings.Count(string(text), remote)
}
