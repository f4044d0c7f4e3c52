//go:build interop

package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestMainJob: unmodified curl and ssh on one host, squid with a password on
// another, and no other way out.
func TestMainJob(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	w.wantMainJob()
	t.Logf("squid's log:\n%s", w.squid.log(t))
}

// wantMainJob wants curl and ssh to reach the origins through squid, with the password.
func (w *world) wantMainJob() {
	t := w.t
	t.Helper()
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
			request := "GET http://" + name + "/path "
			if scheme == "https" {
				request = "CONNECT " + name + ":443 "
			}
			w.squid.wantLog(t, request)
		}
		output, _ := run(t, w.Client, "ssh", "-v", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "StrictHostKeyChecking=no", address.String())
		if !strings.Contains(output, "remote software version lab") {
			t.Errorf("ssh %s: %s", address, output)
		}
		w.squid.wantLog(t, "CONNECT "+literal+":22")
	}
	if log := w.squid.log(t); w.squid.demands(t) > 1 {
		t.Errorf("squid refused the password:\n%s", log)
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past squid", sources)
	}
}

// TestBulkIsSpliced moves 1 GiB each way and looks at the
// program's system calls.
func TestBulkIsSpliced(t *testing.T) {
	const size = 1 << 30
	w := newWorld(t)
	g := w.gateway("--tcp-proxy-dports", fmt.Sprintf("%d,%d", lab.PortSized, lab.PortSource))
	trace := filepath.Join(t.TempDir(), "trace")
	tracer := background(t, w.Gateway, traceSplice(g.command.Process.Pid, trace))
	if !within(func() bool { _, err := os.Stat(trace); return err == nil }) {
		t.Fatal("strace did not start")
	}

	digest := sha256.New()
	io.CopyN(digest, lab.Noise(), size)
	want := hex.EncodeToString(digest.Sum(nil))

	// Squid closes a tunnel as a whole when one side has closed: half-close is
	// tested with the stand-in proxy.
	up := dial(t, w, lab.Origin4, lab.PortSized)
	fmt.Fprintln(up, size)
	_, err := io.Copy(up, io.LimitReader(lab.Noise(), size))
	must(t, err)
	answer := make([]byte, hex.EncodedLen(sha256.Size))
	_, err = io.ReadFull(up, answer)
	must(t, err, up.Close())
	if got := string(answer); got != want {
		t.Errorf("upload: sha256 %s and not %s", got, want)
	}

	down := dial(t, w, lab.Origin6, lab.PortSource)
	fmt.Fprintln(down, size)
	digest.Reset()
	n, err := io.Copy(digest, down)
	must(t, err)
	if got := hex.EncodeToString(digest.Sum(nil)); n != size || got != want {
		t.Errorf("download: %d bytes, sha256 %s and not %s", n, got, want)
	}
	must(t, down.Close())
	tracer.end(syscall.SIGINT)
	spliced, err := splicedBytes(trace)
	must(t, err)
	t.Logf("1 GiB each way, sha256 %s; spliced out of pipes: %d bytes", want, spliced)
	// What little is not spliced went out before the relay had begun.
	if spliced < 2*size*95/100 {
		t.Errorf("of %d bytes %d were spliced", 2*size, spliced)
	}
}
