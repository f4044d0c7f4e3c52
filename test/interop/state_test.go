//go:build interop

package interop

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// state is what an administrator sees of the gateway's network settings.
func (w *world) state() string {
	w.t.Helper()
	var text strings.Builder
	for _, command := range []string{
		"nft -s list ruleset", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "sysctl net",
	} {
		words := strings.Fields(command)
		output, err := run(w.t, w.Gateway, words[0], words[1:]...)
		if err != nil && words[0] != "sysctl" { // some keys cannot be read in a user namespace
			w.t.Fatalf("%s: %v: %s", command, err, output)
		}
		text.WriteString("== " + command + "\n")
		for line := range strings.Lines(output) {
			if !moves(line) {
				text.WriteString(line)
			}
		}
	}
	return text.String()
}

// moves reports whether a line of sysctl counts something that changes by itself.
func moves(line string) bool {
	for _, key := range []string{"nf_conntrack_count", "net.netfilter.nf_conntrack_events", "inode", "sysctl: ", "expires "} {
		if strings.Contains(line, key) {
			return true
		}
	}
	return false
}

// table is the ruleset, without counters.
func (w *world) ruleset() string {
	w.t.Helper()
	output, err := run(w.t, w.Gateway, "nft", "-s", "list", "ruleset")
	must(w.t, err)
	return output
}

func TestStateIsRestored(t *testing.T) {
	for _, fail := range []string{"open", "closed"} {
		t.Run(fail, func(t *testing.T) {
			w := newWorld(t)
			run(t, w.Gateway, "nft", "list", "ruleset") // loads what nft itself loads
			before := w.state()
			g := w.gateway("--fail", fail)
			if w.state() == before {
				t.Fatal("a running gateway changes nothing: the comparison is blind")
			}
			must(t, g.end(syscall.SIGTERM))
			wantSame(t, "SIGTERM", before, w.state())

			w.gateway("--fail", fail).end(syscall.SIGKILL)
			rules := w.ruleset()
			if strings.Contains(rules, "tproxy ip") || strings.Contains(rules, "table inet transproxy {") {
				t.Errorf("after SIGKILL a capture rule is left:\n%s", rules)
			}
			if guarded := strings.Contains(rules, "transproxy_guard"); guarded != (fail == "closed") {
				t.Errorf("after SIGKILL with --fail %s:\n%s", fail, rules)
			}
			must(t, w.gateway("--fail", fail).end(syscall.SIGTERM))
			wantSame(t, "SIGKILL, start and stop", before, w.state())

			w.gateway("--fail", fail).end(syscall.SIGKILL)
			output, err := run(t, w.Gateway, w.program, "cleanup")
			if err != nil {
				t.Fatalf("cleanup: %v: %s", err, output)
			}
			wantSame(t, "SIGKILL and cleanup", before, w.state())
		})
	}
}

func wantSame(t *testing.T, after, want, got string) {
	t.Helper()
	if got == want {
		return
	}
	had := make(map[string]bool)
	for line := range strings.Lines(want) {
		had[line] = true
	}
	for line := range strings.Lines(got) {
		if !had[line] {
			t.Errorf("after %s there is in addition: %s", after, line)
		}
		delete(had, line)
	}
	for line := range had {
		t.Errorf("after %s there is no longer: %s", after, line)
	}
}

// TestFlushByOthers: another program's flush does not disarm a running gateway.
func TestFlushByOthers(t *testing.T) {
	w := newWorld(t)
	w.gateway("--fail", "closed")
	before := w.ruleset()
	output, err := run(t, w.Gateway, "nft", "flush", "ruleset")
	t.Logf("nft flush ruleset: %v %s", err, output)
	if !within(func() bool { return w.ruleset() == before }) {
		t.Errorf("after the flush:\n%s", w.ruleset())
	}
	run(t, w.Gateway, "ip", "rule", "flush")
	run(t, w.Gateway, "ip", "-6", "rule", "flush")
	run(t, w.Gateway, "ip", "rule", "add", "pref", "32766", "lookup", "main")
	run(t, w.Gateway, "ip", "-6", "rule", "add", "pref", "32766", "lookup", "main")
	if !within(func() bool {
		output, err := run(t, w.Client, "curl", "-sSk", "--max-time", "5", "--resolve", "origin.test:443:"+lab.Origin4.String(), "https://origin.test/")
		return err == nil && strings.HasPrefix(output, "origin ")
	}) {
		t.Error("after the flush of the ip rules no flow is carried")
	}
}

// TestPrintedRulesLoad: what `rules` prints is what `nft -f` loads, and that is what
// run installs, but for the owner flag.
func TestPrintedRulesLoad(t *testing.T) {
	w := newWorld(t)
	arguments := []string{"--upstream", upstream(), "--no-proxy", "10.0.0.0/8,2001:db8:ffff::/48", "--fail", "closed", "--tcp-proxy-dports", "22,8000-8999"}
	before := w.state()
	text, err := run(t, w.Gateway, w.program, append([]string{"rules"}, arguments...)...)
	must(t, err)
	if w.state() != before {
		t.Error("rules has changed something")
	}
	if strings.Contains(text, "flags owner") {
		t.Error("the printed table has an owner, and would vanish with nft")
	}
	g := w.gateway(arguments[2:]...)
	installed := w.ruleset()
	must(t, g.end(syscall.SIGTERM))

	command := exec.Command("nft", "-f", "-")
	command.Stdin = strings.NewReader(text)
	var output []byte
	err = w.Gateway.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("nft -f: %v: %s\n%s", err, output, text)
	}
	loaded := w.ruleset()
	if !strings.Contains(loaded, "table inet transproxy {") {
		t.Fatalf("the table is not there:\n%s", loaded)
	}
	if normal(loaded) != normal(installed) {
		t.Errorf("loaded:\n%s\ninstalled:\n%s", loaded, installed)
	}
}

// normal is a ruleset without the owner's lines and without empty ones.
func normal(ruleset string) string {
	var text strings.Builder
	for line := range strings.Lines(ruleset) {
		line = strings.TrimSpace(line)
		if line == "" || line == "flags owner" || strings.HasPrefix(line, "# progname") {
			continue
		}
		line, _, _ = strings.Cut(line, " # progname")
		text.WriteString(line + "\n")
	}
	return text.String()
}

// TestByHand: with --disable-iptables an administrator installs what is printed.
func TestByHand(t *testing.T) {
	w := newWorld(t)
	w.gateway("-disable-iptables")
	fetch := func() string {
		output, _ := run(t, w.Client, "curl", "-sSk", "--max-time", "5", "--resolve", "origin.test:443:"+lab.Origin4.String(), "https://origin.test/")
		return output
	}
	if output := fetch(); strings.HasPrefix(output, "origin ") {
		t.Errorf("it is captured before anything is installed: %q", output)
	}
	text, err := run(t, w.Gateway, w.program, "rules", "--upstream", upstream())
	must(t, err)
	for line := range strings.Lines(text) {
		if words := strings.Fields(strings.TrimPrefix(line, "# ")); len(words) > 1 && words[0] == "ip" && strings.HasPrefix(line, "# ip ") {
			if output, err := run(t, w.Gateway, words[0], words[1:]...); err != nil {
				t.Fatalf("%v: %v: %s", words, err, output)
			}
		}
	}
	load := exec.Command("nft", "-f", "-")
	load.Stdin = strings.NewReader(text)
	must(t, w.Gateway.Do(load.Run))
	if output := fetch(); !strings.HasPrefix(output, "origin ") {
		t.Errorf("with the printed rules: %q", output)
	}
}
