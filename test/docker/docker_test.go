//go:build docker

package docker

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestEngine is a Docker host with the program beside a real engine, which knows nothing
// of it.
func TestEngine(t *testing.T) {
	skipWithoutEngine(t)
	for _, calls := range bridgeCalls {
		t.Run("bridge-nf-call-iptables="+calls, func(t *testing.T) {
			w := newWorld(t)
			// As Docker finds a host: it switches forwarding on and makes DROP the policy.
			must(t, w.Gateway.Sysctl("net.ipv4.ip_forward", "0"))
			e := startEngine(t, w)
			if !setBridgeCalls(t, w.Gateway, calls) && calls == "1" {
				t.Skip("this kernel has no br_netfilter")
			}
			e.buildBase(t)
			// What is there before the program starts, and stays.
			web := e.serving(t, "web", "--publish", "80:80")
			e.network(t, "standing")
			e.serving(t, "standing", "--network", "standing")

			before := e.state(t)
			g := w.gateway(t)
			t.Run("build", func(t *testing.T) { testBuild(t, e, classicBuilder) })
			t.Run("BuildKit", func(t *testing.T) { testBuild(t, e, buildKit) })
			t.Run("default bridge", func(t *testing.T) { testDefaultBridge(t, e) })
			t.Run("user-defined network", func(t *testing.T) { testUserDefinedNetwork(t, e) })
			t.Run("networks made before the start", func(t *testing.T) {
				w.wantOutside(t, "before", "public.test", web)
				w.wantOutside(t, "standing", "public.test", e.inside(t, "standing"))
			})
			t.Run("between networks", func(t *testing.T) { testIsolation(t, e, web) })
			t.Run("published port", func(t *testing.T) { testPublishedPort(t, e) })
			t.Run("compose", func(t *testing.T) { testCompose(t, e) })
			t.Run("IPv6 network", func(t *testing.T) { testIPv6Network(t, e) })
			t.Run("QUIC is refused", func(t *testing.T) { wantQUICRefused(t, web) })
			t.Run("no proxy variable", func(t *testing.T) { wantNoProxyVariables(t, e) })
			t.Run("Docker's own while the program runs", func(t *testing.T) {
				during := e.state(t)
				for _, view := range dockersOwn {
					wantSame(t, view, before, during)
				}
			})
			g.stop()
			wantNoFlowTo(t, g, containerNetworks...)
			t.Run("all of it after the stop", func(t *testing.T) {
				after := e.state(t)
				for view := range before {
					wantSame(t, view, before, after)
				}
				wantPublished(t, w.Neighbour, lab.Uplink4, "web", lab.Neighbour4.String())
			})
			w.wantNothingPast(t)
			t.Run("one interface", func(t *testing.T) { testOneInterface(t, e) })
			t.Run("resolver of the host", func(t *testing.T) { testHostResolver(t, e) })
		})
	}
}

// testBuild: a step of a build that fetches by name, as nearly every Dockerfile has one.
func testBuild(t *testing.T, e *engine, builder string) {
	name := e.world.name(strings.ToLower(filepath.Base(t.Name())), "public.test")
	output := e.build(t, builder, t.TempDir(), "transproxy-test-built", strings.Join([]string{
		"FROM " + baseImage,
		"RUN client fetch https://" + name + "/secure http://" + name + "/plain >/tmp/fetched && env >/tmp/environment",
	}, "\n")+"\n")
	t.Cleanup(func() { e.docker(t, "rmi", "--force", "transproxy-test-built") })
	fetched := e.docker(t, "run", "--rm", "transproxy-test-built", "cat", "/tmp/fetched", "/tmp/environment")
	if !strings.HasPrefix(fetched, fmt.Sprintf("origin https://%s/secure\norigin http://%s/plain\n", name, name)) {
		t.Errorf("the step fetched %q\n%s", fetched, output)
	}
	if found := proxyVariable.FindString(fetched); found != "" {
		t.Errorf("the step had %s", found)
	}
	e.world.wantProxied(t, name)
}

// testDefaultBridge: containers ask the host's name server, or one of their own.
func testDefaultBridge(t *testing.T, e *engine) {
	e.world.wantOutside(t, "bridge", "public.test", e.once(t))
	e.world.wantOutside(t, "bridge-dns", "public.test", e.once(t, "--dns", runServer))
}

// testUserDefinedNetwork: there the containers' name server is Docker's, at 127.0.0.11.
func testUserDefinedNetwork(t *testing.T, e *engine) {
	e.network(t, "user-defined")
	one := e.serving(t, "one", "--network", "user-defined")
	two := e.serving(t, "two", "--network", "user-defined", "--dns", runServer)
	if resolvers := e.docker(t, "exec", "one", "cat", "/etc/resolv.conf"); !strings.Contains(resolvers, "nameserver 127.0.0.11") {
		t.Errorf("this is not Docker's name server: %s", resolvers)
	}
	e.world.wantOutside(t, "user-defined", "public.test", one)
	e.world.wantOutside(t, "user-defined-dns", "public.test", two)
	wantBetween(t, e, "user-defined", "one", one, "two")
	wantBetween(t, e, "user-defined", "two", two, "one")
}

// wantBetween wants a container to reach another by its name, at a port that is
// captured, and as itself.
func wantBetween(t *testing.T, e *engine, network, from string, client container, to string) {
	t.Helper()
	want(t, client, fmt.Sprintf("%s serves %s to %s\n", to, to, e.address(t, from, network)), "fetch", "http://"+to+"/")
	want(t, client, to+" hears hello\n", "ask", netip.AddrPortFrom(netip.MustParseAddr(e.address(t, to, network)), 443).String())
}

// testIsolation: Docker keeps networks apart, and the gateway is no way around that.
func testIsolation(t *testing.T, e *engine, client container) {
	address := e.address(t, "standing", "standing")
	if output, err := client("fetch", "http://"+address+"/"); err == nil {
		t.Errorf("a container reaches one of another network: %s", output)
	}
	if targets := slices.Concat(e.world.proxy.Targets(), e.world.proxy.Requests()); strings.Contains(strings.Join(targets, " "), address) {
		t.Errorf("the proxy was asked for a container: %q", targets)
	}
}

// testPublishedPort: from the uplink, from a network whose clients are captured, over
// IPv6, and from a container, all at a port that is captured.
func testPublishedPort(t *testing.T, e *engine) {
	wantPublished(t, e.world.Neighbour, lab.Uplink4, "web", lab.Neighbour4.String())
	wantPublished(t, e.world.Client, lab.Gateway4, "web", lab.Client4.String())
	wantPublished(t, e.world.Client, lab.Uplink4, "web", lab.Client4.String())
	// Without NAT for IPv6, Docker's own proxy on the host carries it.
	if body, err := get(t, e.world.Neighbour, "http://["+lab.Uplink6.String()+"]/"); err != nil || !strings.HasPrefix(body, "web serves ") {
		t.Errorf("over IPv6: %v\n%s", err, body)
	}
	output, err := e.once(t)("fetch", "http://"+lab.Uplink4.String()+"/")
	if err != nil || !strings.HasPrefix(output, "web serves "+lab.Uplink4.String()+" to ") {
		t.Errorf("from a container: %v\n%s", err, output)
	}
}

const composeFile = `version: "3"
services:
  one:
    image: ` + baseImage + `
    command: ["client", "serve", "one"]
  two:
    image: ` + baseImage + `
    command: ["client", "serve", "two"]
    depends_on: [one]
`

// testCompose: two services on the network that compose makes for them.
func testCompose(t *testing.T, e *engine) {
	directory := t.TempDir()
	must(t, os.WriteFile(filepath.Join(directory, "docker-compose.yml"), []byte(composeFile), 0o644))
	compose := func(arguments ...string) (string, error) {
		project := []string{"--project-name", "composed", "--project-directory", directory, "--file", filepath.Join(directory, "docker-compose.yml")}
		return e.run(t, "docker-compose", append(project, arguments...)...)
	}
	t.Cleanup(func() {
		if output, err := compose("down", "--timeout", "1"); err != nil {
			t.Errorf("docker-compose down: %v\n%s", err, output)
		}
	})
	if output, err := compose("up", "--detach"); err != nil {
		t.Fatalf("docker-compose up: %v\n%s", err, output)
	}
	for from, to := range map[string]string{"one": "two", "two": "one"} {
		client := func(arguments ...string) (string, error) {
			return compose(append([]string{"exec", "-T", from, "client"}, arguments...)...)
		}
		e.world.wantOutside(t, "composed-"+from, "public.test", client)
		if output, err := client("fetch", "http://"+to+"/"); err != nil || !strings.HasPrefix(output, to+" serves "+to+" to ") {
			t.Errorf("%s from %s: %v\n%s", to, from, err, output)
		}
	}
	wantNoProxyVariables(t, e)
}

// testIPv6Network: names that have IPv6 addresses only, and a name server reached over
// IPv6.
func testIPv6Network(t *testing.T, e *engine) {
	e.network(t, "six", "--ipv6", "--subnet", "2001:db8:d6::/64")
	six := e.serving(t, "six", "--network", "six")
	e.world.wantOutside(t, "network", "six.test", six)
	// Docker's own name server may not ask others over IPv6: nslookup does.
	name := e.world.name("asked", "six.test")
	if output := e.docker(t, "exec", "six", "nslookup", "-type=aaaa", name, runServer6); !strings.Contains(output, lab.Origin6.String()) {
		t.Errorf("%s says of %s: %s", runServer6, name, output)
	}
	other := e.serving(t, "other", "--network", "six")
	address := e.docker(t, "inspect", "--format", "{{.NetworkSettings.Networks.six.GlobalIPv6Address}}", "six")
	if output, err := other("fetch", "http://["+address+"]/"); err != nil || !strings.HasPrefix(output, "six serves ") {
		t.Errorf("between containers: %v\n%s", err, output)
	}
}

// testOneInterface: with --interface, the networks that it does not name are left alone.
func testOneInterface(t *testing.T, e *engine) {
	g := e.world.gateway(t, "--interface", "docker0")
	e.world.wantOutside(t, "docker0", "public.test", e.inside(t, "web"))
	if output := e.docker(t, "exec", "standing", "nslookup", "-type=a", e.world.name("left", "public.test")); !strings.Contains(output, pastAddress) {
		t.Errorf("the other network's questions are answered: %s", output)
	}
	g.stop()
}

// testHostResolver: where the host's resolv.conf names a server on the host itself,
// Docker's name server asks that one from the host's network, and so does that one ask
// its own. Everywhere else it asks from the container's, and needs no flag.
func testHostResolver(t *testing.T, e *engine) {
	e.setResolvers(t, "127.0.0.1")
	e.network(t, "resolved")

	t.Run("DNS listener", func(t *testing.T) {
		g := e.world.gateway(t, "--dns-proxy-listen", "127.0.0.1:53")
		e.world.wantOutside(t, "listener", "public.test", e.once(t, "--network", "resolved"))
		// On the default bridge, Docker says 8.8.8.8 instead.
		e.world.wantOutside(t, "eights", "public.test", e.once(t))
		g.stop()
	})
	t.Run("output", func(t *testing.T) {
		stub := exec.Command(binary("client"), "resolver", "127.0.0.1:53", runServer)
		background(t, e.world.Gateway, stub).waitFor("ready")
		g := e.world.gateway(t, "--output")
		e.world.wantOutside(t, "output", "public.test", e.once(t, "--network", "resolved"))
		// Docker's proxy for published ports is a program of the host as well.
		wantPublished(t, e.world.Gateway, netip.MustParseAddr("127.0.0.1"), "web", "172.30.0.1")
		if body, err := get(t, e.world.Neighbour, "http://["+lab.Uplink6.String()+"]/"); err != nil || !strings.HasPrefix(body, "web serves ") {
			t.Errorf("published over IPv6: %v\n%s", err, body)
		}
		g.stop()
	})
}

// proxyVariable matches a variable that tells a program of a proxy.
var proxyVariable = regexp.MustCompile(`(?mi)^[a-z]+_proxy=.*`)

// wantNoProxyVariables looks at all containers and images that there are.
func wantNoProxyVariables(t *testing.T, e *engine) {
	t.Helper()
	for _, name := range strings.Fields(e.docker(t, "ps", "--quiet")) {
		if found := proxyVariable.FindString(e.docker(t, "exec", name, "env")); found != "" {
			t.Errorf("container %s has %s", name, found)
		}
	}
	images := strings.Fields(e.docker(t, "images", "--quiet"))
	settings := e.docker(t, append([]string{"inspect", "--format", `{{range .Config.Env}}{{println .}}{{end}}`}, images...)...)
	if found := proxyVariable.FindString(settings); found != "" {
		t.Errorf("an image has %s", found)
	}
}

// dockersOwn are the views of the state in which the program has no part while it runs.
var dockersOwn = []string{"iptables-save", "ip6tables-save", "containers", "networks", "net.bridge.bridge-nf-call-iptables"}

var (
	stamps   = regexp.MustCompile(`(?m)^#.*\n`)
	counters = regexp.MustCompile(`\[\d+:\d+\]`)
)

// state is what the Docker host has, by view: a command, or a kernel parameter.
func (e *engine) state(t *testing.T) map[string]string {
	t.Helper()
	views := make(map[string]string)
	for _, line := range []string{
		"iptables-save", "ip6tables-save", "nft --stateless list ruleset",
		"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all",
	} {
		fields := strings.Fields(line)
		command := exec.Command(fields[0], fields[1:]...)
		var output []byte
		must(t, e.world.Gateway.Do(func() (err error) {
			output, err = command.Output()
			return err
		}))
		views[line] = counters.ReplaceAllString(stamps.ReplaceAllString(string(output), ""), "")
	}
	for _, key := range []string{
		"net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables",
		"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding",
	} {
		value, err := e.world.Gateway.ReadSysctl(key)
		must(t, err)
		views[key] = value
	}
	views["containers"] = e.docker(t, "ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Image}} {{.State}} {{.Ports}}")
	networks := strings.Fields(e.docker(t, "network", "ls", "--quiet"))
	slices.Sort(networks)
	views["networks"] = e.docker(t, append([]string{"network", "inspect"}, networks...)...)
	return views
}

func wantSame(t *testing.T, view string, before, after map[string]string) {
	t.Helper()
	if before[view] != after[view] {
		t.Errorf("%s was\n%s\nand is\n%s", view, before[view], after[view])
	}
}
