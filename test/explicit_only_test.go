package test

import (
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestExplicitOnlyWithoutPrivilege: who captures nothing needs no right to; it carries
// requests and tunnels of all who may use it, next to clients that go on past it.
func TestExplicitOnlyWithoutPrivilege(t *testing.T) {
	w := newWorld(t)
	before := w.kernelState()
	command := program("--upstream", upstream(), "--explicit-proxy-only")
	// Not a capability of the namespace's owner is left to it.
	command.SysProcAttr.AmbientCaps = nil
	command.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
	g := start(t, w.Gateway, command)
	g.waitFor(`"message":"ready"`)

	for _, from := range []place{{w.Gateway, loopback4}, {w.Gateway, loopback6}} {
		w.explicitlyAt(from, authenticating).ask("GET http://six.test/ HTTP/1.1\nHost: six.test\n\n", "origin http://six.test/")
	}
	w.explicitlyAt(place{w.Client, lab.Gateway6}, passing).ask("GET http://six.test/ HTTP/1.1\nHost: six.test\n"+credential+"\n", "origin http://six.test/")
	if body, err := w.get("http://six.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("it captures: %q, %v", body, err)
	}
	if after := w.kernelState(); after != before {
		t.Errorf("the kernel's state has changed from %s to %s", before, after)
	}
	g.stop()
}

// TestExplicitOnlyWithNothingToServe is a mistake that is named.
func TestExplicitOnlyWithNothingToServe(t *testing.T) {
	w := newWorld(t)
	output, err := w.run(program("--upstream", upstream(), "--explicit-proxy-only",
		"--explicit-proxy-listen", "off", "--explicit-proxy-with-auth-listen", "off"))
	if err == nil {
		t.Fatal("it starts")
	}
	wantOneLine(t, output, "--explicit-proxy-only", "--explicit-proxy-listen")
}
