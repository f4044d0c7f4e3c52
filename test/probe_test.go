package test

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// probe runs the command on the gateway, and returns what it printed and its exit status.
func (w *world) probe(arguments ...string) (printed string, status int) {
	w.t.Helper()
	command := program(append([]string{
		"probe", "--probe-host", "origin.test", "--probe-address", lab.Origin4.String() + "," + lab.Origin6.String(), "--probe-ports", "80,22",
		"--private-dns", lab.Router4.String(), "--public-dns", lab.Origin4.String(), "--dns-over-tls", "dns.test", "--no-proxy", "corp.test",
	}, arguments...)...)
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	err := w.Gateway.Do(command.Run)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		status = exit.ExitCode()
	} else {
		must(w.t, err)
	}
	for _, secret := range []string{password, proxyUser, "wr0ng"} {
		if strings.Contains(output.String(), secret) {
			w.t.Errorf("%q is in the output", secret)
		}
	}
	if w.t.Failed() {
		w.t.Log(output.String())
	}
	return output.String(), status
}

// TestProbe: the exit status and the flags for a proxy that can be used, for one that
// refuses the password, of which it sees one, and for a wrong command line.
func TestProbe(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Ports = []int{443} })
	printed, status := w.probe("--upstream", upstream())
	for _, want := range []string{
		"\n  no       CONNECT origin.test:22 ", "\n  yes      GET http://origin.test/ ",
		"sudo transproxy-tproxy --upstream http://198.51.100.10:3128 --no-proxy corp.test --private-dns 198.51.100.254 --fake-ip\n",
	} {
		if !strings.Contains(printed, want) {
			t.Errorf("the output lacks %q:\n%s", want, printed)
		}
	}
	if status != 0 || w.proxy.Refused() != 0 {
		t.Errorf("status %d, %d refused passwords", status, w.proxy.Refused())
	}

	printed, status = w.probe("--upstream", "http://user:wr0ng@"+lab.Proxy4.String())
	if status != 1 || w.proxy.Refused() != 1 || strings.Contains(printed, "sudo") || !strings.Contains(printed, "retries lock accounts") {
		t.Errorf("status %d, %d refused passwords:\n%s", status, w.proxy.Refused(), printed)
	}

	for _, arguments := range [][]string{nil, {"--upstream", "direct://"}, {"--upstream", "http://a,http://b"}, {"--probe-ports", "x"}} {
		if printed, status := w.probe(arguments...); status != 2 || strings.Count(printed, "\n") != 1 {
			t.Errorf("%v: status %d: %s", arguments, status, printed)
		}
	}
}
