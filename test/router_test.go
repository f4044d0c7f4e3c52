package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// parameters are all that --gateway may change, as the kernel tells them.
func (w *world) parameters() string {
	w.t.Helper()
	var text strings.Builder
	must(w.t, w.Gateway.Do(func() error {
		for _, pattern := range []string{
			"ipv4/ip_forward", "ipv4/conf/*/forwarding", "ipv4/conf/*/accept_redirects", "ipv4/conf/*/send_redirects",
			"ipv6/conf/*/forwarding", "ipv6/conf/*/accept_ra", "ipv6/conf/*/accept_redirects",
		} {
			files, err := filepath.Glob("/proc/sys/net/" + pattern)
			if err != nil {
				return err
			}
			for _, file := range files {
				value, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				fmt.Fprintf(&text, "%s=%s", file, value)
			}
		}
		return nil
	}))
	return text.String()
}

// newHostWorld is a world whose gateway does not forward yet, with some parameters of
// its own.
func newHostWorld(t *testing.T) *world {
	w := newWorld(t)
	for _, s := range [][2]string{
		{"net.ipv4.ip_forward", "0"},
		{"net.ipv6.conf.all.forwarding", "0"},
		{"net.ipv4.conf.all.send_redirects", "1"},
		{"net.ipv4.conf.all.accept_redirects", "0"},
		{"net.ipv6.conf.wan0.forwarding", "1"},
		{"net.ipv4.conf.wan0.forwarding", "1"},
	} {
		must(t, w.Gateway.Sysctl(s[0], s[1]))
	}
	return w
}

// TestRouter: with --gateway the clients' direct traffic gets out, and comes back.
func TestRouter(t *testing.T) {
	w := newHostWorld(t)
	direct := []string{"--no-proxy", "203.0.113.0/24,2001:db8:3::/64"}
	if body, err := w.get("http://origin.test/"); err == nil {
		t.Fatalf("the gateway forwards before it is asked to: %q", body)
	}
	g := w.gateway(append(direct, "--gateway", "--state-dir", t.TempDir())...)
	for name, source := range map[string]netip.Addr{"origin.test": lab.Uplink4, "six.test": lab.Client6} {
		if body, err := w.get("http://" + name + "/"); err != nil || body != "direct http://"+name+"/" {
			t.Errorf("%s: %q, %v", name, body, err)
		}
		sources := w.direct.Sources()
		if len(sources) == 0 || sources[len(sources)-1].Addr() != source {
			t.Errorf("%s: the server saw %v and not %v", name, sources, source)
		}
	}
	// What is captured is as before.
	g.stop()
	g = w.gateway("--gateway", "--state-dir", t.TempDir())
	if body, err := w.get("http://origin.test/"); err != nil || body != "origin http://origin.test/" {
		t.Errorf("%q, %v", body, err)
	}
	g.stop()
}

// TestRouterIsUndone: all parameters come back, after a kill as well.
func TestRouterIsUndone(t *testing.T) {
	w := newHostWorld(t)
	before := w.parameters()
	state := t.TempDir()
	run := func() *gateway { return w.gateway("--gateway", "--state-dir", state) }
	same := func(when string) {
		t.Helper()
		if after := w.parameters(); after != before {
			t.Errorf("before:\n%s\n%s:\n%s", before, when, after)
		}
		if left, err := os.ReadDir(state); err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left, %v", when, left, err)
		}
	}
	g := run()
	if w.parameters() == before {
		t.Fatal("nothing has changed: the comparison is blind")
	}
	g.stop()
	same("after a stop")
	run().kill()
	if w.parameters() == before {
		t.Fatal("a kill undoes everything: the test is blind")
	}
	run().stop()
	same("after a kill, a start and a stop")
	run().kill()
	w.gateway("--state-dir", state).stop()
	same("after a kill, a start without --gateway and a stop")
	run().kill()
	if output, err := w.run(program("cleanup", "--state-dir", state)); err != nil {
		t.Fatalf("cleanup: %v: %s", err, output)
	}
	same("after a kill and cleanup")
	// Without the flag nothing is touched.
	g = w.gateway("--state-dir", state)
	same("without --gateway")
	g.stop()
}

// TestRouterIsShown: the rules command tells what would change.
func TestRouterIsShown(t *testing.T) {
	w := newHostWorld(t)
	output, err := w.run(program("rules", "--gateway"))
	must(t, err)
	for _, line := range []string{
		"# sysctl -w net.ipv4.ip_forward=1", "# sysctl -w net.ipv6.conf.all.forwarding=1", "# sysctl -w net.ipv4.conf.lan0.send_redirects=0",
		"masquerade", "maxseg size set rt mtu",
	} {
		if !strings.Contains(output, line) {
			t.Errorf("rules do not show %q", line)
		}
	}
}

// TestSegmentsFit: where the uplink is narrower than the client's network, servers are
// told so in the handshake.
func TestSegmentsFit(t *testing.T) {
	w := newHostWorld(t)
	must(t, w.Gateway.Sysctl("net.ipv6.conf.wan0.mtu", "1300"), w.Gateway.MTU("wan0", 1300))
	w.gateway("--gateway", "--state-dir", t.TempDir(), "--no-proxy", "203.0.113.0/24,2001:db8:3::/64")
	listener, err := w.Router.Listen("tcp", "[::]:9100")
	must(t, err)
	defer listener.Close()
	for address, headers := range map[netip.Addr]int{lab.Origin4: 40, lab.Origin6: 60} {
		client := w.dial(address, 9100)
		server, err := listener.Accept()
		must(t, err)
		raw, err := server.(*net.TCPConn).SyscallConn()
		must(t, err)
		var info *unix.TCPInfo
		must(t, raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }), err)
		if most := uint32(1300 - headers); info.Snd_mss > most {
			t.Errorf("%s: segments of %d bytes, want at most %d", address, info.Snd_mss, most)
		}
		server.Close()
		client.Close()
	}
}
