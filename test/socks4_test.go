package test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestSOCKS4: a client without settings reaches by name and by IPv4 address what can be
// reached through a SOCKS4a proxy only; an IPv6 address, for which that has no words, is
// reset at once and named in the log.
func TestSOCKS4(t *testing.T) {
	w := newWorld(t)
	proxy := &lab.SOCKS4Proxy{UserID: "us er", Hosts: hosts}
	must(t, proxy.Start(w.Proxy, lab.SOCKSPort))
	t.Cleanup(proxy.Close)
	g := startGateway(t, w.Gateway, "--upstream", fmt.Sprintf("socks4a://us%%20er@%s", lab.Proxy4))
	for url, want := range map[string]string{
		"https://origin.test/a":                  "origin https://origin.test/a",
		"https://six.test/b":                     "origin https://six.test/b",
		"http://origin.test/c":                   "origin http://origin.test/c",
		"http://six.test/d":                      "origin http://six.test/d",
		"https://" + lab.Origin4.String() + "/e": "origin https://" + lab.Origin4.String() + "/e",
	} {
		if body, err := w.get(url); err != nil || body != want {
			t.Errorf("%s: %q, %v; want %q", url, body, err, want)
		}
	}
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
		t.Errorf("ssh: %q, %v", got, err)
	}
	w.wantRefusal(lab.Origin6, 22, time.Second)

	targets := proxy.Targets()
	for _, want := range []string{
		"origin.test:443", "six.test:443", "origin.test:80", "six.test:80", lab.Origin4.String() + ":443", lab.Origin4.String() + ":22",
	} {
		if !slices.Contains(targets, want) {
			t.Errorf("the proxy was not asked for %s but %q", want, targets)
		}
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	if refused := proxy.Refused(); refused > 0 {
		t.Errorf("the proxy refused %d requests", refused)
	}
	for _, f := range g.waitFlows(7) {
		sixth := strings.Contains(f.End, "SOCKS4 knows names and IPv4 addresses only")
		if want := "socks4a://" + lab.Proxy4.String() + ":1080"; f.Upstream != want || sixth != strings.HasSuffix(f.Destination, "]:22") {
			t.Errorf("access line %+v", f)
		}
	}
	g.stop()
}
