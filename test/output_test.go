package test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// fetch gets a URL from a host.
func (w *world) fetch(from *netns.NS, url string) (string, error) {
	client := lab.HTTPClient(from, hosts, w.origin.Roots())
	client.Timeout = 5 * time.Second
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return strings.TrimSpace(string(body)), err
}

// TestOwnPrograms: what the gateway's own programs send is captured with --output, in
// both families, and clients are as before.
func TestOwnPrograms(t *testing.T) {
	for _, sysctls := range []map[string]string{
		nil,
		{"net.ipv4.conf.all.src_valid_mark": "1", "net.ipv4.conf.all.rp_filter": "1"},
		{"net.ipv4.tcp_early_demux": "0", "net.ipv4.conf.all.rp_filter": "2"},
	} {
		t.Run(fmt.Sprint(sysctls), func(t *testing.T) {
			w := newWorld(t)
			for key, value := range sysctls {
				must(t, w.Gateway.Sysctl(key, value))
			}
			g := w.gateway("--output", "--udp", "443=reject,123=direct")
			for _, from := range []*netns.NS{w.Gateway, w.Client} {
				for _, url := range []string{"https://origin.test/a", "https://six.test/b", "http://origin.test/c", "http://six.test/d"} {
					if body, err := w.fetch(from, url); err != nil || body != "origin "+url {
						t.Errorf("%s: %q, %v", url, body, err)
					}
				}
				for _, address := range both {
					if got, err := banner(t, from, address, 22); got != lab.Banner {
						t.Errorf("ssh to %s: %q, %v", address, got, err)
					}
				}
			}
			if sources := w.direct.Sources(); len(sources) > 0 {
				t.Errorf("%v went past the proxy", sources)
			}
			// QUIC of its own programs fails at once, too: the kernel does not even send it.
			conn, err := w.Gateway.Dial(t.Context(), "udp", netip.AddrPortFrom(lab.Origin4, 443).String())
			must(t, err)
			defer conn.Close()
			_, err = conn.Write([]byte("hello"))
			if err == nil {
				conn.SetReadDeadline(time.Now().Add(time.Second))
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) {
				t.Errorf("QUIC: %v", err)
			}
			g.stop()
			if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
				t.Errorf("after the stop: %q, %v", body, err)
			}
		})
	}
}

// TestOwnProgramsLeftAlone: those of a user, what stays on this host, and the networks
// beside it.
func TestOwnProgramsLeftAlone(t *testing.T) {
	w := newWorld(t)
	listener, err := w.Gateway.Listen("tcp", "[::]:80")
	must(t, err)
	served := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "own") })}
	go served.Serve(listener)
	t.Cleanup(func() { served.Close() })
	beside := &lab.Origin{Label: "beside"}
	must(t, beside.Start(w.Server, nil, nil))
	t.Cleanup(beside.Close)

	g := w.gateway("--output")
	for url, want := range map[string]string{
		"http://127.0.0.1/": "own", "http://[::1]/": "own",
		"http://" + lab.Gateway4.String() + "/": "own", "http://[" + lab.Gateway6.String() + "]/": "own",
		"http://" + lab.Server4.String() + "/":      "beside http://" + lab.Server4.String() + "/",
		"http://[" + lab.Server6.String() + "]/":    "beside http://[" + lab.Server6.String() + "]/",
		"http://" + lab.Uplink4.String() + ":80/":   "own",
		"http://origin.test/":                       "origin http://origin.test/",
		"http://" + lab.Origin4.String() + ":80/xy": "origin http://" + lab.Origin4.String() + "/xy",
	} {
		if body, err := w.fetch(w.Gateway, url); err != nil || body != want {
			t.Errorf("%s: %q, %v; want %q", url, body, err, want)
		}
	}
	g.stop()
	// Root, as which this test runs in its namespace.
	g = w.gateway("--output", "--output-exclude-user", "0")
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("of an excluded user: %q, %v", body, err)
	}
	if body, err := w.fetch(w.Client, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "origin ") {
		t.Errorf("of a client: %q, %v", body, err)
	}
	g.stop()
	g = w.gateway("--output", "--output-exclude-group", "0")
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("of an excluded group: %q, %v", body, err)
	}
	g.stop()
}

// TestOwnNames: the gateway's own questions are answered like its clients'.
func TestOwnNames(t *testing.T) {
	w := newDNSWorld(t)
	w.knows(map[string]netip.Addr{"own.public.test": lab.Origin4})
	w.gateway("--output", "--public-dns", public4.String())
	for _, transport := range []string{"udp", "tcp"} {
		for _, server := range anywhere {
			wantAnswer(t, w.Gateway, transport, server, "own.public.test", "A", fromPublic4)
		}
	}
}

// TestOwnProgramsFailClosed: nothing of them passes once the program was killed.
func TestOwnProgramsFailClosed(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--output", "--fail", "closed")
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "origin ") {
		t.Fatalf("%q, %v", body, err)
	}
	g.kill()
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err == nil {
		t.Errorf("after a kill: %q", body)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if conn, err := w.Gateway.Dial(ctx, "tcp", netip.AddrPortFrom(lab.Proxy4, lab.ProxyPort).String()); err != nil {
		t.Errorf("the proxy itself: %v", err)
	} else {
		conn.Close()
	}
	w.cleanUp()
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("after cleanup: %q, %v", body, err)
	}
}
