//go:build interop

package interop

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// room is a mount namespace on the gateway, in which a firewall's files are its own.
type room struct {
	*world
	holder *process
	env    []string
}

// newRoom runs prepare in a new room, which stays until the end of the test.
func (w *world) newRoom(prepare string, env ...string) *room {
	w.t.Helper()
	command := exec.Command("unshare", "-m", "sh", "-c", prepare+"\necho prepared\nexec sleep 600")
	command.Env = append([]string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}, env...)
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	r := &room{world: w, holder: background(w.t, w.Gateway, command), env: env}
	w.t.Cleanup(func() { syscall.Kill(-command.Process.Pid, syscall.SIGKILL) }) // and what it has started
	r.holder.waitFor("prepared")
	return r
}

// inside are the arguments of nsenter that run a command in the room.
func (r *room) inside(command ...string) []string {
	arguments := []string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", r.holder.command.Process.Pid), "env"}
	return slices.Concat(arguments, r.env, command)
}

// shell runs a line in the room.
func (r *room) shell(line string) (string, error) {
	return run(r.t, r.Gateway, "nsenter", r.inside("sh", "-c", line)...)
}

func (r *room) mustShell(line string) {
	r.t.Helper()
	if output, err := r.shell(line); err != nil {
		r.t.Fatalf("%s: %v: %s", line, err, output)
	}
}

// carried fetches from the origin, over IPv4 or IPv6.
func (w *world) carried(name string) bool {
	w.t.Helper()
	address := hosts[name].String()
	if hosts[name].Is6() {
		address = "[" + address + "]"
	}
	output, err := run(w.t, w.Client, "curl", "-sSk", "--noproxy", "", "--max-time", "3",
		"--resolve", name+":443:"+address, "https://"+name+"/")
	return err == nil && strings.HasPrefix(output, "origin ")
}

func (w *world) wantCarried(want bool, when string) {
	w.t.Helper()
	for name := range hosts {
		if got := w.carried(name); got != want {
			w.t.Errorf("%s: %s is carried: %v", when, name, got)
		}
	}
}

// cures are the lines that `rules` prints.
func (r *room) cures(arguments ...string) (cures []string) {
	r.t.Helper()
	output, err := run(r.t, r.Gateway, r.program, append([]string{"rules", "--upstream", upstream()}, arguments...)...)
	must(r.t, err)
	for line := range strings.Lines(output) {
		if cure, found := strings.CutPrefix(line, "# Cure: "); found {
			cures = append(cures, strings.TrimSpace(cure))
		}
	}
	return cures
}

// cureAll does what is printed, and wants flows to be carried then, and nothing left to say.
func (r *room) cureAll(want int) {
	r.t.Helper()
	cures := r.cures()
	if len(cures) != want {
		r.t.Fatalf("%d cures and not %d: %q", len(cures), want, cures)
	}
	for _, cure := range cures {
		if !strings.Contains(cure, "reload") {
			r.t.Errorf("%q does not last", cure)
		}
		r.t.Log(cure)
		r.mustShell(cure)
	}
	r.wantCarried(true, "after the cure")
	if left := r.cures(); len(left) > 0 {
		r.t.Errorf("after the cure there is still %q", left)
	}
}

// TestUFW drops what is captured, until its rules know our mark. An allowed interface is
// not enough for IPv4, where it drops what is not for this host's own address first.
func TestUFW(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	r := w.newRoom("cp -a /etc/ufw/. " + dir + " && mount --bind " + dir + " /etc/ufw")
	if cures := r.cures(); len(cures) > 0 {
		t.Fatalf("without a firewall: %q", cures)
	}
	r.mustShell("ufw --force enable")
	w.gateway().waitFor(`"code":"dropped"`)
	w.wantCarried(false, "with ufw")
	r.mustShell("ufw allow in on lan0")
	if w.carried("origin.test") || !w.carried("six.test") {
		t.Error("an allowed interface does the same for both families: there may be a simpler cure")
	}
	r.mustShell("ufw delete allow in on lan0")
	r.cureAll(2)
	r.mustShell("ufw reload")
	w.wantCarried(true, "after ufw has reloaded")
}

// newFirewalld runs a real one.
func (w *world) newFirewalld() (*room, *process) {
	w.t.Helper()
	dir := w.t.TempDir()
	bus := filepath.Join(dir, "bus")
	policy := `<busconfig><type>system</type><listen>unix:path=` + bus + `</listen><auth>EXTERNAL</auth><policy context="default">
<allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>`
	must(w.t, os.WriteFile(filepath.Join(dir, "bus.conf"), []byte(policy), 0o600))
	r := w.newRoom("mount -t tmpfs none /etc/firewalld && mount -t tmpfs none /run && dbus-daemon --config-file="+dir+"/bus.conf --nofork --nopidfile &",
		"DBUS_SYSTEM_BUS_ADDRESS=unix:path="+bus)
	if !within(func() bool { _, err := os.Stat(bus); return err == nil }) {
		w.t.Fatal("the bus does not start")
	}
	return r, r.startFirewalld()
}

// startFirewalld starts it in the room, until the end of the test at the latest.
func (r *room) startFirewalld() *process {
	r.t.Helper()
	command := exec.Command("nsenter", r.inside("firewalld", "--nofork", "--nopid")...)
	command.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}
	p := background(r.t, r.Gateway, command)
	if !within(func() bool { _, err := r.shell("firewall-cmd --state"); return err == nil }) {
		r.t.Fatal("firewalld does not start")
	}
	return p
}

// gatewayBeside runs the program on the room's bus.
func (r *room) gatewayBeside(arguments ...string) *process {
	r.t.Helper()
	command := exec.Command(r.program, append([]string{"--upstream", upstream(), "--log-format", "json"}, arguments...)...)
	command.Env = append(os.Environ(), r.env...)
	p := background(r.t, r.Gateway, command)
	p.waitFor(`"message":"ready"`)
	return p
}

// richRules are those of all zones, in the running firewalld.
func (r *room) richRules() string {
	r.t.Helper()
	output, err := r.shell("firewall-cmd --list-all-zones | grep 'rule family' || true")
	must(r.t, err)
	return output
}

func TestFirewalld(t *testing.T) {
	w := newWorld(t)
	r, _ := w.newFirewalld()
	g := r.gatewayBeside()
	g.waitFor("--firewalld")
	w.wantCarried(false, "with firewalld")
	r.cureAll(2)
	// The gateway's own services are as they were.
	listener, err := w.Gateway.Listen("tcp", "[::]:8080")
	must(t, err)
	defer listener.Close()
	if output, err := run(t, w.Client, "curl", "-s", "--max-time", "1", "http://"+lab.Gateway4.String()+":8080/"); err == nil || strings.Contains(output, "HTTP") {
		t.Errorf("the cure opens the host's own services to clients: %q", output)
	}
	must(t, g.end(syscall.SIGTERM))
}

// TestFirewalldFlag: what is opened when asked comes again after a reload and a restart,
// and goes at the stop, and after a kill with the next start and with cleanup.
func TestFirewalldFlag(t *testing.T) {
	w := newWorld(t)
	r, firewalld := w.newFirewalld()
	state := t.TempDir()
	none := r.richRules()
	if none != "" {
		t.Fatalf("firewalld begins with %q", none)
	}
	closed := func(when string) {
		t.Helper()
		if rules := r.richRules(); rules != "" {
			t.Errorf("%s firewalld still has %s", when, rules)
		}
		if left, err := os.ReadDir(state); err != nil || len(left) > 0 {
			t.Errorf("%s: %v is left, %v", when, left, err)
		}
	}
	// A service that firewalld keeps from the uplink, which is in the same zone.
	service, err := w.Gateway.Listen("tcp", "0.0.0.0:8080")
	must(t, err)
	defer service.Close()
	hidden := func(when string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if conn, err := w.Router.Dial(ctx, "tcp", lab.Uplink4.String()+":8080"); err == nil {
			conn.Close()
			t.Errorf("%s a service of the gateway is open to the uplink: %s", when, r.richRules())
		}
	}
	hidden("without --firewalld")
	g := r.gatewayBeside("--firewalld", "--state-dir", state)
	w.wantCarried(true, "with --firewalld")
	hidden("with --firewalld")
	if strings.Contains(g.text(), `"cure"`) {
		t.Errorf("there is still something in the way: %s", g.text())
	}
	r.mustShell("firewall-cmd --reload")
	if !within(func() bool { return w.carried("origin.test") && w.carried("six.test") }) {
		t.Error("after a reload flows are not carried")
	}
	r.mustShell("firewall-cmd --zone=internal --change-interface=lan0 && firewall-cmd --reload")
	if !within(func() bool { return w.carried("origin.test") && w.carried("six.test") }) {
		t.Errorf("in another zone flows are not carried: %s", r.richRules())
	}
	firewalld.end(syscall.SIGTERM)
	r.startFirewalld()
	if !within(func() bool { return w.carried("origin.test") && w.carried("six.test") }) {
		t.Errorf("after a restart flows are not carried: %s", r.richRules())
	}
	must(t, g.end(syscall.SIGTERM))
	closed("after the stop")

	r.gatewayBeside("--firewalld", "--state-dir", state).end(syscall.SIGKILL)
	if r.richRules() == "" {
		t.Error("nothing is left by a kill: the test is blind")
	}
	g = r.gatewayBeside("--state-dir", state)
	closed("after a kill and a start without the flag")
	must(t, g.end(syscall.SIGTERM))
	r.gatewayBeside("--firewalld", "--state-dir", state).end(syscall.SIGKILL)
	if output, err := r.shell(r.program + " cleanup --state-dir " + state); err != nil {
		t.Errorf("cleanup: %v: %s", err, output)
	}
	closed("after a kill and cleanup")
}

// TestForwardingBesideFirewalls: what --gateway is to forward passes once the cures are
// done that are printed.
func TestForwardingBesideFirewalls(t *testing.T) {
	direct := []string{"--gateway", "--no-proxy", "203.0.113.0/24,2001:db8:3::/64"}
	for _, test := range []struct {
		name  string
		start func(*world) *room
		words string
	}{
		{"Docker", func(w *world) *room {
			r := w.newRoom("true")
			for _, command := range []string{"iptables-nft", "ip6tables-nft"} {
				r.mustShell(command + " -P FORWARD DROP && " + command + " -N DOCKER-USER && " + command + " -A DOCKER-USER -j RETURN && " + command + " -I FORWARD -j DOCKER-USER")
			}
			return r
		}, "DOCKER-USER"},
		{"iptables", func(w *world) *room {
			r := w.newRoom("true")
			r.mustShell("iptables-nft -P FORWARD DROP && ip6tables-nft -A FORWARD -j REJECT")
			return r
		}, "-I FORWARD"},
		{"ufw", func(w *world) *room {
			dir := w.t.TempDir()
			r := w.newRoom("cp -a /etc/ufw/. " + dir + " && mount --bind " + dir + " /etc/ufw")
			r.mustShell("ufw --force enable")
			return r
		}, "ufw route"},
		{"firewalld", func(w *world) *room {
			r, _ := w.newFirewalld()
			r.mustShell("firewall-cmd --zone=trusted --change-interface=wan0 && firewall-cmd --runtime-to-permanent")
			return r
		}, "--policy=transproxy"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			r := test.start(w)
			w.gateway(append(direct, "--state-dir", t.TempDir())...).waitFor(`"code":"unforwarded"`)
			fetch := func() bool {
				both := true
				for name, address := range hosts {
					literal := strings.Replace("["+address.String()+"]", "["+lab.Origin4.String()+"]", lab.Origin4.String(), 1)
					output, err := run(t, w.Client, "curl", "-sS", "--noproxy", "", "--max-time", "2", "--resolve", name+":80:"+literal, "http://"+name+"/")
					both = both && err == nil && strings.HasPrefix(output, "direct ")
				}
				return both
			}
			if fetch() {
				t.Error("it passes before the cure")
			}
			cures := r.cures(direct...)
			if !strings.Contains(strings.Join(cures, "\n"), test.words) {
				t.Errorf("the cures %q do not say %q", cures, test.words)
			}
			for _, cure := range cures {
				t.Log(cure)
				r.mustShell(cure)
			}
			if !fetch() {
				t.Error("it does not pass after the cure")
			}
			if left := r.cures(direct...); len(left) > 0 {
				t.Errorf("after the cure there is still %q", left)
			}
		})
	}
}

// TestFirewalldWithoutBus: a system bus that is restarted, and firewalld with it, ends
// nothing but what it has to, and what was opened comes again.
func TestFirewalldWithoutBus(t *testing.T) {
	w := newWorld(t)
	r, firewalld := w.newFirewalld()
	g := r.gatewayBeside("--firewalld", "--state-dir", t.TempDir())
	w.wantCarried(true, "with --firewalld")
	bus := strings.TrimPrefix(r.env[slices.IndexFunc(r.env, func(v string) bool { return strings.HasPrefix(v, "DBUS_") })], "DBUS_SYSTEM_BUS_ADDRESS=unix:path=")
	r.mustShell("pkill -f '" + bus + "[.]conf'") // it is this test's alone
	firewalld.end(syscall.SIGTERM)
	g.waitFor("the system bus has gone")
	must(t, os.RemoveAll(bus))
	r.mustShell("dbus-daemon --config-file=" + bus + ".conf --nofork --nopidfile >/dev/null 2>&1 &")
	if !within(func() bool { _, err := os.Stat(bus); return err == nil }) {
		t.Fatal("the bus does not start")
	}
	r.startFirewalld()
	if !within(func() bool { return r.richRules() != "" && w.carried("origin.test") && w.carried("six.test") }) {
		t.Errorf("after a restart of the bus flows are not carried: %s", r.richRules())
	}
	must(t, g.end(syscall.SIGTERM))
	if rules := r.richRules(); rules != "" {
		t.Errorf("after the stop firewalld still has %s", rules)
	}
	r.mustShell("pkill -f '" + bus + "[.]conf'")
}
