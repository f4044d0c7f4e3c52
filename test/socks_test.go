package test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// socksWorld is a world whose proxy speaks SOCKS5.
type socksWorld struct {
	*world
	socks *lab.SOCKSProxy
}

func newSOCKSWorld(t *testing.T) *socksWorld {
	t.Helper()
	w := &socksWorld{newWorld(t), &lab.SOCKSProxy{User: user, Password: password, Hosts: hosts}}
	must(t, w.socks.Start(w.Proxy, lab.SOCKSPort))
	t.Cleanup(w.socks.Close)
	return w
}

// gateway starts the program with the SOCKS5 proxy as upstream, by the default port.
func (w *socksWorld) gateway(arguments ...string) *gateway {
	w.t.Helper()
	upstream := fmt.Sprintf("socks5://%s%s", proxyUser, lab.Proxy4)
	return startGateway(w.t, w.Gateway, append([]string{"--upstream", upstream}, arguments...)...)
}

// TestSOCKSMainJob: a client without settings reaches, over both families, what can
// be reached through a SOCKS5 proxy only. Names are left to the proxy.
func TestSOCKSMainJob(t *testing.T) {
	w := newSOCKSWorld(t)
	g := w.gateway()
	for url, want := range map[string]string{
		"https://origin.test/a":                   "origin https://origin.test/a",
		"https://six.test/b":                      "origin https://six.test/b",
		"http://origin.test/c":                    "origin http://origin.test/c",
		"http://six.test/d":                       "origin http://six.test/d",
		"https://" + lab.Origin4.String() + "/e":  "origin https://" + lab.Origin4.String() + "/e",
		"http://[" + lab.Origin6.String() + "]/f": "origin http://[" + lab.Origin6.String() + "]/f",
	} {
		body, err := w.get(url)
		if err != nil || body != want {
			t.Errorf("%s: %q, %v; want %q", url, body, err, want)
		}
	}
	for _, address := range both {
		if got, err := banner(t, w.Client, address, 22); got != lab.Banner {
			t.Errorf("ssh to %s: %q, %v", address, got, err)
		}
	}

	targets := w.socks.Targets()
	for _, want := range []string{
		"origin.test:443", "six.test:443", "origin.test:80", "six.test:80",
		lab.Origin4.String() + ":443", "[" + lab.Origin6.String() + "]:80",
		lab.Origin4.String() + ":22", "[" + lab.Origin6.String() + "]:22",
	} {
		if !slices.Contains(targets, want) {
			t.Errorf("the proxy was not asked for %s but %q", want, targets)
		}
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	// One more asks whether the proxy carries UDP, which it does not.
	if accepted := w.socks.Accepted(); accepted != len(targets)+1 || w.socks.Refused()+w.socks.Demanded() > 0 {
		t.Errorf("of %d requests %d came with the password", len(targets), accepted)
	}

	for _, f := range g.waitFlows(8) {
		if want := "socks5://" + lab.Proxy4.String() + ":1080"; f.Way != "upstream" || f.Upstream != want {
			t.Errorf("access line %+v", f)
		}
	}
	for _, secret := range []string{password, "p%40ss%3Aw%2Fo%25rd"} {
		if strings.Contains(g.output.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
	g.stop()
}

// TestSOCKSWrongPassword: one refusal is seen, named with its cure, and nothing more
// is sent until SIGHUP.
func TestSOCKSWrongPassword(t *testing.T) {
	w := newSOCKSWorld(t)
	w.socks.Change(func() { w.socks.Password = "changed" })
	g := w.gateway()
	var clients sync.WaitGroup
	for range 20 {
		clients.Go(func() { w.wantRefusal(lab.Origin4, 22, time.Second) })
	}
	clients.Wait()
	w.wantRefusal(lab.Origin6, 22, time.Second)
	if n := w.socks.Refused(); n != 1 {
		t.Errorf("the proxy saw %d refused passwords and not one", n)
	}
	g.waitFor("the upstream refuses the credential")
	g.waitFor("a flow was not carried")
	log := g.output.String()
	if !strings.Contains(log, "refuses the user name or the password") || !strings.Contains(log, "SIGHUP") {
		t.Error("the log does not say what is wrong and what to do")
	}

	w.socks.Change(func() { w.socks.Password = password })
	must(t, g.command.Process.Signal(syscall.SIGHUP))
	g.waitFor("reloaded")
	for range 3 {
		if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
			t.Errorf("after SIGHUP: %q, %v", got, err)
		}
	}
	if n := w.socks.Refused(); n != 1 {
		t.Errorf("the proxy saw %d refused passwords and not one", n)
	}

	// The password changes while it is in use.
	w.socks.Change(func() { w.socks.Password = "changed" })
	for range 5 {
		w.wantRefusal(lab.Origin4, 22, time.Second)
	}
	if n := w.socks.Refused(); n != 2 {
		t.Errorf("the proxy saw %d refused passwords and not two", n)
	}
}

// TestSOCKSPasswordNotAsked: a proxy that lets everybody in is not told the
// password, and flows do not wait for one another.
func TestSOCKSPasswordNotAsked(t *testing.T) {
	w := newSOCKSWorld(t)
	w.socks.Change(func() { w.socks.User = "" })
	w.gateway()
	for range 5 {
		if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
			t.Errorf("%q, %v", got, err)
		}
	}
	if offered, accepted := w.socks.Offered(), w.socks.Accepted(); offered != 1 || accepted != 0 {
		t.Errorf("the password was offered %d times and sent %d times", offered, accepted)
	}

	// It is wanted later: one flow finds out, the next sends it.
	w.socks.Change(func() { w.socks.User = user })
	w.wantRefusal(lab.Origin6, 22, time.Second)
	for range 3 {
		if got, err := banner(t, w.Client, lab.Origin6, 22); got != lab.Banner {
			t.Errorf("%q, %v", got, err)
		}
	}
	if accepted, demanded := w.socks.Accepted(), w.socks.Demanded(); accepted != 3 || demanded != 1 {
		t.Errorf("the password was accepted %d times and missed %d times", accepted, demanded)
	}
}

// TestSOCKSRefusalsAreNamed: what the proxy says no with is in the access log.
func TestSOCKSRefusalsAreNamed(t *testing.T) {
	w := newSOCKSWorld(t)
	w.socks.Change(func() { w.socks.Ports = []int{443} })
	g := w.gateway("--udp", "443=reject") // nobody asks whether it carries UDP
	for flows := range 2 {                // the first use of the password, and on the engine
		w.wantRefusal(lab.Origin4, 22, time.Second)
		if f := g.waitFlows(flows + 1)[flows]; !strings.Contains(f.End, "not allowed by ruleset") {
			t.Errorf("access line %+v", f)
		}
	}
	if accepted := w.socks.Accepted(); accepted != 2 {
		t.Errorf("the password was accepted %d times", accepted)
	}
}

// TestSOCKSEarlyBytes: what comes in the same segment as the reply belongs to the
// client.
func TestSOCKSEarlyBytes(t *testing.T) {
	w := newSOCKSWorld(t)
	w.socks.Change(func() { w.socks.Early = "early " })
	w.gateway()
	for range 2 { // the first use of the password, and on the engine
		if got, err := banner(t, w.Client, lab.Origin4, 22); got != ("early " + lab.Banner)[:len(lab.Banner)] {
			t.Errorf("%q, %v", got, err)
		}
	}
}
