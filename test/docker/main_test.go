// Package docker tests the program on a Docker host: containers, and builds, without any
// proxy setting. The tests with an engine have the build tag docker, need root, and run
// an engine of their own in namespaces of its own (script engine); the same set-up made
// by hand needs neither.
package docker

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

// Where TestMain puts the binaries, for the process in the sandbox.
const binariesVariable = "DOCKER_TEST_BINARIES"

// TestMain goes into a sandbox if it must: sockets are steered by BPF only from the
// initial user namespace, so that root stays there. All that the tests change is in
// network namespaces that they made.
func TestMain(m *testing.M) {
	if initialUserNamespace() && os.Getuid() == 0 {
		os.Exit(built{m}.Run())
	}
	os.Exit(netns.Main(built{m}))
}

// initialUserNamespace reports whether all user numbers are what they are on the host
// (user_namespaces(7)).
func initialUserNamespace() bool {
	text, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(text)), " ") == "0 0 4294967295"
}

// built runs the tests once the program and the containers' client are built.
type built struct{ *testing.M }

func (b built) Run() int {
	dir, err := os.MkdirTemp("", "transproxy-docker-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", dir+"/", "../../cmd/transproxy-tproxy", "./client")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program and the client: %v\n%s", err, output)
		return 1
	}
	os.Setenv(binariesVariable, dir)
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin") // where dockerd, nft and ip are
	return b.M.Run()
}

// binary is the file of one of the two.
func binary(name string) string { return filepath.Join(os.Getenv(binariesVariable), name) }

// process is a program that runs beside the test.
type process struct {
	t       *testing.T
	command *exec.Cmd
	ended   chan struct{}
	err     error // of Wait; to be read once ended is closed

	mutex  sync.Mutex
	output bytes.Buffer
}

// background starts a command in a namespace. It is killed at the end of the test, and
// with the test binary.
func background(t *testing.T, ns *netns.NS, command *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, command: command, ended: make(chan struct{})}
	command.Stdout, command.Stderr = p, p
	if command.SysProcAttr == nil {
		command.SysProcAttr = new(syscall.SysProcAttr)
	}
	command.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error, 1)
	// The parent-death signal comes when the thread ends, not the process: the thread
	// that starts the program waits for it.
	go func() {
		defer close(p.ended)
		err := ns.Do(func() error {
			err := command.Start()
			started <- err
			if err == nil {
				p.err = command.Wait()
			}
			return nil
		})
		if err != nil {
			started <- err
		}
	}()
	must(t, <-started)
	t.Cleanup(func() {
		command.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("%s said:\n%s", strings.Join(command.Args, " "), p.text())
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

// waitFor waits for a text in the output.
func (p *process) waitFor(text string) {
	p.t.Helper()
	if !within(10*time.Second, func() bool { return strings.Contains(p.text(), text) || p.hasEnded() }) || !strings.Contains(p.text(), text) {
		p.t.Fatalf("%s did not say %q", p.command.Args[0], text)
	}
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// stop sends SIGTERM, waits for the end and wants success.
func (p *process) stop() {
	p.t.Helper()
	p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(15 * time.Second):
		p.t.Fatalf("%s does not stop", p.command.Args[0])
	}
	if p.err != nil {
		p.t.Fatalf("stop %s: %v", p.command.Args[0], p.err)
	}
}

// flow is what the tests look at in a line of the program's access log.
type flow struct {
	Message     string // "flow" for a tunnel, "request" for an HTTP request
	Client      string
	Destination string
}

// flows are the lines of the access log so far.
func (p *process) flows() []flow {
	var flows []flow
	for line := range strings.Lines(p.text()) {
		var f flow
		if err := json.Unmarshal([]byte(line), &f); err == nil && (f.Message == "flow" || f.Message == "request") {
			flows = append(flows, f)
		}
	}
	return flows
}

// within asks again and again until condition holds or the time is over.
func within(limit time.Duration, condition func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
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
