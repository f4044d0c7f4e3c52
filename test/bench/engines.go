package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The figures of the two engines. What they differ in the kernel does for each packet, on
// whatever processor has it: so it is the machine's time that tells them apart.
const (
	machineConnection = "CPU of the machine a new connection, µs"
	machineExchange   = "CPU of the machine an exchange on 64 kept connections, µs"
	machineDown8      = "CPU of the machine a GB, 8 streams down, s"
	machineUp8        = "CPU of the machine a GB, 8 streams up, s"
)

var engineFigures = []string{machineConnection, machineExchange, machineDown8, machineUp8}

// The engines, as --engine has them.
var engineNames = []string{"tproxy", "sk_lookup"}

// benchEngines measures this program on both engines, in turn. The second needs the initial
// user namespace.
func benchEngines(o options) error {
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
	size := newSizes(o.scale)
	r := newResults()
	for round := range o.rounds {
		start := time.Now()
		for _, measure := range []func(*network, *sample, sizes) error{connectionsOfMachine, exchangesOfMachine, bulkOfMachine} {
			for _, engine := range engineNames {
				c := program(engine, o.program, "--engine", engine)
				s := newSample(r, engine)
				if err := n.run(c, dir, func(int) error { return measure(n, s, size) }); err != nil {
					return fmt.Errorf("%s: %w", engine, err)
				}
			}
		}
		fmt.Fprintf(os.Stderr, "round %d: %s\n", round+1, time.Since(start).Round(time.Second))
	}
	text := r.engines(o.rounds, size)
	return publish(text, o.write, "make bench-engines", "The two engines")
}

// engines is the table with the ratios.
func (r *results) engines(rounds int, size sizes) string {
	var text strings.Builder
	var kernel unix.Utsname
	unix.Uname(&kernel)
	fmt.Fprintf(&text, "`make bench-engines`, Linux %s, %d rounds, %s. Processor time of the whole machine: of the gateway, of client and server,\n"+
		"and of the kernel for every packet; medians, with the least and the greatest of all rounds. Loads: %d connections of a byte each way by\n"+
		"64 clients, 64 × %d exchanges of %d and %d bytes, %d MB in bulk.\n\n",
		unix.ByteSliceToString(kernel.Release[:]), rounds, time.Now().Format(time.DateOnly),
		size.connections, size.exchanges, requestSize, answerSize, size.bytes/1e6)
	fmt.Fprintf(&text, "| | %s | sk_lookup / tproxy |\n|---|---|---|---|\n", strings.Join(engineNames, " | "))
	for _, figure := range engineFigures {
		fmt.Fprintf(&text, "| %s |", figure)
		var medians []float64
		for _, engine := range engineNames {
			median, _ := r.median(engine, figure)
			all := r.values[engine][figure]
			fmt.Fprintf(&text, " **%.3g** (%.3g–%.3g) |", median, slices.Min(all), slices.Max(all))
			medians = append(medians, median)
		}
		fmt.Fprintf(&text, " %.2f |\n", medians[1]/medians[0])
	}
	return text.String()
}

func connectionsOfMachine(n *network, s *sample, size sizes) error {
	return machineCost(s, machineConnection, 1e6/float64(size.connections), func() error { return n.connections(size.connections) })
}

func exchangesOfMachine(n *network, s *sample, size sizes) error {
	return machineCost(s, machineExchange, 1e6/float64(64*size.exchanges), func() error {
		_, err := n.exchanges(64, size.exchanges)
		return err
	})
}

func bulkOfMachine(n *network, s *sample, size sizes) error {
	gigabytes := float64(size.bytes) / 1e9
	return errors.Join(
		machineCost(s, machineDown8, 1/gigabytes, func() error { return n.download(8, size.bytes) }),
		machineCost(s, machineUp8, 1/gigabytes, func() error { return n.upload(8, size.bytes) }))
}

// machineCost takes the processor time that all processors spend on a load, times scale.
func machineCost(s *sample, figure string, scale float64, load func() error) error {
	before, err := busy()
	if err != nil {
		return err
	}
	if err := load(); err != nil {
		return err
	}
	after, err := busy()
	s.add(figure, (after-before).Seconds()*scale)
	return err
}

// busy is the time that the processors have not been idle (proc(5), /proc/stat), stolen time
// aside.
func busy() (time.Duration, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	var user, nice, system, idle, wait, irq, softirq int64
	if _, err := fmt.Sscanf(string(text), "cpu %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &irq, &softirq); err != nil {
		return 0, fmt.Errorf("read /proc/stat: %w", err)
	}
	const tick = time.Second / 100 // USER_HZ is 100 on every architecture of Go's
	return time.Duration(user+nice+system+irq+softirq) * tick, nil
}
