package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// ordinaryUser is any but root.
const ordinaryUser = 13

// inSandbox calls f as netns.Run does, but as an ordinary user who may change the
// network: squid refuses to run as root, and in TPROXY mode it needs power over the
// namespace that it is in, which one more user namespace around squid alone would
// not give it.
func inSandbox(f func() int) (status int, err error) {
	var failure error
	status, err = netns.Run(func() int {
		if os.Geteuid() == ordinaryUser {
			return f()
		}
		status, err := asOrdinaryUser()
		failure = err
		return status
	})
	return status, errors.Join(err, failure)
}

// asOrdinaryUser starts the same program in one more sandbox, where its main comes to
// the same inSandbox, and returns its exit status.
func asOrdinaryUser() (status int, err error) {
	// Pdeathsig is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child := exec.Command("/proc/self/exe", os.Args[1:]...)
	child.Args[0] = os.Args[0]
	child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: ordinaryUser, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: ordinaryUser, HostID: 0, Size: 1}},
		// Kept by all that it starts. To enter namespaces is CAP_SYS_ADMIN's.
		AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_ADMIN},
		Pdeathsig:   unix.SIGKILL,
	}
	var exit *exec.ExitError
	if err := child.Run(); err != nil && !errors.As(err, &exit) {
		return 1, fmt.Errorf("start %s as an ordinary user: %w", os.Args[0], err)
	}
	if !child.ProcessState.Exited() {
		return 1, errors.New(child.ProcessState.String())
	}
	return child.ProcessState.ExitCode(), nil
}
