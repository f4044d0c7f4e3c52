//go:build interop

package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// listener is an explicit one of the gateway, as a client writes it.
func listener(address string, port int) string { return fmt.Sprintf("http://%s:%d", address, port) }

// TestExplicitCurlFamilies: curl with proxy settings on both listeners and over both
// families, against a real squid: what is passed on is the client's own credential, and
// what is added is the gateway's.
func TestExplicitCurlFamilies(t *testing.T) {
	w := newHTTPWorld(t, "")
	w.gateway()
	client, own := w.Client, w.Gateway
	status := []string{"-o", "/dev/null", "-w", "%{http_code}"}
	right, wrong := []string{"-U", squidUser + ":" + squidPassword}, []string{"-U", squidUser + ":guess"}
	const url = "http://six.test/x"
	for _, test := range []struct {
		name, from, at string
		port           int
		arguments      []string
		want           string
	}{
		{"without a credential", "client", "[" + lab.Gateway6.String() + "]", 3132, status, "407"},
		{"with a wrong one", "client", lab.Gateway4.String(), 3132, append(wrong, status...), "407"},
		{"with the right one", "client", "[" + lab.Gateway6.String() + "]", 3132, right, "nginx six.test/x GET\n"},
		{"with the right one, HEAD", "client", lab.Gateway4.String(), 3132, append([]string{"-I"}, append(right, status...)...), "200"},
		{"with the right one, POST", "client", lab.Gateway4.String(), 3132, append([]string{"-d", "a=b"}, right...), "nginx six.test/x POST\n"},
		{"with the right one, CONNECT", "client", "[" + lab.Gateway6.String() + "]", 3132, append([]string{"-p"}, right...), "nginx six.test/x GET\n"},
		{"from the client with the gateway's", "client", lab.Gateway4.String(), 3133, status, "403"},
		{"from the client with the gateway's, IPv6", "client", "[" + lab.Gateway6.String() + "]", 3133, status, "403"},
		{"from loopback with the gateway's", "gateway", "127.0.0.1", 3133, nil, "nginx six.test/x GET\n"},
		{"from loopback with the gateway's, IPv6", "gateway", "[::1]", 3133, nil, "nginx six.test/x GET\n"},
		{"from loopback with the gateway's, CONNECT", "gateway", "[::1]", 3133, []string{"-p"}, "nginx six.test/x GET\n"},
		{"from loopback without a credential", "gateway", "127.0.0.1", 3132, status, "407"},
	} {
		t.Run(test.name, func(t *testing.T) {
			from := client
			if test.from == "gateway" {
				from = own
			}
			all := append([]string{"-sS", "--max-time", "20", "-x", listener(test.at, test.port)}, test.arguments...)
			if output, err := run(t, from, "curl", append(all, url)...); err != nil || output != test.want {
				t.Errorf("%q, %v; want %q", output, err, test.want)
			}
		})
	}
	// Neither the wrong password nor none has kept the gateway from its own.
	w.wantCurl("nginx six.test/after GET\n", "http://six.test/after")
	for _, line := range []string{"GET http://six.test/x us er", "HEAD http://six.test/x us er", "POST http://six.test/x us er", "CONNECT six.test:80 us er"} {
		w.squid.wantLog(t, line)
	}
	// The three that came without the right one, each once, and the gateway's first.
	if w.squid.demands(t) != 4 {
		t.Errorf("squid's log:\n%s", w.squid.log(t))
	}
}

// TestExplicitEnvironment: programs that take proxy settings from the environment get
// through with those, and /proxy.pac of each address names that address.
func TestExplicitEnvironment(t *testing.T) {
	w := newHTTPWorld(t, "")
	w.gateway()
	output, err := run(t, w.Gateway, "env", "http_proxy=http://127.0.0.1:3133", "no_proxy=none.test", "curl", "-sS", "http://origin.test/env")
	if err != nil || output != "nginx origin.test/env GET\n" {
		t.Errorf("%q, %v", output, err)
	}
	for _, at := range []string{lab.Gateway4.String(), "[" + lab.Gateway6.String() + "]"} {
		for _, path := range []string{"/proxy.pac", "/wpad.dat"} {
			output, err := run(t, w.Client, "curl", "-sSg", "--noproxy", "*", "-D", "-", listener(at, 3132)+path)
			if err != nil || !strings.Contains(output, "Content-Type: application/x-ns-proxy-autoconfig") || !strings.Contains(output, `"PROXY `+at+`:3132"`) {
				t.Errorf("%s%s: %q, %v", at, path, output, err)
			}
		}
	}
}

// TestExplicitOnlyChangesNothing: neither while it runs nor afterwards is anything of
// the kernel's other than before, as nft and ip see it.
func TestExplicitOnlyChangesNothing(t *testing.T) {
	w := newHTTPWorld(t, "")
	run(t, w.Gateway, "nft", "list", "ruleset") // loads what nft itself loads
	before := w.state()
	g := w.gateway("--explicit-proxy-only")
	output, err := run(t, w.Gateway, "curl", "-sS", "-x", "http://127.0.0.1:3133", "http://origin.test/only")
	if err != nil || output != "nginx origin.test/only GET\n" {
		t.Errorf("%q, %v", output, err)
	}
	wantSame(t, "--explicit-proxy-only", before, w.state())
	w.wantCurl("direct http://origin.test/\n", "http://origin.test/")
	must(t, g.end(syscall.SIGTERM))
	wantSame(t, "--explicit-proxy-only and a stop", before, w.state())
}

// TestExplicitBulk: bodies of clients with proxy settings are streamed as well.
func TestExplicitBulk(t *testing.T) {
	const size = 256 << 20 // bytes
	w := newHTTPWorld(t, bigRequests)
	g := w.gateway()
	file := filepath.Join(t.TempDir(), "bulk")
	must(t, os.WriteFile(file, nil, 0o644), os.Truncate(file, size))
	if output, err := run(t, w.Gateway, "curl", "-sS", "-x", "http://127.0.0.1:3133", "http://origin.test/warm"); err != nil {
		t.Fatalf("%q, %v", output, err)
	}
	before := peak(t, g)
	// Zeros both ways; cmp(1) compares with the file.
	for name, script := range map[string]string{
		"down":                   "curl -sS -x $1 -r 0-268435455 http://origin.test/bulk | cmp - $2 && echo same",
		"down through CONNECT":   "curl -sS -p -x $1 -r 0-268435455 http://origin.test/bulk | cmp - $2 && echo same",
		"up":                     "curl -sS -x $1 -H Expect: -T $2 http://origin.test/upload | cut -d' ' -f1",
		"up in chunks":           "curl -sS -x $1 -H Expect: -H 'Transfer-Encoding: chunked' -T - http://origin.test/upload < $2 | cut -d' ' -f1",
		"up after 100-continue":  "curl -sS -x $1 -H 'Expect: 100-continue' -T $2 http://origin.test/upload | cut -d' ' -f1",
		"up through CONNECT":     "curl -sS -p -x $1 -H Expect: -T $2 http://origin.test/upload | cut -d' ' -f1",
		"down to a slow reader":  "curl -sS -x $1 --limit-rate 64M -r 0-268435455 http://origin.test/bulk | cmp - $2 && echo same",
		"down as HTTP/1.0 asked": "curl -sS -0 -x $1 -r 0-268435455 http://origin.test/bulk | cmp - $2 && echo same",
	} {
		output, err := run(t, w.Gateway, "sh", "-c", script, "sh", "http://127.0.0.1:3133", file)
		if got := strings.TrimSpace(output); err != nil || got != "same" && got != fmt.Sprint(size) {
			t.Errorf("%s: %q, %v", name, output, err)
		}
	}
	grown := peak(t, g) - before
	t.Logf("peak memory grew by %d KiB", grown)
	if grown > 16<<10 {
		t.Errorf("memory grew by %d KiB", grown)
	}
}
