//go:build interop

package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
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

	const size = 64 << 20
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
