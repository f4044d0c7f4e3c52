//go:build interop

// Package interop tests the program against real ones: squid as the company's
// proxy, curl and ssh as clients, nft and ip to see what it does to the kernel.
package interop

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

var hosts = map[string]netip.Addr{"origin.test": lab.Origin4, "six.test": lab.Origin6}

// world is a lab with a real squid on it.
type world struct {
	*lab.Lab
	t       *testing.T
	program string
	squid   *squid
	origin  *lab.Origin
	direct  *lab.Origin
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldWith(t, "")
}

// newWorldWith is newWorld with more lines of squid's configuration.
func newWorldWith(t *testing.T, squidConfig string) *world {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &world{
		Lab: l, t: t,
		program: buildProgram(t),
		origin:  &lab.Origin{Label: "origin"},
		direct:  &lab.Origin{Label: "direct"},
	}
	must(t, w.origin.Start(l.Origin, []string{"origin.test", "six.test"}, []netip.Addr{lab.Origin4, lab.Origin6}))
	t.Cleanup(w.origin.Close)
	must(t, w.direct.Start(l.Router, nil, nil))
	t.Cleanup(w.direct.Close)
	w.squid = startSquidWith(t, l.Proxy, hosts, squidPorts, squidConfig)
	return w
}

func buildProgram(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "transproxy-tproxy")
	build := exec.Command("go", "build", "-o", program, "../../cmd/transproxy-tproxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, output)
	}
	return program
}

func upstream() string {
	return fmt.Sprintf("http://%s@%s:%d", squidUserInfo, lab.Proxy4, squidPort)
}

// gateway starts the program and waits until it is ready.
func (w *world) gateway(arguments ...string) *process {
	w.t.Helper()
	command := exec.Command(w.program, append([]string{"--upstream", upstream(), "--log-format", "json"}, arguments...)...)
	p := background(w.t, w.Gateway, command)
	p.waitFor(`"message":"ready"`)
	return p
}

// process is a program that runs beside the test.
type process struct {
	t       *testing.T
	command *exec.Cmd
	ended   chan struct{}
	err     error

	mutex  sync.Mutex
	output bytes.Buffer
}

// background starts a command in a namespace; it is killed at the end of the test.
func background(t *testing.T, ns *netns.NS, command *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, command: command, ended: make(chan struct{})}
	command.Stdout, command.Stderr = p, p
	must(t, ns.Start(command))
	go func() {
		p.err = command.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		command.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("%s said:\n%s", command.Args[0], p.text())
		}
	})
	return p
}

func (p *process) Write(b []byte) (int, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.output.Write(b)
}

func (p *process) text() string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.output.String()
}

func (p *process) waitFor(text string) {
	p.t.Helper()
	if !within(func() bool { return strings.Contains(p.text(), text) }) {
		p.t.Fatalf("%q did not come", text)
	}
}

// end sends a signal and waits.
func (p *process) end(signal syscall.Signal) error {
	p.command.Process.Signal(signal)
	<-p.ended
	return p.err
}

// run runs a command in a namespace, within 30 seconds, and returns its output.
func run(t *testing.T, ns *netns.NS, name string, arguments ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	command := exec.CommandContext(ctx, name, arguments...)
	// No proxy setting of the machine that runs the test.
	command.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "HOME=" + t.TempDir()}
	var output []byte
	err := ns.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	return string(output), err
}

func listens(ns *netns.NS, address netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, "tcp", address.String())
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// within waits up to 10 seconds for a condition.
func within(condition func() bool) bool {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	return condition()
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}
