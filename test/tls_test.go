package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// tlsPort is where a world's proxy is talked to by TLS.
const tlsPort = 3443

// secure puts TLS before the world's proxy and returns the flags for it.
func (w *world) secure(front *lab.TLSFront) (flags []string) {
	w.t.Helper()
	behind := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), lab.ProxyPort)
	must(w.t, front.Start(w.Proxy, tlsPort, behind, lab.Proxy4, lab.Proxy6))
	w.t.Cleanup(front.Close)
	authority := filepath.Join(w.t.TempDir(), "ca.pem")
	must(w.t, os.WriteFile(authority, front.CA(), 0o600))
	return []string{"--upstream", fmt.Sprintf("https://%s%s:%d", proxyUser, lab.Proxy4, tlsPort), "--upstream-ca", authority}
}

// TestTLSMainJob: all that clients do is carried through a proxy that is talked to by TLS,
// plain HTTP in absolute form included.
func TestTLSMainJob(t *testing.T) {
	w := newWorld(t)
	g := startGateway(t, w.Gateway, w.secure(new(lab.TLSFront))...)
	for url, want := range map[string]string{
		"https://origin.test/a":                   "origin https://origin.test/a",
		"https://six.test/b":                      "origin https://six.test/b",
		"http://origin.test/c":                    "origin http://origin.test/c",
		"https://" + lab.Origin4.String() + "/e":  "origin https://" + lab.Origin4.String() + "/e",
		"http://[" + lab.Origin6.String() + "]/f": "origin http://[" + lab.Origin6.String() + "]/f",
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
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	if requests := w.proxy.Requests(); !slices.Contains(requests, "GET http://origin.test/c") {
		t.Errorf("the proxy was asked for %q", requests)
	}
	for _, f := range g.waitFlows(7) {
		if want := fmt.Sprintf("https://%s:%d", lab.Proxy4, tlsPort); f.Way != "upstream" || f.Upstream != want || f.End != "closed" && f.End != "done" {
			t.Errorf("access line %+v", f)
		}
	}
	if w.proxy.Refused() > 0 {
		t.Error("the proxy refused the credential")
	}
}

// TestTLSBulk: bytes go both ways unchanged, with half-close.
func TestTLSBulk(t *testing.T) {
	w := newWorld(t)
	startGateway(t, w.Gateway, append(w.secure(new(lab.TLSFront)), "--tcp-proxy-dports", "all")...)
	const size = 64 << 20 // bytes each way
	digest := sha256.New()
	up := w.dial(lab.Origin4, lab.PortDigest)
	if _, err := io.Copy(up, io.TeeReader(io.LimitReader(lab.Noise(), size), digest)); err != nil {
		t.Fatal(err)
	}
	must(t, up.CloseWrite())
	want := hex.EncodeToString(digest.Sum(nil))
	if answer, err := io.ReadAll(up); err != nil || strings.TrimSpace(string(answer)) != want {
		t.Errorf("up: %q, %v; want %s", answer, err, want)
	}
	digest.Reset()
	down := w.dial(lab.Origin4, lab.PortSource)
	fmt.Fprintln(down, size)
	if n, err := io.Copy(digest, down); err != nil || n != size || hex.EncodeToString(digest.Sum(nil)) != want {
		t.Errorf("down: %d bytes, %v", n, err)
	}
}

// TestTLSCut: a connection to the proxy that ends without the goodbye of TLS is a reset to
// the client, not an end.
func TestTLSCut(t *testing.T) {
	w := newWorld(t)
	startGateway(t, w.Gateway, append(w.secure(&lab.TLSFront{Cut: 1000}), "--tcp-proxy-dports", "all")...)
	conn := w.dial(lab.Origin4, lab.PortSource)
	fmt.Fprintln(conn, 1<<20)
	if n, err := io.Copy(io.Discard, conn); err == nil || n == 0 {
		t.Errorf("%d bytes and then %v, of a download that was cut", n, err)
	}
}

// TestTLSClientCertificate shows the gateway's own certificate to a proxy that asks for it.
func TestTLSClientCertificate(t *testing.T) {
	w := newWorld(t)
	issued := &lab.TLSFront{} // only to have a certificate made
	must(t, issued.Start(w.Neighbour, tlsPort, netip.MustParseAddrPort("127.0.0.1:1")))
	t.Cleanup(issued.Close)
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(issued.CA())
	flags := w.secure(&lab.TLSFront{Config: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: authorities}})
	file := filepath.Join(t.TempDir(), "gateway.pem")
	must(t, os.WriteFile(file, bytes.Join([][]byte{issued.CA(), issued.Key()}, nil), 0o600))
	g := startGateway(t, w.Gateway, flags...)
	if text, err := banner(t, w.Client, lab.Origin4, 22); err == nil {
		t.Errorf("without a certificate: %q", text)
	}
	g.stop()
	startGateway(t, w.Gateway, append(flags, "--upstream-cert", file)...)
	if text, err := banner(t, w.Client, lab.Origin4, 22); err != nil || text != lab.Banner {
		t.Errorf("with the certificate: %q, %v", text, err)
	}
}

// TestTLSMistakes: what is wrong with the proxy's TLS is named with its remedy, and the
// client is reset.
func TestTLSMistakes(t *testing.T) {
	w := newWorld(t)
	flags := w.secure(new(lab.TLSFront))
	secure, authority := flags[1], flags[3]
	for name, test := range map[string]struct {
		flags []string
		want  string
	}{
		"unknown authority": {[]string{"--upstream", secure}, "give its certificate with --upstream-ca"},
		"other name":        {[]string{"--upstream", secure, "--upstream-ca", authority, "--upstream-server-name", "other.test"}, "give the name that the certificate has with --upstream-server-name"},
		"no TLS":            {[]string{"--upstream", "https" + strings.TrimPrefix(upstream(), "http"), "--upstream-ca", authority}, "try http:// in place of https://"},
	} {
		t.Run(name, func(t *testing.T) {
			g := startGateway(t, w.Gateway, test.flags...)
			if text, err := banner(t, w.Client, lab.Origin4, 22); err == nil {
				t.Errorf("read %q", text)
			}
			g.waitFor(test.want)
			g.stop()
		})
	}
	t.Run("right name", func(t *testing.T) {
		g := startGateway(t, w.Gateway, "--upstream", secure, "--upstream-ca", authority, "--upstream-server-name", lab.TLSName)
		if text, err := banner(t, w.Client, lab.Origin4, 22); err != nil || text != lab.Banner {
			t.Errorf("read %q, %v", text, err)
		}
		g.stop()
	})
	t.Run("flags without TLS", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		command := program("--upstream", upstream(), "--upstream-ca", authority)
		output, err := command.CombinedOutput()
		if err == nil || ctx.Err() != nil || !strings.Contains(string(output), "are for upstreams by TLS") {
			t.Errorf("%v: %s", err, output)
		}
	})
}
