package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// script writes a PAC script and returns its file.
func script(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "proxy.pac")
	must(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

// account writes the world's credential into a file.
func account(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "credentials")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "user = %s\npassword = %s\n", user, password), 0o600))
	return file
}

// TestPAC has a script say where flows leave: by host and port, through one proxy or the
// other or directly, with fail-over along its list; and what it changes to holds at once.
func TestPAC(t *testing.T) {
	w := newWorld(t)
	second := w.second()
	file := script(t, fmt.Sprintf(`function FindProxyForURL(url, host) {
	if (host == "six.test") return "PROXY %[1]s:%[3]d";
	if (isInNet(host, "%[2]s", "255.255.255.255")) return "DIRECT";
	return "PROXY %[1]s:1; PROXY %[1]s:%[4]d";
}`, lab.Proxy4, lab.Origin4, secondPort, lab.ProxyPort))
	g := startGateway(t, w.Gateway, "--pac", file, "--upstream-credentials", account(t))
	for url, want := range map[string]string{
		"https://origin.test/a":                 "origin https://origin.test/a",
		"https://six.test/b":                    "origin https://six.test/b",
		"http://origin.test/c":                  "origin http://origin.test/c",
		"http://six.test/d":                     "origin http://six.test/d",
		"http://" + lab.Origin4.String() + "/e": "direct http://" + lab.Origin4.String() + "/e",
	} {
		for range 2 { // the second time the answer is known
			if body, err := w.get(url); err != nil || body != want {
				t.Errorf("%s: %q, %v; want %q", url, body, err, want)
			}
		}
	}
	if text, err := banner(t, w.Client, lab.Origin4, 22); err != nil || text != lab.Banner {
		t.Errorf("read %q, %v", text, err)
	}
	if text, err := banner(t, w.Client, lab.Origin6, 22); err != nil || text != lab.Banner {
		t.Errorf("read %q, %v", text, err)
	}
	first, other := w.proxy.Targets(), second.Targets()
	if !slices.Contains(first, "origin.test:443") || !slices.Contains(first, "["+lab.Origin6.String()+"]:22") || slices.Contains(first, "six.test:443") {
		t.Errorf("the first proxy was asked for %q", first)
	}
	if !slices.Contains(other, "six.test:443") || slices.Contains(other, "origin.test:443") {
		t.Errorf("the second proxy was asked for %q", other)
	}
	if requests := second.Requests(); !slices.Contains(requests, "GET http://six.test/d") {
		t.Errorf("the second proxy was asked for %q", requests)
	}

	must(t, os.WriteFile(file, fmt.Appendf(nil, `function FindProxyForURL(url, host) { return "PROXY %s:%d"; }`, lab.Proxy4, secondPort), 0o600))
	if !within(10*time.Second, func() bool {
		w.get("https://origin.test/f")
		return slices.Contains(second.Targets(), "origin.test:443")
	}) {
		t.Error("the new script is not used")
	}

	// One that throws: nothing goes past the proxies.
	must(t, os.WriteFile(file, []byte(`function FindProxyForURL(url, host) { throw "no"; }`), 0o600))
	if !within(10*time.Second, func() bool { _, err := w.get("https://origin.test/g"); return err != nil }) {
		t.Error("a script that throws carries flows")
	}
	g.stop()
}

// TestPACFailure: --upstream carries what the script fails to answer.
func TestPACFailure(t *testing.T) {
	w := newWorld(t)
	w.gateway("--pac", script(t, `function FindProxyForURL(url, host) { for (;;); }`))
	if body, err := w.get("https://origin.test/a"); err != nil || !strings.HasPrefix(body, "origin") {
		t.Errorf("%q, %v", body, err)
	}
}

// TestPACMistakes: a script that is none is named with its place, and nothing is changed.
func TestPACMistakes(t *testing.T) {
	w := newWorld(t)
	for name, test := range map[string]struct{ location, want string }{
		"no file":      {"/nowhere/proxy.pac", "/nowhere/proxy.pac"},
		"syntax":       {script(t, "function FindProxyForURL(url, host) {\n\treturn 'DIRECT\n}"), "proxy.pac:2"},
		"no function":  {script(t, "var x = 1;"), "FindProxyForURL"},
		"no such site": {"http://" + lab.Proxy4.String() + ":9/proxy.pac", lab.Proxy4.String()},
	} {
		t.Run(name, func(t *testing.T) {
			g := start(t, w.Gateway, program("--pac", test.location))
			g.wait(10 * time.Second)
			if output := g.output.String(); g.err == nil || !strings.Contains(output, test.want) || !strings.Contains(output, "--pac") {
				t.Errorf("%v: %s", g.err, output)
			}
		})
	}
}
