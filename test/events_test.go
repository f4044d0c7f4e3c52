package test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// TestInterfaceEvents changes the gateway's network a thousand times within a minute, as
// containers, dial-up lines and address changes do, while bytes flow: no flow is lost, new
// ones are captured all along, and nothing is left of it in the program.
func TestInterfaceEvents(t *testing.T) {
	events, lasting := 1000, time.Minute
	if testing.Short() {
		events, lasting = 60, 4*time.Second
	}
	t.Parallel() // most of it is waiting
	w := newWorld(t)
	idle := goroutines(w)
	g := w.gateway("--tcp-proxy-dports", fmt.Sprint("22,", lab.PortEcho))
	before := sockets(t, g.command.Process)

	over := make(chan struct{})
	flows := make(chan error)
	for _, address := range both {
		conn := w.dial(address, lab.PortEcho)
		go func() { flows <- keepEchoing(conn, over) }()
	}
	changes := networkChanges(w.Gateway)
	pace := time.NewTicker(lasting / time.Duration(events))
	defer pace.Stop()
	for i := range events {
		<-pace.C
		if err := changes(i); err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
		if i%20 == 10 {
			for _, address := range both {
				if got, err := banner(t, w.Client, address, 22); got != lab.Banner {
					t.Errorf("a new flow to %s after %d changes: %q, %v", address, i, got, err)
				}
			}
		}
	}
	close(over)
	for range both {
		if err := <-flows; err != nil {
			t.Errorf("a flow that lasted: %v", err)
		}
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	if !strings.Contains(g.output.String(), "the host's network has changed") {
		t.Error("the program has not noticed")
	}
	if !within(5*time.Second, func() bool { return sockets(t, g.command.Process) <= before }) {
		t.Errorf("it has %d sockets open, and had %d before", sockets(t, g.command.Process), before)
	}
	if n := abort(t, g); n > idle {
		t.Errorf("it has %d goroutines, and %d without all this", n, idle)
	}
}

// networkChanges returns what makes one change after the other, in rounds: an interface
// comes up, gets a network, another name, a second address, loses all that and goes; in
// between the client's own interface gets another address and loses it.
func networkChanges(ns *netns.NS) func(i int) error {
	link := func(name string, do func(netlink.Link) error) error {
		found, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return do(found)
	}
	address := func(name, prefix string, do func(netlink.Link, *netlink.Addr) error) error {
		parsed, err := netlink.ParseAddr(prefix)
		if err != nil {
			return err
		}
		parsed.Flags = unix.IFA_F_NODAD
		return link(name, func(l netlink.Link) error { return do(l, parsed) })
	}
	steps := []func() error{
		func() error { return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "ev0"}}) },
		func() error { return link("ev0", netlink.LinkSetUp) },
		func() error { return address("ev0", "10.99.0.1/24", netlink.AddrAdd) },
		func() error { return address("ev0", "2001:db8:99::1/64", netlink.AddrAdd) },
		func() error { return address("lan0", "192.0.2.77/24", netlink.AddrAdd) },
		func() error { return link("ev0", netlink.LinkSetDown) },
		func() error { return link("ev0", func(l netlink.Link) error { return netlink.LinkSetName(l, "ev1") }) },
		func() error { return link("ev1", netlink.LinkSetUp) },
		func() error { return address("ev1", "10.99.0.1/24", netlink.AddrDel) },
		func() error { return address("lan0", "192.0.2.77/24", netlink.AddrDel) },
		func() error { return link("ev1", netlink.LinkDel) },
		func() error { return address("lan0", "2001:db8:1::77/64", netlink.AddrAdd) },
		func() error { return address("lan0", "2001:db8:1::77/64", netlink.AddrDel) },
	}
	return func(i int) error { return ns.Do(steps[i%len(steps)]) }
}

// keepEchoing sends to an origin that sends all back, until over is closed, and looks at every
// byte.
func keepEchoing(conn *net.TCPConn, over <-chan struct{}) error {
	defer conn.Close()
	conn.SetDeadline(time.Time{})
	sent, got := make([]byte, 64<<10), make([]byte, 64<<10)
	random := rand.NewChaCha8([32]byte{})
	for {
		select {
		case <-over:
			return nil
		case <-time.After(10 * time.Millisecond):
		}
		random.Read(sent)
		failed := make(chan error, 1)
		go func() {
			_, err := conn.Write(sent)
			failed <- err
		}()
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(conn, got); err != nil {
			return err
		}
		if err := <-failed; err != nil {
			return err
		}
		if !bytes.Equal(sent, got) {
			return errors.New("other bytes came back")
		}
	}
}

// goroutines is how many the program has that has carried a flow of each family and rests.
func goroutines(w *world) int {
	w.t.Helper()
	g := w.gateway()
	for _, address := range both {
		if got, err := banner(w.t, w.Client, address, 22); got != lab.Banner {
			w.t.Fatalf("%q, %v", got, err)
		}
	}
	g.waitFlows(len(both))
	return abort(w.t, g)
}

// abort ends a program with SIGABRT, at which Go's runtime prints all goroutines, and
// returns how many there were beside its own.
func abort(t *testing.T, g *gateway) int {
	t.Helper()
	g.command.Process.Signal(syscall.SIGABRT)
	g.wait(10 * time.Second)
	stacks := g.output.String()
	return strings.Count(stacks, "\ncreated by ") - strings.Count(stacks, "\ncreated by runtime.")
}
