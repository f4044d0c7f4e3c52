package lab_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

func TestRoutedReachesTheOriginOnlyThroughTheProxy(t *testing.T) {
	l, err := lab.Routed()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var origin, direct lab.Origin
	origin.Label, direct.Label = "origin", "direct"
	for server, ns := range map[*lab.Origin]*netns.NS{&origin: l.Origin, &direct: l.Router} {
		if err := server.Start(ns, nil, nil); err != nil {
			t.Fatal(err)
		}
		defer server.Close()
	}
	proxy := lab.ConnectProxy{User: "u", Password: "p"}
	if err := proxy.Start(l.Proxy, lab.ProxyPort); err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()

	for _, address := range []netip.Addr{lab.Origin4, lab.Origin6} {
		response, err := lab.HTTPClient(l.Client, nil, nil).Get("http://" + netip.AddrPortFrom(address, 80).String() + "/")
		if err != nil {
			t.Fatal(err)
		}
		if body, _ := io.ReadAll(response.Body); !strings.HasPrefix(string(body), "direct ") {
			t.Errorf("without a gateway %s answers %q", address, body)
		}
		response.Body.Close()
	}
	for _, at := range []netip.Addr{lab.Proxy4, lab.Proxy6} {
		for authorization, want := range map[string]string{"": "407", "Proxy-Authorization: Basic dTpw\r\n": "200"} {
			answer := exchange(t, l.Client, netip.AddrPortFrom(at, lab.ProxyPort),
				fmt.Sprintf("CONNECT %s HTTP/1.1\r\nHost: x\r\n%s\r\n", netip.AddrPortFrom(lab.Origin6, lab.PortDigest), authorization))
			if !strings.HasPrefix(answer, "HTTP/1.1 "+want) {
				t.Errorf("the proxy at %s answers %q to %q", at, answer, authorization)
			}
			// The digest of nothing comes back after the half-close only.
			if digest := "e3b0c44298fc1c14"; want == "200" && !strings.Contains(answer, digest) {
				t.Errorf("half-close does not pass: %q", answer)
			}
		}
	}
}

func TestOneArmedRoutesAsymmetrically(t *testing.T) {
	l, err := lab.OneArmed()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var origin lab.Origin
	if err := origin.Start(l.Router, nil, nil); err != nil {
		t.Fatal(err)
	}
	defer origin.Close()
	if answer := exchange(t, l.Client, netip.AddrPortFrom(lab.Origin4, 22), ""); answer != lab.Banner {
		t.Errorf("the client gets %q through the gateway", answer)
	}
}

// exchange sends, closes its side, and reads to the end.
func exchange(t *testing.T, ns *netns.NS, to netip.AddrPort, text string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(3 * time.Second))
	io.WriteString(conn, text)
	conn.(*net.TCPConn).CloseWrite()
	answer, _ := io.ReadAll(conn)
	return string(answer)
}
