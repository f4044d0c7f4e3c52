package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// sandboxVariable is set in the environment of a process that Run has started
// in the sandbox, and is inherited by all that it starts.
const sandboxVariable = "NETNS_SANDBOX"

// cure ends every error that means that user namespaces are denied: by
// AppArmor since Ubuntu 24.04, by user.max_user_namespaces, or by the seccomp
// filter of a container.
const cure = "user namespaces are denied on this host: run it with sudo, " +
	"or allow them with: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"

// forwarded are the signals that Run passes on to the process in the sandbox.
var forwarded = []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2}

// Main is for a package's TestMain:
//
//	func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }
//
// It runs the tests as Run does. Where user namespaces are denied it says so
// on standard error and returns 1: tests are never skipped in silence.
func Main(m interface{ Run() int }) int {
	status, err := Run(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

// Run calls f in a process that has user and network namespaces of its own,
// where it may change the network without root, and returns the exit status of
// that process. The network is empty but for lo, which is up.
//
// If the process is in such a sandbox already, Run calls f and returns its
// value. Else f is not called in this process: Run starts the same program with
// the same arguments, standard input, output and error in a sandbox, where its
// main comes to the same Run; it waits, passing signals on, and returns the
// child's exit status, or 128 + n if signal n ended it. The child does not
// outlive this process.
func Run(f func() int) (status int, err error) {
	if os.Getenv(sandboxVariable) == "" {
		return reexecute()
	}
	if err := loopbackUp(); err != nil {
		return 0, denied(fmt.Errorf("set lo up in the sandbox: %w", err))
	}
	return f(), nil
}

// reexecute runs the same program in a sandbox and returns its exit status.
func reexecute() (status int, err error) {
	// Pdeathsig is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Args[0] = os.Args[0]
	child.Env = append(os.Environ(), sandboxVariable+"=1")
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}

	signals := make(chan os.Signal, len(forwarded))
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	if err := child.Start(); err != nil {
		return 0, denied(fmt.Errorf("start %s in a user namespace: %w", os.Args[0], err))
	}
	ended := make(chan error, 1)
	go func() { ended <- child.Wait() }()
	for {
		select {
		case received := <-signals:
			if !sentByTerminal(received) {
				child.Process.Signal(received) // fails only if the child has ended
			}
		case err := <-ended:
			return exitStatus(child, err)
		}
	}
}

// sentByTerminal tells whether the child has presumably had the signal already:
// a terminal's Ctrl-C and Ctrl-\ go to every process of the foreground group,
// and a second one may mean more than the first.
func sentByTerminal(received os.Signal) bool {
	if received != unix.SIGINT && received != unix.SIGQUIT {
		return false
	}
	_, err := unix.IoctlGetTermios(int(os.Stdin.Fd()), unix.TCGETS)
	return err == nil
}

// exitStatus is the status of an ended child in the manner of a shell.
func exitStatus(child *exec.Cmd, err error) (int, error) {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("wait for the sandbox: %w", err)
	}
	if state, ok := child.ProcessState.Sys().(syscall.WaitStatus); ok && state.Signaled() {
		return 128 + int(state.Signal()), nil
	}
	return child.ProcessState.ExitCode(), nil
}

// denied adds the cure to errors that mean that user namespaces are denied.
func denied(err error) error {
	for _, errno := range []error{unix.EPERM, unix.EACCES, unix.ENOSPC} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %s", err, cure)
		}
	}
	return err
}

// loopbackUp sets lo up in the calling thread's network namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
