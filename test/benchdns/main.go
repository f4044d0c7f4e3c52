// Command benchdns measures the resolver: this program, as an ordinary resolver and
// for captured queries, against dnsmasq and unbound, which forward to the same
// stand-in server; then what is not in the cache, through CONNECT, against one
// connection a query. The load is dnsperf's, between hosts in network namespaces,
// without root. All are measured in one run, in turn, several rounds, and medians
// are compared.
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

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// options are those of the command line.
type options struct {
	rounds  int
	scale   float64
	write   string
	program string
	only    string
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == yardstickName {
		fmt.Fprintln(os.Stderr, yardstick())
		os.Exit(1)
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "how often each is measured")
	flag.StringVar(&o.write, "write", "", "write the figures into their section of this Markdown file")
	flag.Float64Var(&o.scale, "scale", 1, "length of the loads; below 1 for a quick look")
	flag.StringVar(&o.program, "program", "bin/transproxy-tproxy", "the program, already built: there is no network in the namespaces")
	flag.StringVar(&o.only, "only", "", "measure these alone, with commas between them: "+strings.Join(names, ", "))
	flag.Parse()
	status, err := netns.Run(func() int {
		if err := bench(o); err != nil {
			fmt.Fprintln(os.Stderr, "benchdns:", err)
			return 1
		}
		return 0
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchdns:", err)
		status = 1
	}
	os.Exit(status)
}

// load is what is asked of a resolver.
type load struct {
	cached    time.Duration // as fast as it goes, of names in the cache
	paced     time.Duration // at pacedRate, of the same
	uncached  time.Duration // as fast as it goes, of new names
	names     int           // in the cache
	newNames  int           // more than are asked for within uncached
	pacedRate int           // queries a second
}

const (
	cacheEntries = 10_000 // that each resolver has room for
	tunnelDelay  = 20 * time.Millisecond
)

func newLoad(scale float64) load {
	of := func(full time.Duration) time.Duration { return max(time.Second, time.Duration(float64(full)*scale)) }
	return load{
		cached: of(3 * time.Second), paced: of(5 * time.Second), uncached: of(2 * time.Second),
		names: cacheEntries / 2, newNames: 200_000, pacedRate: 5000,
	}
}

func bench(o options) (err error) {
	// Absolute before anything changes the directory; missing ones are told at once.
	if o.program, err = filepath.Abs(o.program); err != nil {
		return err
	}
	for _, needed := range []string{o.program, "dnsperf", "dnsmasq", "unbound"} {
		if _, err := exec.LookPath(needed); err != nil {
			return fmt.Errorf("%w: make bench-dns builds and installs what it needs", err)
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
	dir, err := os.MkdirTemp("", "benchdns-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l := newLoad(o.scale)
	b := &bencher{options: o, dir: dir, load: l, results: results{}}
	b.network, err = newNetwork()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.network.close()) }()
	if err := b.writeNames(); err != nil {
		return err
	}
	for round := range o.rounds {
		for _, c := range b.contenders() {
			if o.only != "" && !slices.Contains(strings.Split(o.only, ","), c.name) {
				continue
			}
			start := time.Now()
			err := b.measure(c)
			for again := 2; errors.Is(err, errLost) && again > 0; again-- {
				fmt.Fprintf(os.Stderr, "%s: %v; once more\n", c.name, err)
				err = b.measure(c)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			fmt.Fprintf(os.Stderr, "round %d: %s, %s\n", round+1, c.name, time.Since(start).Round(time.Second/10))
		}
	}
	return b.report(os.Stdout)
}
