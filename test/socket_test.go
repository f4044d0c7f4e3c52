package test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestSocketMainJob: all that clients do is carried through a proxy on a unix socket, which
// may begin to listen after the gateway, and bytes in bulk go both ways unchanged.
func TestSocketMainJob(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "proxy.sock")
	g := startGateway(t, w.Gateway, "--upstream", "http+unix://"+proxyUser+path, "--tcp-proxy-dports", "all")
	w.wantRefusal(lab.Origin4, 22, time.Second)
	g.waitFor("no such file or directory: is the proxy running")
	g.waitFlows(1)

	front := new(lab.SocketFront)
	must(t, front.Start(path, w.Proxy, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), lab.ProxyPort)))
	t.Cleanup(front.Close)
	for url, want := range map[string]string{
		"https://origin.test/a":                   "origin https://origin.test/a",
		"https://six.test/b":                      "origin https://six.test/b",
		"http://origin.test/c":                    "origin http://origin.test/c",
		"http://[" + lab.Origin6.String() + "]/d": "origin http://[" + lab.Origin6.String() + "]/d",
	} {
		if body, err := w.get(url); err != nil || body != want {
			t.Errorf("%s: %q, %v; want %q", url, body, err, want)
		}
	}
	for _, address := range both {
		if got, err := banner(t, w.Client, address, 22); got != lab.Banner {
			t.Errorf("ssh to %s: %q, %v", address, got, err)
		}
	}
	w.wantBytes(32 << 20)

	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	if requests := w.proxy.Requests(); !slices.Contains(requests, "GET http://origin.test/c") {
		t.Errorf("the proxy was asked for %q", requests)
	}
	for _, f := range g.waitFlows(9)[1:] {
		if f.Way != "upstream" || f.Upstream != "http+unix://"+path || f.End != "closed" && f.End != "done" {
			t.Errorf("access line %+v", f)
		}
	}
	g.stop()
}

// TestSocketSOCKS: the same proxies by SOCKS5 and SOCKS4a.
func TestSocketSOCKS(t *testing.T) {
	w := newWorld(t)
	five := &lab.SOCKSProxy{User: user, Password: password, Hosts: hosts}
	must(t, five.Start(w.Proxy, lab.SOCKSPort))
	t.Cleanup(five.Close)
	const port4 = lab.SOCKSPort + 1
	four := &lab.SOCKS4Proxy{UserID: "user", Hosts: hosts}
	must(t, four.Start(w.Proxy, port4))
	t.Cleanup(four.Close)
	for scheme, test := range map[string]struct {
		user string
		port uint16
	}{"socks5": {proxyUser, lab.SOCKSPort}, "socks4a": {"user@", port4}} {
		path := filepath.Join(t.TempDir(), scheme)
		front := new(lab.SocketFront)
		must(t, front.Start(path, w.Proxy, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), test.port)))
		t.Cleanup(front.Close)
		g := startGateway(t, w.Gateway, "--upstream", scheme+"+unix://"+test.user+path)
		if body, err := w.get("https://six.test/"); err != nil || body != "origin https://six.test/" {
			t.Errorf("%s: %q, %v", scheme, body, err)
		}
		if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
			t.Errorf("%s: %q, %v", scheme, got, err)
		}
		g.stop()
	}
}

// wantBytes wants so many bytes to go both ways unchanged, with half-close.
func (w *world) wantBytes(size int64) {
	w.t.Helper()
	digest := sha256.New()
	up := w.dial(lab.Origin4, lab.PortDigest)
	if _, err := io.Copy(up, io.TeeReader(io.LimitReader(lab.Noise(), size), digest)); err != nil {
		w.t.Fatal(err)
	}
	must(w.t, up.CloseWrite())
	want := hex.EncodeToString(digest.Sum(nil))
	if answer, err := io.ReadAll(up); err != nil || strings.TrimSpace(string(answer)) != want {
		w.t.Errorf("up: %q, %v; want %s", answer, err, want)
	}
	digest.Reset()
	down := w.dial(lab.Origin4, lab.PortSource)
	fmt.Fprintln(down, size)
	if n, err := io.Copy(digest, down); err != nil || n != size || hex.EncodeToString(digest.Sum(nil)) != want {
		w.t.Errorf("down: %d bytes, %v", n, err)
	}
	down.Close()
}
