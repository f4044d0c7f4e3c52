package netns

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleVariable asks TestSandboxed to play a program in the sandbox.
const roleVariable = "NETNS_TEST_ROLE"

// TestSandboxed is the program that the tests below start outside of the
// sandbox; Main has brought it in.
func TestSandboxed(t *testing.T) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM)
	defer signal.Stop(signals)
	switch os.Getenv(roleVariable) {
	case "":
		t.Skip("started by other tests only")
	case "status":
		io.Copy(os.Stdout, os.Stdin)
		os.Exit(42)
	case "killed":
		unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	os.Stdout.WriteString("ready\n")
	<-signals
	os.Stdout.WriteString("terminated\n")
	os.Exit(7)
}

// outside is TestSandboxed in a role, without the mark of the sandbox.
func outside(role string) *exec.Cmd {
	command := exec.Command("/proc/self/exe", "-test.run=^TestSandboxed$")
	for _, entry := range os.Environ() {
		if !strings.HasPrefix(entry, sandboxVariable+"=") {
			command.Env = append(command.Env, entry)
		}
	}
	command.Env = append(command.Env, roleVariable+"="+role)
	return command
}

func TestRunPassesStatusAndStreams(t *testing.T) {
	for role, want := range map[string]int{"status": 42, "killed": 128 + 9} {
		command := outside(role)
		command.Stdin = strings.NewReader("hello")
		out, err := command.Output()
		if got := command.ProcessState.ExitCode(); got != want {
			t.Errorf("%s: exit status %d (%v), want %d", role, got, err, want)
		}
		if role == "status" && string(out) != "hello" {
			t.Errorf("output %q, want the input", out)
		}
	}
}

func TestRunPassesSignals(t *testing.T) {
	command, out := waiting(t)
	defer time.AfterFunc(5*time.Second, func() { command.Process.Kill() }).Stop()
	command.Process.Signal(unix.SIGTERM)
	rest, err := io.ReadAll(out)
	if err != nil || string(rest) != "terminated\n" {
		t.Errorf("after SIGTERM: %q, %v", rest, err)
	}
	command.Wait()
	if got := command.ProcessState.ExitCode(); got != 7 {
		t.Errorf("exit status %d, want 7", got)
	}
}

func TestSandboxEndsWithItsParent(t *testing.T) {
	command, out := waiting(t)
	command.Process.Kill()
	closed := make(chan struct{})
	go func() {
		io.Copy(io.Discard, out) // ends when the sandboxed process has ended too
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Error("the process in the sandbox outlives the one that started it")
	}
	command.Wait()
}

func TestDeniedNamesTheCure(t *testing.T) {
	for _, errno := range []error{unix.EPERM, unix.EACCES, unix.ENOSPC} {
		err := denied(&os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: errno})
		if !strings.Contains(err.Error(), "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0") {
			t.Errorf("%v: the error %q names no cure", errno, err)
		}
		if strings.Contains(err.Error(), "\n") || !errors.Is(err, errno) {
			t.Errorf("%v became %q", errno, err)
		}
	}
	if err := denied(unix.ENOENT); err != unix.ENOENT {
		t.Errorf("ENOENT became %q", err)
	}
}

// waiting is a started program that has come to its wait for SIGTERM.
func waiting(t *testing.T) (*exec.Cmd, io.Reader) {
	t.Helper()
	command := outside("wait")
	out, err := command.StdoutPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, ready); err != nil {
		t.Fatalf("read %q, %v, want ready", ready, err)
	}
	return command, out
}
