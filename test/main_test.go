// Package test holds the end-to-end tests: the real program on the real kernel,
// between hosts in network namespaces. They need no root and no other program
// than go, which builds the one under test.
package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(built{m})) }

// built runs the tests once the program is built.
type built struct{ *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "transproxy-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "transproxy-tproxy")
	build := exec.Command("go", "build", "-o", program, "../cmd/transproxy-tproxy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, output)
		return 1
	}
	os.Setenv("TRANSPROXY_TEST_PROGRAM", program)
	return b.M.Run()
}

// program returns a command of the program under test, with an environment in
// which only the arguments speak.
func program(arguments ...string) *exec.Cmd {
	command := exec.Command(os.Getenv("TRANSPROXY_TEST_PROGRAM"), arguments...)
	// Tests look at the bytes on the wire: what the proxy takes is not to be found out first,
	// but for those that ask for it.
	command.Env = []string{"PATH=" + os.Getenv("PATH"), "TRANSPROXY_UPSTREAM_AUTH=basic"}
	// The program must not outlive a test binary that is killed.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return command
}

// gateway is a running instance of the program.
type gateway struct {
	t       *testing.T
	command *exec.Cmd
	output  *output
	ended   chan struct{}
	err     error // of Wait; to be read once ended is closed
}

// engineVariable names, in the environment, the engine that all tests are to run on; see make test-hosts.
const engineVariable = "TRANSPROXY_TEST_ENGINE"

// startGateway starts the program in a namespace and waits until it is ready.
func startGateway(t *testing.T, ns *netns.NS, arguments ...string) *gateway {
	t.Helper()
	if engine := os.Getenv(engineVariable); engine != "" && !strings.Contains(strings.Join(arguments, " "), "-disable-iptables") {
		arguments = append([]string{"--engine", engine}, arguments...)
	}
	g := start(t, ns, program(arguments...))
	g.waitFor(`"message":"ready"`)
	return g
}

// start starts a command of the program and does not wait.
func start(t *testing.T, ns *netns.NS, command *exec.Cmd) *gateway {
	t.Helper()
	g := &gateway{t: t, command: command, output: new(output), ended: make(chan struct{})}
	g.command.Stderr = g.output
	if g.command.Stdout == nil {
		g.command.Stdout = g.output
	}
	started := make(chan error)
	// The parent-death signal comes when the thread ends, not the process: the
	// thread that starts the program waits for it.
	go func() {
		err := ns.Do(func() error {
			err := g.command.Start()
			started <- err
			if err == nil {
				g.err = g.command.Wait()
			}
			return nil
		})
		if err != nil {
			started <- err
		}
		close(g.ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.command.Process.Kill()
		<-g.ended
		if t.Failed() {
			t.Logf("output of %v:\n%s", g.command.Args, g.output)
		}
	})
	return g
}

// waitFor waits for a text in the output.
func (g *gateway) waitFor(text string) {
	g.t.Helper()
	g.t.Logf("waiting for %s", text)
	if !within(5*time.Second, func() bool { return strings.Contains(g.output.String(), text) }) {
		g.t.Fatalf("%q did not come", text)
	}
}

// stop sends SIGTERM, waits for the end and wants success.
func (g *gateway) stop() {
	g.t.Helper()
	g.command.Process.Signal(syscall.SIGTERM)
	g.wait(10 * time.Second)
	if g.err != nil {
		g.t.Fatalf("stop: %v", g.err)
	}
}

// kill sends SIGKILL and waits for the end.
func (g *gateway) kill() {
	g.t.Helper()
	g.command.Process.Kill()
	g.wait(10 * time.Second)
}

// wait waits for the end of the program.
func (g *gateway) wait(limit time.Duration) {
	g.t.Helper()
	select {
	case <-g.ended:
	case <-time.After(limit):
		g.t.Fatalf("it did not end within %v", limit)
	}
}

// flows are the lines of the access log so far.
func (g *gateway) flows() []flow {
	g.t.Helper()
	var flows []flow
	for line := range strings.Lines(g.output.String()) {
		var f flow
		if err := json.Unmarshal([]byte(line), &f); err == nil && (f.Message == "flow" || f.Message == "request") {
			flows = append(flows, f)
		}
	}
	return flows
}

// waitFlows waits until the access log has n lines, and returns them.
func (g *gateway) waitFlows(n int) []flow {
	g.t.Helper()
	if !within(5*time.Second, func() bool { return len(g.flows()) >= n }) {
		g.t.Fatalf("the access log has %d lines and not %d", len(g.flows()), n)
	}
	return g.flows()
}

// flow is a line of the access log.
type flow struct {
	Message     string // "flow" for a tunnel, "request" for an HTTP request
	Method      string
	URL         string
	Status      int
	Client      string
	Destination string
	Name        string
	NameFrom    string `json:"name_from"`
	Way         string
	Upstream    string
	Sent        int64
	Received    int64
	End         string
}

// output collects what a program prints.
type output struct {
	mutex sync.Mutex
	bytes bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.bytes.Write(p)
}

func (o *output) String() string {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.bytes.String()
}

// within asks again and again until condition holds or the time is over.
func within(limit time.Duration, condition func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	return condition()
}
