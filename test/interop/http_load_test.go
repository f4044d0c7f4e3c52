//go:build interop

package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// logPorts has squid write down from which port of the gateway a request came.
const logPorts = "logformat port %>p %rm %ru\naccess_log stdio:DIR/ports.log port\n"

// ports are the ports of the gateway from which squid got requests for a path, and how
// many requests those were.
func (s *squid) ports(t *testing.T, path string) (ports, requests int) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(s.dir, "ports.log"))
	must(t, err)
	distinct := make(map[string]bool)
	for line := range strings.Lines(string(log)) {
		fields := strings.Fields(line)
		if len(fields) == 3 && strings.HasSuffix(fields[2], path) {
			distinct[fields[0]] = true
			requests++
		}
	}
	return len(distinct), requests
}

// TestLoad has wrk ask as fast as it can, on connections that it keeps and on one for
// each request: every request is answered as it should, and squid sees all of them on no
// more connections than there are at once.
func TestLoad(t *testing.T) {
	const clients = 8
	w := newHTTPWorld(t, logPorts)
	g := w.gateway("--access-log", filepath.Join(t.TempDir(), "access.log"))
	for _, test := range []struct {
		path      string
		address   string
		arguments []string
	}{
		{"/kept4", lab.Origin4.String(), nil},
		{"/kept6", "[" + lab.Origin6.String() + "]", nil},
		{"/closed4", lab.Origin4.String(), []string{"-H", "Connection: close"}},
		{"/closed6", "[" + lab.Origin6.String() + "]", []string{"-H", "Connection: close"}},
	} {
		t.Run(test.path[1:], func(t *testing.T) {
			arguments := append([]string{"-t1", fmt.Sprintf("-c%d", clients), "-d2s"}, test.arguments...)
			output, err := run(t, w.Client, "wrk", append(arguments, "http://"+test.address+test.path)...)
			must(t, err)
			found := regexp.MustCompile(`(\d+) requests in `).FindStringSubmatch(output)
			if found == nil || strings.Contains(output, "Socket errors") || strings.Contains(output, "Non-2xx") {
				t.Fatalf("wrk:\n%s", output)
			}
			answered, err := strconv.Atoi(found[1])
			must(t, err)
			ports, requests := w.squid.ports(t, test.path)
			t.Logf("%d requests were answered, squid saw %d on %d connections", answered, requests, ports)
			// Those that were under way at the end are squid's alone. Their clients' resets
			// take connections with them, as do those that wait at squid for its next pass.
			if requests < answered || requests > answered+2*clients || answered < 100 {
				t.Errorf("%d were answered, squid saw %d", answered, requests)
			}
			if ports > 4*clients {
				t.Errorf("%d connections to squid for %d clients", ports, clients)
			}
		})
	}
	if log := w.squid.log(t); regexp.MustCompile(`CONNECT \S+:80 `).MatchString(log) || w.squid.demands(t) > 1 {
		t.Error("squid was asked for tunnels to port 80, or without the password")
	}
	must(t, g.end(syscall.SIGTERM))
}

// TestExemptOnOneConnection: of two hosts on one connection of curl's, squid sees the one
// that is not exempt.
func TestExemptOnOneConnection(t *testing.T) {
	w := newHTTPWorld(t, "")
	w.gateway("--no-proxy", "six.test")
	for _, address := range []string{lab.Origin4.String(), "[" + lab.Origin6.String() + "]"} {
		to := "::" + address + ":80"
		output, err := run(t, w.Client, "curl", "-sSv",
			"--connect-to", to, "http://origin.test/a",
			"--next", "-sSv", "--connect-to", to, "-H", "Host: six.test", "http://origin.test/b",
			"--next", "-sSv", "--connect-to", to, "http://origin.test/c")
		if err != nil || strings.Count(output, "Re-using existing connection") != 2 {
			t.Errorf("%v\n%s", err, output)
		}
		for _, want := range []string{"nginx origin.test/a GET", "direct http://six.test/b", "nginx origin.test/c GET"} {
			if !strings.Contains(output, want) {
				t.Errorf("no %q in\n%s", want, output)
			}
		}
	}
	w.squid.wantLog(t, "GET http://origin.test/a us er")
	w.squid.wantLog(t, "GET http://origin.test/c us er")
	if log := w.squid.log(t); strings.Contains(log, "six.test") || strings.Contains(log, "CONNECT") {
		t.Errorf("squid's log:\n%s", log)
	}
}

// TestPlainPages: what squid says about its own failures gets to the client as it is;
// without squid the gateway says who it is.
func TestPlainPages(t *testing.T) {
	w := newHTTPWorld(t, "")
	g := w.gateway("--http-ports", "80,81") // nobody listens on 81
	connect := []string{"--connect-to", "::" + lab.Origin4.String() + ":81", "http://origin.test:81/"}
	output, err := w.curl(append([]string{"-i"}, connect...)...)
	if err != nil || !strings.Contains(output, "HTTP/1.1 503 ") || !strings.Contains(output, "X-Squid-Error: ERR_CONNECT_FAIL") {
		t.Errorf("%v\n%s", err, output)
	}
	if strings.Contains(output, "transproxy-tproxy") {
		t.Errorf("the gateway has put itself into squid's answer:\n%s", output)
	}
	must(t, g.end(syscall.SIGTERM))
	w.gateway("--upstream", fmt.Sprintf("http://%s:%d", lab.Proxy4, squidPort+1))
	output, err = w.curl("-i", "http://origin.test/")
	if err != nil || !strings.Contains(output, "HTTP/1.1 502 ") || !strings.Contains(output, "Proxy-Status: transproxy-tproxy; error=connection_refused") {
		t.Errorf("without squid: %v\n%s", err, output)
	}
}
