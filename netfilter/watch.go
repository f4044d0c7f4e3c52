package netfilter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pollInterval finds what events did not tell.
	pollInterval = 30 * time.Second
	// settle is the least time between two looks at the tables, so that a program that changes nftables all the time does
	// not keep us busy.
	settle = 100 * time.Millisecond
	// retryInterval follows an attempt that failed, and maxFailures in a row end Watch: others' changes can make a
	// transaction fail for a moment, not for seconds.
	retryInterval = time.Second
	maxFailures   = 3
)

// Watch restores what others remove, and blocks until ctx is done. Others can change the guard, and where there is no owner
// flag the other table too: nft flush ruleset is enough. The error is that of several attempts in a row. At most one
// Watch may run, and not beside Close.
func (h *Handle) Watch(ctx context.Context) error {
	if err := h.events.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	touched, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		h.listen(touched)
	}()
	defer func() {
		_ = h.events.SetReadDeadline(time.Now()) // cannot fail after the first
		<-ended
	}()

	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	failures := 0
	for {
		pause := settle
		if err := h.restore(); err != nil {
			if failures++; failures == maxFailures {
				return fmt.Errorf("watch nftables: %w", err)
			}
			pause = retryInterval
			signal(touched)
		} else {
			failures = 0
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-touched:
		case <-poll.C:
		}
	}
}

// subscribe returns a netlink socket that gets a message for each change of nftables in the network namespace of the
// calling thread. The library's own monitor reads whatever others put into their tables; here nothing is parsed.
func subscribe() (*os.File, error) {
	socket, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	address := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}
	if err := unix.Bind(socket, address); err != nil {
		return nil, errors.Join(os.NewSyscallError("bind", err), unix.Close(socket))
	}
	return os.NewFile(uintptr(socket), "nftables events"), nil
}

// listen signals events that mention our tables, until the deadline for reading.
func (h *Handle) listen(touched chan<- struct{}) {
	// More than the kernel puts into one notification (NLMSG_GOODSIZE of linux/netlink.h, 8 KiB at most).
	buffer := make([]byte, 16<<10)
	for {
		n, err := h.events.Read(buffer)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			signal(touched) // events were lost
		case err != nil:
			return
		case bytes.Contains(buffer[:n], []byte(h.name)):
			signal(touched)
		}
	}
}

// signal does not wait: one signal stands for any number of changes.
func signal(touched chan<- struct{}) {
	select {
	case touched <- struct{}{}:
	default:
	}
}
