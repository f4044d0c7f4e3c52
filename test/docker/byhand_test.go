package docker

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// The network of the bridge, and the containers on it.
const (
	bridgeName   = "br-hand"
	bridgeSubnet = "172.30.9.0/24"
	bridge4      = "172.30.9.1/24"
	bridge6      = "2001:db8:d9::1/64"
)

// handmade is a container made by hand: a network namespace on the bridge and a root
// directory, in which the client has no settings but a resolv.conf.
type handmade struct {
	t       *testing.T
	ns      *netns.NS
	root    string
	address netip.Addr
}

// TestByHand is what an engine does for a container (a bridge, NAT, a published port
// and a resolver at 127.0.0.11), made by hand.
func TestByHand(t *testing.T) {
	for _, calls := range bridgeCalls {
		t.Run("bridge-nf-call-iptables="+calls, func(t *testing.T) {
			if calls == "1" && (os.Getuid() != 0 || !initialUserNamespace()) {
				t.Skip("BPF programs that choose the socket need root in the initial user namespace")
			}
			w := newWorld(t)
			one, two := w.handmade(t)
			if !setBridgeCalls(t, w.Gateway, calls) && calls == "1" {
				t.Skip("this kernel has no br_netfilter")
			}
			g := w.gateway(t)

			t.Run("outside", func(t *testing.T) {
				w.wantOutside(t, "outside", "public.test", one.client)
			})
			t.Run("outside over IPv6", func(t *testing.T) {
				w.wantOutside(t, "outside", "six.test", one.client)
			})
			t.Run("between containers", func(t *testing.T) {
				want(t, one.client, fmt.Sprintf("two serves two to %s\n", one.address), "fetch", "http://two/")
				want(t, two.client, fmt.Sprintf("one serves one to %s\n", two.address), "fetch", "http://one/")
				want(t, one.client, "two hears hello\n", "ask", netip.AddrPortFrom(two.address, 443).String())
			})
			t.Run("QUIC is refused", func(t *testing.T) { wantQUICRefused(t, one.client) })
			t.Run("published port", func(t *testing.T) {
				wantPublished(t, w.Neighbour, lab.Uplink4, "one", lab.Neighbour4.String())
				wantPublished(t, w.Client, lab.Gateway4, "one", lab.Client4.String())
				wantPublished(t, w.Client, lab.Uplink4, "one", lab.Client4.String())
			})
			g.stop()
			wantNoFlowTo(t, g, bridgeSubnet)
			w.wantNothingPast(t)
			t.Run("between containers after the stop", func(t *testing.T) {
				want(t, one.client, fmt.Sprintf("two serves two to %s\n", one.address), "fetch", "http://two/")
			})
			t.Run("all ports", func(t *testing.T) { testAllPorts(t, w, one) })
			t.Run("fail closed", func(t *testing.T) { testFailClosed(t, w, one) })
		})
	}
}

// testAllPorts: what is left to the kernel stays there if every port is captured, that of
// whoever connects to a published one included. The kernel's look-ups for nftables'
// "socket" ask a BPF program that chooses sockets as well, and it sees neither the
// direction of a flow nor what is exempt.
func testAllPorts(t *testing.T, w *world, one *handmade) {
	exempt := lab.Neighbour4.String()
	g := w.gateway(t, "--tcp-proxy-dports", "all", "--no-proxy", "corp.test,"+exempt)
	w.wantOutside(t, "all", "public.test", one.client)
	want(t, one.client, "intranet http://"+exempt+"/\n", "fetch", "http://"+exempt+"/")
	want(t, one.client, fmt.Sprintf("two serves two to %s\n", one.address), "fetch", "http://two/")
	wantPublished(t, w.Neighbour, lab.Uplink4, "one", lab.Neighbour4.String())
	wantPublished(t, w.Client, lab.Uplink4, "one", lab.Client4.String())
	g.stop()
	wantNoFlowTo(t, g, bridgeSubnet, exempt+"/32", lab.Client4.String()+"/32")
	w.wantNothingPast(t)
}

// testFailClosed: the guard of --fail closed refuses what a killed program does not
// capture, and only that.
func testFailClosed(t *testing.T, w *world, one *handmade) {
	g := w.gateway(t, "--fail", "closed")
	w.wantOutside(t, "guarded", "public.test", one.client)
	between := func() {
		t.Helper()
		want(t, one.client, fmt.Sprintf("two serves two to %s\n", one.address), "fetch", "http://two/")
		want(t, one.client, "two hears hello\n", "ask", "172.30.9.12:443")
		wantPublished(t, w.Neighbour, lab.Uplink4, "one", lab.Neighbour4.String())
	}
	between()
	g.command.Process.Kill()
	<-g.ended
	between()
	if output, err := one.client("fetch", "https://"+lab.Origin4.String()+"/"); err == nil || !strings.Contains(output, "refused") {
		t.Errorf("outside, while nobody captures: %v\n%s", err, output)
	}
	w.wantNothingPast(t)
	cleanup := exec.Command(binary("transproxy-tproxy"), "cleanup")
	must(t, w.Gateway.Do(cleanup.Run))
}

// handmade makes two containers that know each other by name, of which the first has
// its port 80 published.
func (w *world) handmade(t *testing.T) (one, two *handmade) {
	t.Helper()
	one = w.newHandmade(t, "one", "172.30.9.11", "2001:db8:d9::11")
	two = w.newHandmade(t, "two", "172.30.9.12", "2001:db8:d9::12")
	must(t,
		w.Gateway.Bridge(bridgeName, "veth-one", "veth-two"),
		w.Gateway.Addr(bridgeName, bridge4, bridge6),
		natLikeDocker(w.Gateway, bridgeName, netip.MustParsePrefix(bridgeSubnet), one.address))
	for name, c := range map[string]*handmade{"one": one, "two": two} {
		must(t, c.ns.Route("0.0.0.0/0", "172.30.9.1"), c.ns.Route("::/0", "2001:db8:d9::1"))
		c.background("serve", name)
		c.background("resolver", "127.0.0.11:53", hostServer, "one="+one.address.String(), "two="+two.address.String())
	}
	return one, two
}

func (w *world) newHandmade(t *testing.T, name, ipv4, ipv6 string) *handmade {
	t.Helper()
	ns, err := netns.New()
	must(t, err)
	t.Cleanup(func() { ns.Close() })
	c := &handmade{t: t, ns: ns, root: t.TempDir(), address: netip.MustParseAddr(ipv4)}
	must(t,
		netns.Connect(ns, "eth0", w.Gateway, "veth-"+name),
		ns.Addr("eth0", ipv4+"/24", ipv6+"/64"))
	w.writeRoot(t, c.root)
	must(t, os.WriteFile(filepath.Join(c.root, "etc/resolv.conf"), []byte("nameserver 127.0.0.11\n"), 0o644))
	return c
}

// command is the client in the container.
func (c *handmade) command(ctx context.Context, arguments ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, "/bin/client", arguments...)
	command.Dir, command.Env = "/", []string{"PATH=/bin"}
	command.SysProcAttr = &syscall.SysProcAttr{Chroot: c.root}
	return command
}

func (c *handmade) background(arguments ...string) {
	c.t.Helper()
	background(c.t, c.ns, c.command(context.Background(), arguments...)).waitFor("ready")
}

// client is a container.
func (c *handmade) client(arguments ...string) (output string, err error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	err = c.ns.Do(func() error {
		text, err := c.command(ctx, arguments...).CombinedOutput()
		output = string(text)
		return err
	})
	return output, err
}

// wantQUICRefused wants datagrams to the public network's port 443 to be refused, and
// not to be lost.
func wantQUICRefused(t *testing.T, client container) {
	t.Helper()
	output, err := client("ask", netip.AddrPortFrom(lab.Origin4, 443).String())
	if err == nil || !strings.Contains(output, "refused") {
		t.Errorf("%v: %s", err, output)
	}
}

// wantPublished wants a host to reach a container at the Docker host's port 80, and the
// container to see the host's own address.
func wantPublished(t *testing.T, outside *netns.NS, dockerHost netip.Addr, name, source string) {
	t.Helper()
	host := netip.AddrPortFrom(dockerHost, 80).String()
	if dockerHost.Is4() {
		host = dockerHost.String()
	}
	text := fmt.Sprintf("%s serves %s to %s\n", name, host, source)
	if body, err := get(t, outside, "http://"+host+"/"); err != nil || body != text {
		t.Errorf("%s: %v\n%q and not\n%q", host, err, body, text)
	}
}
