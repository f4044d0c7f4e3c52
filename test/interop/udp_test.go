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

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestDanteUDP: DTLS by openssl and QUIC by quic-go, of clients without settings, through a
// Dante that wants a password.
func TestDanteUDP(t *testing.T) {
	quic := buildQUIC(t)
	w := newWorld(t)
	startDante(t, w.Proxy, hosts, "username")
	p := background(t, w.Gateway, exec.Command(w.program, "--upstream", fmt.Sprintf("socks5://%s@%s", squidUserInfo, lab.Proxy4),
		"--log-format", "json", "--udp", "444=upstream"))
	p.waitFor("the upstream carries UDP")
	server := background(t, w.Origin, exec.Command(quic, "serve", "[::]:443"))
	server.waitFor("ready")
	for _, address := range []netip.Addr{lab.Origin4, lab.Origin6} {
		w.wantDTLS(address)
		const size = 4 << 20
		output, err := run(t, w.Client, quic, "echo", netip.AddrPortFrom(address, 443).String(), fmt.Sprint(size))
		if err != nil || !strings.Contains(output, fmt.Sprintf("%d bytes in", size)) {
			t.Errorf("QUIC to %s: %v: %s", address, err, output)
		}
		t.Logf("QUIC to %s: %s", address, strings.TrimSpace(output))
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past dante", sources)
	}
	t.Logf("the gateway said:\n%s", p.text())
}

// buildQUIC builds the program of test/quic, a module of its own.
func buildQUIC(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "quic")
	build := exec.Command("go", "build", "-o", program, ".")
	build.Dir = "../quic"
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build test/quic: %v\n%s", err, output)
	}
	return program
}

// serveDTLS has openssl take DTLS on port 444 of an address of the origin, and print what it
// is sent.
func (w *world) serveDTLS(address netip.Addr) *process {
	w.t.Helper()
	dir := w.t.TempDir()
	key, certificate := filepath.Join(dir, "key"), filepath.Join(dir, "certificate")
	output, err := exec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
		"-subj", "/CN=origin.test", "-keyout", key, "-out", certificate).CombinedOutput()
	if err != nil {
		w.t.Fatalf("openssl req: %v\n%s", err, output)
	}
	command := exec.Command("openssl", "s_server", "-dtls", "-accept", netip.AddrPortFrom(address, 444).String(), "-key", key, "-cert", certificate)
	silent, open, err := os.Pipe() // it ends at the end of its input
	must(w.t, err)
	w.t.Cleanup(func() { silent.Close(); open.Close() })
	command.Stdin = silent
	server := background(w.t, w.Origin, command)
	server.waitFor("ACCEPT")
	return server
}

// wantDTLS has a line arrive at the server.
func (w *world) wantDTLS(address netip.Addr) {
	w.t.Helper()
	server := w.serveDTLS(address)
	output, err := run(w.t, w.Client, "sh", "-c",
		fmt.Sprintf("(echo from the client; sleep 1) | timeout 5 openssl s_client -dtls -brief -connect %s", netip.AddrPortFrom(address, 444)))
	if err != nil || !strings.Contains(output, "CONNECTION ESTABLISHED") {
		w.t.Errorf("DTLS to %s: %v: %s", address, err, output)
	}
	server.waitFor("from the client")
}
