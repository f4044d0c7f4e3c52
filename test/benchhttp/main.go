// Command benchhttp measures what carrying plain HTTP costs: this program against
// squid in TPROXY mode and against a reverse proxy made of net/http, the approach of
// go-transproxy. All forward to the same stand-in proxy, behind the same rules. The
// load is wrk's, between hosts in network namespaces, without root. All are measured
// in one run, in turn, several rounds, and medians are compared.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// options are those of the command line.
type options struct {
	rounds          int
	scale           float64
	write           string
	program, before string
	only            string
	loads           string
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == reverseProxyName {
		fmt.Fprintln(os.Stderr, reverseProxy())
		os.Exit(1)
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each is measured")
	flag.StringVar(&o.write, "write", "", "write the figures into their section of this Markdown file")
	flag.Float64Var(&o.scale, "scale", 1, "size of the loads; below 1 for a quick look")
	flag.StringVar(&o.program, "program", "bin/transproxy-tproxy", "the program, already built: there is no network in the namespaces")
	flag.StringVar(&o.before, "before", "", "an older build of the program, to measure it beside the other")
	flag.StringVar(&o.only, "only", "", "measure these alone, with commas between them: "+strings.Join(names, ", "))
	flag.StringVar(&o.loads, "loads", strings.Join(loadNames(), ","), "which of the loads to run")
	flag.Parse()
	status, err := inSandbox(func() int {
		if err := bench(o); err != nil {
			fmt.Fprintln(os.Stderr, "benchhttp:", err)
			return 1
		}
		return 0
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchhttp:", err)
		status = 1
	}
	os.Exit(status)
}

// sizes are those of the loads.
type sizes struct {
	length time.Duration // of a run of wrk, which takes whole seconds
	idle   int           // connections
	rest   time.Duration // before idle connections are looked at
}

func newSizes(scale float64) sizes {
	return sizes{
		length: max(1, time.Duration(5*scale)) * time.Second,
		idle:   max(50, int(1000*scale)),
		rest:   time.Duration(float64(2*time.Second) * scale),
	}
}

// bencher is one run of the benchmark.
type bencher struct {
	options
	dir     string
	sizes   sizes
	network *network
	results results
}

func bench(o options) (err error) {
	for _, file := range []*string{&o.program, &o.before} {
		if *file == "" {
			continue
		}
		if *file, err = filepath.Abs(*file); err != nil {
			return err
		}
	}
	for _, needed := range []string{o.program, "wrk", "squid"} {
		if _, err := exec.LookPath(needed); err != nil {
			return fmt.Errorf("%w: make bench-http builds and installs what it needs", err)
		}
	}
	limit := unix.Rlimit{}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "benchhttp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bencher{options: o, dir: dir, sizes: newSizes(o.scale), results: results{}}
	if b.network, err = newNetwork(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.network.close()) }()
	for round := range o.rounds {
		start := time.Now()
		// Each load goes through all contenders before the next one, so that what is
		// compared lies close together in time.
		for _, load := range loads {
			if !listed(o.loads, load.name) {
				continue
			}
			for _, c := range b.contenders() {
				if o.only != "" && !listed(o.only, c.name) {
					continue
				}
				if err := b.measure(c, load); err != nil {
					return fmt.Errorf("%s: %s: %w", c.name, load.name, err)
				}
			}
		}
		fmt.Fprintf(os.Stderr, "round %d: %s\n", round+1, time.Since(start).Round(time.Second))
	}
	return b.report(os.Stdout)
}

// listed reports whether a name is in a list with commas.
func listed(list, name string) bool { return slices.Contains(strings.Split(list, ","), name) }
