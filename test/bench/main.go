// Command bench measures what a flow costs: this program against a yardstick (a
// goroutine a direction and io.Copy) and against redsocks, where it is installed,
// between hosts in network namespaces, without root. All are measured in one run,
// in turn, several rounds, and medians are compared: single runs on a shared
// machine move by 15 % and more.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == yardstickName {
		fmt.Fprintln(os.Stderr, yardstick())
		os.Exit(1)
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each is measured")
	flag.StringVar(&o.write, "write", "", "write the figures to this Markdown file, and a chart beside it")
	flag.Float64Var(&o.scale, "scale", 1, "size of the loads; below 1 for a quick look")
	flag.StringVar(&o.program, "program", "bin/transproxy-tproxy", "the program, already built: there is no network in the namespaces")
	flag.StringVar(&o.before, "before", "", "an older build of the program, to measure it beside the other")
	flag.StringVar(&o.loads, "loads", "connections,slow,exchanges,bulk,idle,steady", "which of the loads to run")
	flag.BoolVar(&o.engines, "engines", false, "measure this program's two engines instead")
	flag.BoolVar(&o.distant, "distant", false, "measure the time to the first byte through a distant proxy instead")
	flag.Parse()
	status, err := netns.Run(func() int {
		measure := bench
		if o.engines {
			measure = benchEngines
		}
		if o.distant {
			measure = benchDistant
		}
		if err := measure(o); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		status = 1
	}
	os.Exit(status)
}

// options are what the command line asks for.
type options struct {
	rounds          int
	write           string
	scale           float64
	program, before string
	loads           string
	engines         bool
	distant         bool
}

// runs reports whether a load was asked for.
func (o options) runs(load string) bool {
	return slices.Contains(strings.Split(o.loads, ","), load)
}

// sizes are those of the loads.
type sizes struct {
	connections  int
	slow         int // connections at 60 a second
	bytes        int // of a bulk transfer
	exchanges    int // on each of 64 connections
	idle         int
	steady       int // flows of 100 kB/s
	steadyLength time.Duration
	rest         time.Duration // that idle connections are looked at
}

func newSizes(scale float64) sizes {
	of := func(full int) int { return max(1, int(float64(full)*scale)) }
	return sizes{
		connections: max(64, of(6000)), slow: of(240), bytes: max(8<<20, of(2<<30)), exchanges: of(800),
		idle: max(32, of(9000)), steady: max(4, of(1000)), steadyLength: time.Duration(of(3000)) * time.Millisecond,
		rest: time.Duration(of(2000)) * time.Millisecond,
	}
}

func bench(o options) error {
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	all := contenders(o)
	n, err := newNetwork()
	if err != nil {
		return err
	}
	defer n.close()

	size := newSizes(o.scale)
	r := newResults()
	for round := range o.rounds {
		start := time.Now()
		if o.runs("bulk") {
			if err := n.measureThroughput(newSample(r, routingName), size); err != nil {
				return fmt.Errorf("%s: %w", routingName, err)
			}
		}
		// Each load goes through all contenders before the next one, so that what
		// is compared lies close together in time.
		for _, load := range loads {
			if !o.runs(load.name) {
				continue
			}
			for range load.times {
				for _, c := range all {
					if err := n.run(c, dir, load.measure(n, newSample(r, c.name), size)); err != nil {
						return fmt.Errorf("%s: %s: %w", c.name, load.name, err)
					}
				}
			}
		}
		fmt.Fprintf(os.Stderr, "round %d: %s\n", round+1, time.Since(start).Round(time.Second))
	}
	return r.report(os.Stdout, o.rounds, size, o.write)
}

// load takes some of the figures of one contender. times is how often in a round:
// what is short is repeated, because it moves most.
type load struct {
	name    string
	times   int
	measure func(*network, *sample, sizes) func(pid int) error
}

var loads = []load{
	{"connections", 3, measureConnections},
	{"slow", 1, measureSlow},
	{"exchanges", 2, measureExchanges},
	{"bulk", 2, measureBulk},
	{"idle", 1, measureIdle},
	{"steady", 1, measureSteady},
}

// routingName is the limit: the kernel forwards, and nobody relays.
const routingName = "kernel routing"

// run starts a contender, does some work and stops it.
func (n *network) run(c contender, dir string, work func(pid int) error) (err error) {
	process, undo, err := c.start(n, dir)
	if process != nil && process.Process != nil {
		defer func() { err = errors.Join(err, end(process)) }()
	}
	if undo != nil {
		defer func() { err = errors.Join(err, undo()) }()
	}
	if err != nil {
		return err
	}
	// Code and caches are not what is measured. One after the other: a relay that
	// keeps its pipes would else have used up what the kernel grants an unprivileged
	// user (fs.pipe-user-pages-soft), and be measured with the smallest ones.
	if err := n.paced(n.lessons, 2000); err != nil {
		return err
	}
	return work(process.Process.Pid)
}

// end stops a contender.
func end(process *exec.Cmd) error {
	process.Process.Signal(unix.SIGTERM)
	killed := time.AfterFunc(5*time.Second, func() { process.Process.Kill() })
	defer killed.Stop()
	process.Wait() // how it ends is not what is measured
	return nil
}

// cost returns what a load costs the process for each of count units.
func cost(pid, count int, load func() error) (time.Duration, error) {
	before, err := measure(pid)
	if err != nil {
		return 0, err
	}
	if err := load(); err != nil {
		return 0, err
	}
	after, err := measure(pid)
	return (after.cpu - before.cpu) / time.Duration(count), err
}

// measureConnections takes what a connection costs.
func measureConnections(n *network, s *sample, size sizes) func(pid int) error {
	return func(pid int) error {
		took, err := cost(pid, size.connections, func() error { return n.connections(size.connections) })
		if err != nil {
			return err
		}
		s.add(cpuConnection, took.Seconds()*1e6)
		return nil
	}
}

// measureSlow takes what a connection costs when little is to be done.
func measureSlow(n *network, s *sample, size sizes) func(pid int) error {
	return func(pid int) error {
		took, err := cost(pid, size.slow, func() error { return n.paced(size.slow, 60) })
		if err != nil {
			return err
		}
		s.add(cpuSlow, took.Seconds()*1e6)
		return nil
	}
}

// measureExchanges takes what an exchange on a kept connection costs.
func measureExchanges(n *network, s *sample, size sizes) func(pid int) error {
	return func(pid int) error {
		var latencies []time.Duration
		took, err := cost(pid, 64*size.exchanges, func() (err error) {
			latencies, err = n.exchanges(64, size.exchanges)
			return err
		})
		if err != nil {
			return err
		}
		s.add(cpuExchange, took.Seconds()*1e6)
		s.add(exchangeP99, percentile(latencies, 99).Seconds()*1e6)
		return nil
	}
}

// measureBulk takes what a byte costs, and how many go through.
func measureBulk(n *network, s *sample, size sizes) func(pid int) error {
	return func(pid int) error {
		gb := float64(size.bytes) / 1e9
		for figure, load := range map[string]func() error{
			cpuDown8: func() error { return n.download(8, size.bytes) },
			cpuUp8:   func() error { return n.upload(8, size.bytes) },
		} {
			took, err := cost(pid, 1, load)
			if err != nil {
				return err
			}
			s.add(figure, took.Seconds()/gb)
		}
		return n.measureThroughput(s, size)
	}
}

// measureSteady takes how late chunks come, beside a slow reader and without, each
// twice and in such an order that a drift of the machine does not count.
func measureSteady(n *network, s *sample, size sizes) func(pid int) error {
	return func(int) error {
		sum := map[string]float64{}
		for _, figure := range []string{steadyP99, steadySlowP99, steadySlowP99, steadyP99} {
			late, err := n.steady(size.steady, size.steadyLength, figure == steadySlowP99)
			if err != nil {
				return err
			}
			p99 := percentile(late, 99).Seconds() * 1e3
			s.add(figure, p99)
			sum[figure] += p99
		}
		s.add(steadySlowdown, sum[steadySlowP99]/sum[steadyP99])
		return nil
	}
}

// measureThroughput takes what can be taken of kernel routing as well.
func (n *network) measureThroughput(s *sample, size sizes) error {
	for figure, streams := range map[string]int{throughput1: 1, throughput8: 8} {
		start := time.Now()
		if err := n.download(streams, size.bytes); err != nil {
			return err
		}
		s.add(figure, float64(size.bytes)*8/1e9/time.Since(start).Seconds())
	}
	return nil
}

// measureIdle looks at what connections cost that rest, and what new ones cost
// beside them: against those before and those after, so that a drift of the machine
// does not count.
func measureIdle(n *network, s *sample, size sizes) func(pid int) error {
	return func(pid int) error {
		some := size.connections / 2
		connections := func() (time.Duration, error) {
			return cost(pid, some, func() error { return n.connections(some) })
		}
		beforeIdle, err := connections()
		if err != nil {
			return err
		}
		withIdle, err := n.measureResting(pid, s, size, connections)
		if err != nil || withIdle == 0 {
			return err
		}
		afterIdle, err := connections()
		s.add(idleSlowdown, 2*withIdle.Seconds()/(beforeIdle+afterIdle).Seconds())
		return err
	}
}

// measureResting opens connections that rest, looks at what they hold, and takes
// what others cost beside them; 0 if the contender cannot hold that many.
func (n *network) measureResting(pid int, s *sample, size sizes, others func() (time.Duration, error)) (time.Duration, error) {
	before, err := measure(pid)
	if err != nil {
		return 0, err
	}
	conns, err := n.idle(size.idle)
	defer func() {
		for _, conn := range conns {
			conn.SetLinger(0)
			conn.Close()
		}
	}()
	if err != nil {
		// A contender that cannot hold so many says something, too.
		s.note(fmt.Sprintf("stopped at %d idle connections", len(conns)))
		return 0, nil
	}
	time.Sleep(size.rest)
	after, err := measure(pid)
	if err != nil {
		return 0, err
	}
	s.add(idleMemory, float64(after.memory-before.memory)/float64(len(conns))/1024)
	s.add(idleDescriptors, float64(after.descriptors-before.descriptors)/float64(len(conns)))
	resting, err := cost(pid, 1, func() error { time.Sleep(size.rest); return nil })
	if err != nil {
		return 0, err
	}
	s.add(idleCPU, resting.Seconds()*1e3/size.rest.Seconds())
	return others()
}
