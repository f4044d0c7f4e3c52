package test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// kernelState is what the program may have changed, as the kernel tells it: the
// rules and routes of both families, and its BPF programs where those can be had.
// Tables of nftables are looked at where nft is at hand, in the interop tests.
func (w *world) kernelState() string {
	w.t.Helper()
	var text strings.Builder
	must(w.t, w.Gateway.Do(func() error { return describeRouting(&text) }))
	if initialUserNamespace() {
		must(w.t, w.Gateway.Do(func() error { return describePrograms(&text) }))
	}
	return text.String()
}

// describePrograms tells of the BPF programs that look up sockets in the current namespace; other hosts' are none of a
// test's. The kernel frees one a moment after its last user is gone.
func describePrograms(text *strings.Builder) error {
	time.Sleep(20 * time.Millisecond)
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer namespace.Close()
	attached, err := link.QueryPrograms(link.QueryOptions{Target: int(namespace.Fd()), Attach: ebpf.AttachSkLookup})
	if err != nil {
		return err
	}
	for _, program := range attached.Programs {
		fmt.Fprintln(text, "sk_lookup program", program.ID)
	}
	return nil
}

func TestStopUndoesEverything(t *testing.T) {
	w := newWorld(t)
	before := w.kernelState()
	for _, fail := range []string{"open", "closed"} {
		g := w.gateway("--fail", fail)
		if w.kernelState() == before {
			t.Fatal("a running gateway has changed nothing: the comparison is blind")
		}
		g.stop()
		if after := w.kernelState(); after != before {
			t.Errorf("before:\n%s\nafter a stop:\n%s", before, after)
		}
		if body, err := w.get("http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
			t.Errorf("after a stop the client is still captured: %q, %v", body, err)
		}
	}
}

// TestKill: with --fail open the client's flows go straight on; with closed they
// are reset; the next start and stop, or cleanup, leaves nothing.
func TestKill(t *testing.T) {
	for _, test := range []struct {
		fail  string
		sweep func(*world)
	}{
		{"open", func(w *world) { w.gateway().stop() }},
		{"open", func(w *world) { w.cleanUp() }},
		{"closed", func(w *world) { w.gateway("--fail", "closed").stop() }},
		{"closed", func(w *world) { w.cleanUp() }},
	} {
		t.Run(test.fail, func(t *testing.T) {
			w := newWorld(t)
			before := w.kernelState()
			g := w.gateway("--fail", test.fail)
			running := w.dial(lab.Origin4, 22)
			if _, err := io.ReadFull(running, make([]byte, len(lab.Banner))); err != nil {
				t.Fatal(err)
			}
			g.kill()
			wantReset(t, running, time.Second)

			for _, address := range both {
				got, err := banner(t, w.Client, address, 22)
				open := got == lab.Banner
				if test.fail == "open" && !open {
					t.Errorf("open: %s: %q, %v", address, got, err)
				}
				if test.fail == "closed" && open {
					t.Errorf("closed: the flow to %s passed", address)
				}
			}
			if leaked := len(w.direct.Sources()); test.fail == "closed" && leaked > 0 {
				t.Errorf("%d connections leaked", leaked)
			}
			test.sweep(w)
			if after := w.kernelState(); after != before {
				t.Errorf("before:\n%s\nafter the sweep:\n%s", before, after)
			}
			if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
				t.Errorf("after the sweep: %q, %v", got, err)
			}
		})
	}
}

// cleanUp runs the command of that name.
func (w *world) cleanUp() {
	w.t.Helper()
	command := program("cleanup")
	if output, err := w.run(command); err != nil {
		w.t.Fatalf("cleanup: %v: %s", err, output)
	}
}

// run runs a command on the gateway.
func (w *world) run(command *exec.Cmd) (string, error) {
	var output []byte
	err := w.Gateway.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	return string(output), err
}

// TestRunningFlowsSurviveAStop: for as long as the drain time lets them.
func TestRunningFlowsSurviveAStop(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--drain-timeout", "5s")
	conn := w.dial(lab.Origin4, 22)
	if _, err := io.ReadFull(conn, make([]byte, len(lab.Banner))); err != nil {
		t.Fatal(err)
	}
	must(t, g.command.Process.Signal(syscall.SIGTERM))
	g.waitFor("stopping")
	time.Sleep(200 * time.Millisecond)
	io.WriteString(conn, "still here")
	if _, err := io.ReadFull(conn, make([]byte, len("still here"))); err != nil {
		t.Errorf("the running flow: %v", err)
	}
	if got, err := banner(t, w.Client, lab.Origin6, 22); got != lab.Banner || len(w.direct.Sources()) != 1 {
		t.Errorf("a new flow while it drains: %q, %v", got, err)
	}
	conn.CloseWrite()
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("the end of the running flow: %v", err)
	}
	g.wait(2 * time.Second)
	if g.err != nil {
		t.Errorf("stop: %v", g.err)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--drain-timeout", "1m")
	conn := w.dial(lab.Origin4, 22)
	if _, err := io.ReadFull(conn, make([]byte, len(lab.Banner))); err != nil {
		t.Fatal(err)
	}
	must(t, g.command.Process.Signal(syscall.SIGINT))
	g.waitFor("stopping")
	time.Sleep(100 * time.Millisecond)
	must(t, g.command.Process.Signal(syscall.SIGTERM))
	g.wait(time.Second)
	if g.err == nil {
		t.Error("it ended as if all had been undone")
	}
}

// TestInterfacesThatAppearLater are captured, and their networks with them.
func TestInterfacesThatAppearLater(t *testing.T) {
	w := newWorld(t)
	g := w.gateway()
	late, err := netns.New()
	must(t, err)
	t.Cleanup(func() { late.Close() })
	must(t,
		netns.Connect(late, "eth0", w.Gateway, "late0"),
		late.Addr("eth0", "192.0.3.2/24", "2001:db8:4::2/64"),
		w.Gateway.Addr("late0", "192.0.3.1/24", "2001:db8:4::1/64"),
		late.Route("0.0.0.0/0", "192.0.3.1"), late.Route("::/0", "2001:db8:4::1"),
	)
	for i, address := range both {
		if !within(3*time.Second, func() bool {
			got, _ := banner(t, late, address, 22)
			return got == lab.Banner && len(w.proxy.Targets()) > i
		}) {
			t.Errorf("a client on a new interface is not captured to %s; the gateway said\n%s", address, g.output)
		}
	}
}

// TestMistakes: each ends with one line that names the value and what to do.
func TestMistakes(t *testing.T) {
	w := newWorld(t)
	before := w.kernelState()
	for _, test := range []struct {
		name      string
		arguments []string
		names     []string // what the line has to contain
	}{
		{"no upstream", nil, []string{"--upstream", "https_proxy"}},
		{"scheme", []string{"--upstream", "ftp://x"}, []string{"--upstream", "ftp", "http://"}},
		{"port", []string{"-tcp-proxy-dports", "99999"}, []string{"--tcp-proxy-dports", "99999", "65535"}},
		{"flag", []string{"--upstram", "http://x"}, []string{"--upstram", "--upstream"}},
		{"command", []string{"rnu"}, []string{"rnu", "run"}},
		{"no_proxy", []string{"--upstream", "http://x", "--no-proxy", "10.0.0.0/33"}, []string{"--no-proxy", "10.0.0.0/33"}},
		{"explicit address", []string{"-explicit-proxy-listen", ":31320000"}, []string{"--explicit-proxy-listen", ":31320000", "or off"}},
		{
			"nothing to serve",
			[]string{"--upstream", "http://192.0.2.1:3128", "-explicit-proxy-only", "-explicit-proxy-listen=off", "-explicit-proxy-with-auth-listen=off"},
			[]string{"--explicit-proxy-only", "--explicit-proxy-listen"},
		},
		{"https is no plain HTTP", []string{"--http-ports", "80,443"}, []string{"--http-ports", "443"}},
		{"DNS server", []string{"--upstream", "http://x", "--private-dns", "dns.test"}, []string{"--private-dns", "dns.test", "192.168.0.100"}},
		{"no DNS way", []string{"--upstream", "http://x", "--dns-proxy-listen", ":53"}, []string{"--dns-proxy-listen", "--public-dns"}},
		{"level", []string{"--loglevel", "loud"}, []string{"--loglevel", "loud", "debug"}},
		{"fail", []string{"--fail", "safe"}, []string{"--fail", "safe", "open", "closed"}},
		{"mark", []string{"--mark", "7x"}, []string{"--mark", "7x", "0x07000000"}},
		{"clients", []string{"--allow-clients", "192.168.1"}, []string{"--allow-clients", "192.168.1", "192.168.1.0/24"}},
		{"listener", []string{"--tcp-proxy-listen", "0.0.0.0:3128"}, []string{"--tcp-proxy-listen", "0.0.0.0:3128", "loopback"}},
		{"table", []string{"--upstream", "http://x", "--nft-table", "a b"}, []string{"--nft-table", "a b"}},
		{"interface", []string{"--upstream", "http://x", "--interface", "an-interface-name-too-long"}, []string{"an-interface-name-too-long", "interface"}},
		{"routing table", []string{"--upstream", "http://x", "--table", "254"}, []string{"--table", "254"}},
		{"routing table of rules", []string{"rules", "--table", "254"}, []string{"--table", "254"}},
		{"command behind flags", []string{"--upstream", "http://x", "rules"}, []string{"rules", "first"}},
		{"source", []string{"--upstream", "http://x", "--upstream-source", "192.0.2.77"}, []string{"--upstream-source", "192.0.2.77"}},
		{"value missing", []string{"--upstream"}, []string{"--upstream", "value"}},
		{"access log", []string{"--upstream", "http://x", "--access-log", "/nowhere/log"}, []string{"--access-log", "/nowhere/log"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			output, err := w.run(program(test.arguments...))
			if err == nil {
				t.Fatal("it succeeded")
			}
			wantOneLine(t, output, test.names...)
		})
	}
	if after := w.kernelState(); after != before {
		t.Errorf("a mistake changed the kernel:\n%s\nwas\n%s", after, before)
	}
}

// wantOneLine wants one line with all of these words.
func wantOneLine(t *testing.T, output string, words ...string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(output), "\n")
	if len(lines) != 1 {
		t.Errorf("not one line: %q", output)
	}
	for _, word := range words {
		if !strings.Contains(lines[0], word) {
			t.Errorf("%q does not say %q", lines[0], word)
		}
	}
}

func TestSecondInstanceIsRefused(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	during := w.kernelState()
	for _, arguments := range [][]string{
		{"--upstream", upstream()},
		{"--upstream", upstream(), "--nft-table", "other", "--tcp-proxy-listen", "15002"},
		{"cleanup"},
		{"cleanup", "--nft-table", "other"},
	} {
		output, err := w.run(program(arguments...))
		if err == nil {
			t.Fatalf("%v succeeded", arguments)
		}
		wantOneLine(t, output, "instance")
	}
	if w.kernelState() != during {
		t.Error("the second instance changed what the first one had installed")
	}
	if body, err := w.get("https://origin.test/"); err != nil {
		t.Errorf("the first instance: %q, %v", body, err)
	}
}

func TestTakenPortIsNamed(t *testing.T) {
	w := newWorld(t)
	listener, err := w.Gateway.Listen("tcp", "127.0.0.1:15001")
	must(t, err)
	defer listener.Close()
	before := w.kernelState()
	output, err := w.run(program("--upstream", upstream()))
	if err == nil {
		t.Fatal("it succeeded")
	}
	wantOneLine(t, output, "127.0.0.1:15001", "taken", "--tcp-proxy-listen")
	if w.kernelState() != before {
		t.Error("something was left behind")
	}
	w.gateway("--tcp-proxy-listen", ":15002")
	if body, err := w.get("https://origin.test/"); err != nil {
		t.Errorf("on another port: %q, %v", body, err)
	}
}

// TestClashesAreNamed: what another program holds in the kernel, and how to step aside.
func TestClashesAreNamed(t *testing.T) {
	w := newWorld(t)
	must(t, w.Gateway.Do(addForeignRule))
	output, err := w.run(program("--upstream", upstream()))
	if err == nil {
		t.Fatal("it succeeded")
	}
	wantOneLine(t, output, "4219", "--rule-priority")
	w.gateway("--rule-priority", "5000", "--table", "5000", "--mark", "0x700", "--nft-table", "other")
	if body, err := w.get("https://origin.test/"); err != nil {
		t.Errorf("with other numbers: %q, %v", body, err)
	}
}

func TestWithoutPrivilege(t *testing.T) {
	w := newWorld(t)
	command := program("--upstream", upstream())
	// Not a capability of the namespace's owner is left to it.
	command.SysProcAttr.AmbientCaps = nil
	command.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
	output, err := w.run(command)
	if err == nil {
		t.Fatal("it succeeded")
	}
	wantOneLine(t, output, "CAP_NET_ADMIN", "root")
}

// TestDisableIptables: the ancestor's switch installs nothing and prints what to install.
func TestDisableIptables(t *testing.T) {
	w := newWorld(t)
	before := w.kernelState()
	g := w.gateway("-disable-iptables", "-https-proxy-listen", ":3130")
	if w.kernelState() != before {
		t.Error("it changed the kernel")
	}
	for _, text := range []string{"table inet transproxy", "ip rule add", "--https-proxy-listen has no effect"} {
		if !strings.Contains(g.output.String(), text) {
			t.Errorf("it did not say %q", text)
		}
	}
	if body, err := w.get("http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("it captures: %q, %v", body, err)
	}
}

// TestLogWithoutReader: the program outlives the readers of both logs, and counts on.
func TestLogWithoutReader(t *testing.T) {
	w := newWorld(t)
	reader, writer, err := os.Pipe()
	must(t, err)
	reader.Close()
	defer writer.Close()
	command := program("--upstream", upstream())
	command.Stdout = writer
	g := start(t, w.Gateway, command)
	g.waitFor(`"message":"ready"`)
	for range 3 {
		if _, err := w.get("https://origin.test/"); err != nil {
			t.Fatal(err)
		}
	}
	g.waitFor("lines of the access log are lost")
	g.stop()
}

// TestOneAccountIsRefusedOnce, though it stands in two variables.
func TestOneAccountIsRefusedOnce(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Password = "changed" })
	command := program()
	command.Env = append(command.Env, "https_proxy="+upstream(), "http_proxy="+upstream()+"/")
	start(t, w.Gateway, command).waitFor(`"message":"ready"`)
	w.wantRefusal(lab.Origin4, 22, time.Second)
	if body, err := w.get("http://origin.test/"); err == nil && strings.HasPrefix(body, "origin") {
		t.Error("a refused credential is of use")
	}
	if n := w.proxy.Refused(); n != 1 {
		t.Errorf("%d refusals and not one", n)
	}
}

func TestHelp(t *testing.T) {
	w := newWorld(t)
	for _, arguments := range [][]string{{"--help"}, {"-h"}, {"help"}, {"run", "--help"}} {
		output, err := w.run(program(arguments...))
		if err != nil || !strings.Contains(output, "--upstream URL") || !strings.Contains(output, "demo") {
			t.Errorf("%v: %v: %q", arguments, err, output)
		}
	}
}

// TestEnvironment: variables of other programs, and each flag's own.
func TestEnvironment(t *testing.T) {
	for _, test := range []struct {
		name string
		env  []string
		way  string
	}{
		{"https_proxy", []string{"https_proxy=" + upstream()}, "origin"},
		{"upper case", []string{"HTTPS_PROXY=" + upstream()}, "origin"},
		{"http_proxy for all", []string{"http_proxy=" + upstream()}, "origin"},
		{"port 80 prefers http_proxy", []string{"https_proxy=http://192.0.2.200:1", "http_proxy=" + upstream()}, "origin"},
		{"own variable", []string{"TRANSPROXY_UPSTREAM=" + upstream(), "https_proxy=ftp://nonsense"}, "origin"},
		{"no_proxy", []string{"https_proxy=" + upstream(), "no_proxy=origin.test"}, "direct"},
		{"NO_PROXY", []string{"https_proxy=" + upstream(), "NO_PROXY=" + lab.Origin4.String()}, "direct"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			command := program()
			command.Env = append(command.Env, test.env...)
			start(t, w.Gateway, command).waitFor(`"message":"ready"`)
			if body, err := w.get("http://origin.test/"); err != nil || !strings.HasPrefix(body, test.way) {
				t.Errorf("%q, %v; want %s", body, err, test.way)
			}
		})
	}
}

// describeRouting writes all rules and routes of the current namespace.
func describeRouting(w io.Writer) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return err
		}
		for _, rule := range rules {
			fmt.Fprintln(w, rule, rule.Protocol)
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, route := range routes {
			if route.Protocol == unix.RTPROT_KERNEL {
				continue // they come by themselves as links settle
			}
			fmt.Fprintln(w, route, route.Protocol)
		}
	}
	return nil
}

// addForeignRule puts another program's rule where ours would go.
func addForeignRule() error {
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table, rule.Protocol = netlink.FAMILY_V4, 4219, 254, 77
	_, rule.Src, _ = net.ParseCIDR("10.99.0.0/16")
	return netlink.RuleAdd(rule)
}
