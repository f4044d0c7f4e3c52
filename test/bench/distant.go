package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

const (
	// distantDelay is how long a packet travels between gateway and proxy.
	distantDelay = 10 * time.Millisecond
	// distantFlows are opened one after the other, and the first few are not counted: what
	// they teach is what the next ones profit from.
	distantFlows   = 40
	distantLessons = 5
	// distantPause lies between two flows.
	distantPause = 50 * time.Millisecond
)

// Who is measured beside the contenders of the other benches.
const (
	directName  = "directly, without a proxy"
	withoutName = "transproxy-tproxy --warm-connections 0"
)

// benchDistant measures the time to the first byte through a proxy that is far away, in
// turn: how many round trips to it a flow waits. Origins are near.
func benchDistant(o options) error {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	n, err := newNetwork()
	if err != nil {
		return err
	}
	defer n.close()
	n.lessons = 5 // each takes 60 ms
	cable, err := netns.ConnectFar(n.gateway, "far0", n.server, "far0", distantDelay)
	if err != nil {
		return err
	}
	defer cable.Close()
	err = errors.Join(
		n.gateway.Addr("far0", "10.99.0.1/30"), n.server.Addr("far0", "10.99.0.2/30"),
		n.gateway.Route(serverAddress+"/32", "10.99.0.2"))
	if err != nil {
		return err
	}
	flows := max(distantLessons+1, int(distantFlows*o.scale))
	r := newResults()
	all := append([]contender{{name: directName, start: func(*network, string) (*exec.Cmd, func() error, error) {
		// Whoever passes traffic on is the kernel; what runs meanwhile does nothing.
		command := exec.Command("sleep", "1h")
		return command, nil, n.launch(command)
	}}}, contenders(o)...)
	// It does not carry what comes right behind the proxy's answer.
	all = slices.DeleteFunc(all, func(c contender) bool { return c.name == yardstickName })
	all = append(all, program(withoutName, o.program, "--warm-connections", "0"))
	for range o.rounds {
		for _, c := range all {
			s := newSample(r, c.name)
			if err := n.run(c, dir, func(int) error { return n.firstBytes(s, flows) }); err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
		}
	}
	return publish(r.distant(o.rounds, flows), o.write, "make bench-distant", "A distant proxy")
}

const firstByte = "time to the first byte, ms"

// firstBytes opens flows and takes the median of what they wait for the first byte.
func (n *network) firstBytes(s *sample, flows int) error {
	var waits []time.Duration
	err := n.onClient(1, func(int) error {
		for number := range flows {
			time.Sleep(distantPause)
			start := time.Now()
			conn, err := dial(number, portGreeting)
			if err != nil {
				return err
			}
			var one [1]byte
			_, err = conn.Read(one[:])
			if number >= distantLessons {
				waits = append(waits, time.Since(start))
			}
			conn.Close()
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(waits)
	s.add(firstByte, float64(waits[len(waits)/2])/1e6)
	return nil
}

// distant is the table.
func (r *results) distant(rounds, flows int) string {
	var text strings.Builder
	var kernel unix.Utsname
	unix.Uname(&kernel)
	fmt.Fprintf(&text, "`make bench-distant`, Linux %s, %d rounds, %s. A packet travels %s between the gateway and the proxy (a user-space cable,\n"+
		"test/netns), and the origins are near. %d flows a round, %s apart; the time from the client's connect to the origin's first byte, as of\n"+
		"ssh: medians, with the least and the greatest of all rounds.\n\n| | %s | round trips to the proxy above a direct connection |\n|---|---|---|\n",
		unix.ByteSliceToString(kernel.Release[:]), rounds, time.Now().Format(time.DateOnly), distantDelay, flows-distantLessons, distantPause, firstByte)
	direct, _ := r.median(directName, firstByte)
	for _, name := range r.names {
		median, _ := r.median(name, firstByte)
		all := r.values[name][firstByte]
		trips := (median - direct) / float64(2*distantDelay.Milliseconds())
		fmt.Fprintf(&text, "| %s | **%.3g** (%.3g–%.3g) | %.2f |\n", name, median, slices.Min(all), slices.Max(all), trips)
	}
	return text.String()
}
