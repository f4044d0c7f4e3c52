package test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestMainJob is what the program is for: a client without settings reaches, over
// both families, what can be reached through the proxy only.
func TestMainJob(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--upstream-auth", "auto")
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

	targets := w.proxy.Targets()
	for _, want := range []string{
		"origin.test:443", "six.test:443", lab.Origin4.String() + ":443",
		lab.Origin4.String() + ":22", "[" + lab.Origin6.String() + "]:22",
	} {
		if !slices.Contains(targets, want) {
			t.Errorf("the proxy saw no CONNECT %s among %q", want, targets)
		}
	}
	requests := w.proxy.Requests()
	slices.Sort(requests)
	if want := []string{
		"GET http://[" + lab.Origin6.String() + "]/f", "GET http://origin.test/c", "GET http://six.test/d",
	}; !slices.Equal(requests, want) {
		t.Errorf("the proxy saw the requests %q and not %q", requests, want)
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	// The first flow has found out what the proxy takes.
	if demanded, refused := w.proxy.Demanded(), w.proxy.Refused(); demanded != 1 || refused != 0 {
		t.Errorf("the proxy refused %d requests with and %d without a password, want 0 and 1", refused, demanded)
	}

	g.waitFlows(8)
	for _, f := range g.flows() {
		if f.Way != "upstream" || !strings.Contains(f.Upstream, lab.Proxy4.String()) || f.Client == "" {
			t.Errorf("access line %+v", f)
		}
		if strings.HasSuffix(f.Destination, ":443") && f.Name != "" && f.NameFrom != "sni" {
			t.Errorf("the name of a TLS flow is from %q", f.NameFrom)
		}
	}
	g.stop()
}

// TestPasswordIsNowhere looks for the password where others could read it.
func TestPasswordIsNowhere(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--loglevel", "debug")
	if _, err := w.get("https://origin.test/"); err != nil {
		t.Fatal(err)
	}
	g.waitFlows(1)
	listing, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", g.command.Process.Pid))
	must(t, err)
	if !strings.Contains(string(listing), lab.Proxy4.String()) {
		t.Fatalf("the argument list is not there: %q", listing)
	}
	for _, secret := range []string{password, "p%40ss%3Aw%2Fo%25rd", "dXMgZXI6"} {
		if strings.Contains(string(listing), secret) {
			t.Errorf("%q is in the argument list %q", secret, listing)
		}
		if strings.Contains(g.output.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// TestOnlyListedPortsAreCaptured: port 9001 is left alone unless it is listed.
func TestOnlyListedPortsAreCaptured(t *testing.T) {
	for _, test := range []struct {
		name      string
		arguments []string
		captured  bool
	}{
		{"unlisted", nil, false},
		{"listed", []string{"--tcp-proxy-dports", "22,9000-9002"}, true},
		{"all", []string{"-tcp-proxy-dports=all"}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.gateway(test.arguments...)
			for _, address := range both {
				conn := w.dial(address, lab.PortDigest)
				conn.CloseWrite()
				if _, err := io.ReadAll(conn); err != nil {
					t.Fatal(err)
				}
			}
			if direct := len(w.direct.Sources()); direct != 0 == test.captured {
				t.Errorf("%d connections went past the proxy", direct)
			}
			if carried := len(w.proxy.Targets()); carried != 0 != test.captured {
				t.Errorf("%d connections went through the proxy", carried)
			}
		})
	}
}

// TestNoProxy: what is exempt by address is forwarded by the kernel, with the
// client's own source address; what is exempt by name goes directly to the address
// that the client dialled.
func TestNoProxy(t *testing.T) {
	for _, test := range []struct {
		name, list, url string
		source          netip.Addr // that the far side sees; invalid for a flow through the proxy
	}{
		{"address", lab.Origin4.String(), "http://origin.test/", lab.Client4},
		{"prefix", "2001:db8:3::/48", "http://six.test/", lab.Client6},
		{"everything", "*", "http://six.test/", lab.Client6},
		{"name", "origin.test", "http://origin.test/", lab.Uplink4},
		{"suffix", "test", "http://six.test/", lab.Uplink6},
		{"name and port", "origin.test:80", "http://origin.test/", lab.Uplink4},
		{"address and port", lab.Origin4.String() + ":80", "http://origin.test/", lab.Uplink4},
		{"other port", "origin.test:443", "http://origin.test/", netip.Addr{}},
		{"not on a label's border", "gin.test", "http://origin.test/", netip.Addr{}},
		{"only below", ".origin.test", "http://origin.test/", netip.Addr{}},
		{"nothing", "", "http://origin.test/", netip.Addr{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			g := w.gateway("--no-proxy", test.list)
			body, err := w.get(test.url)
			if err != nil {
				t.Fatal(err)
			}
			sources := w.direct.Sources()
			if !test.source.IsValid() {
				if len(sources) > 0 || !strings.HasPrefix(body, "origin ") {
					t.Errorf("it went directly: %q", body)
				}
				return
			}
			if len(sources) != 1 || sources[0].Addr() != test.source {
				t.Errorf("the far side saw %v, want %v", sources, test.source)
			}
			inUserSpace := test.source == lab.Uplink4 || test.source == lab.Uplink6
			if inUserSpace {
				if f := g.waitFlows(1)[0]; f.Way != "direct" {
					t.Errorf("access line %+v", f)
				}
			} else if flows := g.flows(); len(flows) > 0 {
				t.Errorf("it reached user space: %+v", flows)
			}
		})
	}
}

// TestBulk moves a lot both ways through the program, byte for byte, with the
// answer to an upload behind its half-close.
func TestBulk(t *testing.T) {
	bytes := int64(1 << 30)
	if testing.Short() {
		bytes = 64 << 20
	}
	w := newWorld(t)
	g := w.gateway("--tcp-proxy-dports", fmt.Sprintf("%d,%d", lab.PortDigest, lab.PortSource))
	digest := sha256.New()
	io.CopyN(digest, lab.Noise(), bytes)
	want := hex.EncodeToString(digest.Sum(nil))

	up := w.dial(lab.Origin4, lab.PortDigest)
	if _, err := io.Copy(up, io.LimitReader(lab.Noise(), bytes)); err != nil {
		t.Fatal(err)
	}
	must(t, up.CloseWrite())
	answer, err := io.ReadAll(up)
	if got := strings.TrimSpace(string(answer)); err != nil || got != want {
		t.Errorf("upload: %q, %v; want %s", got, err, want)
	}

	down := w.dial(lab.Origin6, lab.PortSource)
	fmt.Fprintln(down, bytes)
	digest.Reset()
	n, err := io.Copy(digest, down)
	if got := hex.EncodeToString(digest.Sum(nil)); err != nil || n != bytes || got != want {
		t.Errorf("download: %d bytes, %s, %v; want %d, %s", n, got, err, bytes, want)
	}
	down.Close()
	for _, f := range g.waitFlows(2) {
		if f.Sent+f.Received < bytes || f.End != "closed" {
			t.Errorf("access line %+v", f)
		}
	}
}

// TestSysctls: no setting of the two that spoil policy routing does so here.
func TestSysctls(t *testing.T) {
	for _, validMark := range []string{"0", "1"} {
		for _, reversePath := range []string{"0", "1", "2"} {
			t.Run("src_valid_mark="+validMark+" rp_filter="+reversePath, func(t *testing.T) {
				w := newWorld(t)
				for _, link := range []string{"all", "default", "lan0", "wan0", "lo"} {
					must(t,
						w.Gateway.Sysctl("net.ipv4.conf."+link+".src_valid_mark", validMark),
						w.Gateway.Sysctl("net.ipv4.conf."+link+".rp_filter", reversePath))
				}
				// Early demultiplexing would hide a missing rule.
				must(t, w.Gateway.Sysctl("net.ipv4.tcp_early_demux", "0"))
				w.gateway()
				for _, url := range []string{"https://origin.test/", "https://six.test/"} {
					if body, err := w.get(url); err != nil || !strings.HasPrefix(body, "origin ") {
						t.Errorf("%s: %q, %v", url, body, err)
					}
				}
			})
		}
	}
}

// TestForwardingIsNotNeeded: captured flows are carried on a host that forwards nothing.
func TestForwardingIsNotNeeded(t *testing.T) {
	w := newWorld(t)
	must(t, w.Gateway.Sysctl("net.ipv4.ip_forward", "0"), w.Gateway.Sysctl("net.ipv6.conf.all.forwarding", "0"))
	w.gateway()
	for _, url := range []string{"https://origin.test/", "https://six.test/"} {
		if body, err := w.get(url); err != nil || !strings.HasPrefix(body, "origin ") {
			t.Errorf("%s: %q, %v", url, body, err)
		}
	}
}

// TestWithoutIPv6: a host on which IPv6 is switched off is a gateway for IPv4.
func TestWithoutIPv6(t *testing.T) {
	w := newWorld(t)
	must(t, w.Gateway.Sysctl("net.ipv6.conf.all.disable_ipv6", "1"))
	w.gateway("--fail", "closed")
	if body, err := w.get("https://origin.test/"); err != nil || !strings.HasPrefix(body, "origin ") {
		t.Errorf("%q, %v", body, err)
	}
}

// TestIPv6ThatWouldPass: clients have IPv6 and the gateway cannot listen on ::1. It
// says so, and does not start as something that promises to be closed.
func TestIPv6ThatWouldPass(t *testing.T) {
	w := newWorld(t)
	must(t, w.Gateway.Sysctl("net.ipv6.conf.lo.disable_ipv6", "1"))
	output, err := w.run(program("--upstream", upstream(), "--fail", "closed"))
	if err == nil {
		t.Fatal("it starts")
	}
	wantOneLine(t, output, "--fail closed", "IPv6", "disable_ipv6=0")
	w.gateway().waitFor("IPv6 passes uncaptured")
}
