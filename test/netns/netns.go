// Package netns makes network namespaces and links between them, so that
// programs which change the network can be tested on the real kernel: without
// root, without external programs and without touching the host.
//
// A test program enters a sandbox with Main, any other program with Run. In it,
// each NS is a host with interfaces, addresses and routes of its own:
//
//	a, _ := netns.New()
//	b, _ := netns.New()
//	netns.Connect(a, "eth0", b, "eth0")
//	a.Addr("eth0", "192.0.2.1/24")
//	b.Addr("eth0", "192.0.2.2/24")
//	listener, _ := b.Listen("tcp", "192.0.2.2:80")
//	conn, _ := a.Dial(ctx, "tcp", "192.0.2.2:80")
//
// IPv6 addresses can be used at once: namespaces made here detect no duplicates.
package netns

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NS is a network namespace: a host of the laboratory. It is safe for use by
// several goroutines.
type NS struct {
	file *os.File        // keeps the namespace alive and is the way into it
	link *netlink.Handle // a socket inside the namespace
}

// initialSysctls are set to 0 in every new namespace.
var initialSysctls = []string{
	// IPv4 parameters are copied from the host (net.core.devconf_inherit_init_net):
	// tests must find the same values on every machine.
	"net.ipv4.ip_forward",
	"net.ipv4.conf.all.rp_filter",
	"net.ipv4.conf.default.rp_filter",
	"net.ipv4.conf.all.src_valid_mark",
	// Duplicate address detection makes an address wait for a second, the
	// link-local ones included, without which a router asks for no neighbour.
	"net.ipv6.conf.all.accept_dad",
	"net.ipv6.conf.default.accept_dad",
}

// New makes a network namespace in which there is only lo, which is up. The
// caller closes it.
func New() (*NS, error) {
	ns := &NS{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if ns.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		ns.link, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		return loopbackUp()
	})
	for _, key := range initialSysctls {
		if err == nil {
			err = ns.Sysctl(key, "0")
		}
	}
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	return ns, nil
}

// Close gives the namespace up. The kernel removes it, and its interfaces, as
// soon as no socket and no process is left in it.
func (ns *NS) Close() error {
	if ns.link != nil {
		ns.link.Close()
	}
	if ns.file == nil {
		return nil
	}
	return ns.file.Close()
}

// Do calls f on a thread inside the namespace and returns what f returns. What
// f opens stays in the namespace: sockets, listeners, netlink handles, and
// below /proc/sys/net and /proc/thread-self/net its files. It does not extend
// to goroutines that f starts.
func (ns *NS) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Start starts the command inside the namespace, as command.Start does.
func (ns *NS) Start(command *exec.Cmd) error {
	return ns.Do(command.Start)
}

// onThread calls f on a goroutine that has a thread to itself, and takes the
// thread back to the network namespace that it had before. A thread on which
// this fails ends with the goroutine.
func onThread(f func() error) error {
	// A f that ends its goroutine, as testing's FailNow does, must not leave
	// the caller waiting.
	err := errors.New("the function ended its goroutine")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, openErr := os.Open("/proc/thread-self/ns/net")
		if openErr != nil {
			err = openErr
			return
		}
		defer home.Close()
		defer func() {
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	<-done
	return err
}
