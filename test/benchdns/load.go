package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// writeNames writes the queries for dnsperf.
func (b *bencher) writeNames() error {
	write := func(file, format string, count int) error {
		var text bytes.Buffer
		for i := range count {
			fmt.Fprintf(&text, format+" A\n", i)
		}
		return os.WriteFile(filepath.Join(b.dir, file), text.Bytes(), 0o600)
	}
	return errors.Join(write(cachedNames, "host%d.cached.example", b.load.names), write(newNames, "host%d.new.example", b.load.newNames))
}

// The files of names.
const (
	cachedNames = "cached"
	newNames    = "new"
)

// answered is what dnsperf tells of a run.
type answered struct {
	queries   int
	perSecond float64
	latencies []time.Duration // of every query, sorted, if they were asked for
}

// dnsperf runs it on the client, against a server's address.
func (b *bencher) dnsperf(server, names string, limit time.Duration, arguments ...string) (answered, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit+20*time.Second)
	defer cancel()
	all := slices.Concat([]string{"-s", server, "-d", filepath.Join(b.dir, names)}, arguments)
	if limit > 0 {
		all = append(all, "-l", strconv.Itoa(int(limit.Seconds())))
	}
	output, err := os.Create(filepath.Join(b.dir, "dnsperf"))
	if err != nil {
		return answered{}, err
	}
	defer output.Close()
	command := exec.CommandContext(ctx, "dnsperf", all...)
	// A file, so that nothing of ours runs beside it.
	command.Stdout, command.Stderr = output, output
	if err := b.network.Client.Do(command.Run); err != nil {
		text, _ := os.ReadFile(output.Name())
		return answered{}, fmt.Errorf("dnsperf %q: %w: %s", all, err, text[max(0, len(text)-2000):])
	}
	if _, err := output.Seek(0, io.SeekStart); err != nil {
		return answered{}, err
	}
	return parse(output)
}

var (
	completedLine = regexp.MustCompile(`^ *Queries completed: +(\d+) `)
	lostLine      = regexp.MustCompile(`^ *Queries lost: +(\d+) `)
	rateLine      = regexp.MustCompile(`^ *Queries per second: +([\d.]+)`)
	codesLine     = regexp.MustCompile(`^ *Response codes: +(.*)`)
	// > NOERROR host1.cached.example A 0.000072
	queryLine = regexp.MustCompile(`^> \S+ \S+ \S+ ([\d.]+)$`)
)

// errLost is that of a run in which the machine was too busy for some packets.
var errLost = errors.New("queries were lost")

// parse reads dnsperf's output. A run with lost queries or with other answers than
// NOERROR says nothing about speed, and is an error.
func parse(output io.Reader) (a answered, err error) {
	lines := bufio.NewScanner(output)
	complete := false
	for lines.Scan() {
		line := lines.Text()
		if match := queryLine.FindStringSubmatch(line); match != nil {
			seconds, err := strconv.ParseFloat(match[1], 64)
			if err != nil {
				return a, err
			}
			a.latencies = append(a.latencies, time.Duration(seconds*float64(time.Second)))
		} else if match := completedLine.FindStringSubmatch(line); match != nil {
			a.queries, _ = strconv.Atoi(match[1])
		} else if match := lostLine.FindStringSubmatch(line); match != nil && match[1] != "0" {
			return a, fmt.Errorf("%w: %s", errLost, match[1])
		} else if match := rateLine.FindStringSubmatch(line); match != nil {
			a.perSecond, _ = strconv.ParseFloat(match[1], 64)
			complete = true
		} else if match := codesLine.FindStringSubmatch(line); match != nil && !strings.HasPrefix(match[1], "NOERROR") || match != nil && strings.Contains(match[1], ",") {
			return a, fmt.Errorf("answers were %s", match[1])
		}
	}
	if err := lines.Err(); err != nil {
		return a, err
	}
	if !complete || a.queries == 0 {
		return a, errors.New("dnsperf says nothing of its queries")
	}
	slices.Sort(a.latencies)
	return a, nil
}

// percentile of sorted durations.
func percentile(sorted []time.Duration, percent int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*percent/100)]
}

// cpu is the processor time of a process so far, user and system, with that of its
// threads that have ended (proc(5), fields 14 and 15).
func cpu(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is in parentheses and may hold anything.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat is short", pid)
	}
	user, err1 := strconv.ParseInt(string(fields[11]), 10, 64)
	system, err2 := strconv.ParseInt(string(fields[12]), 10, 64)
	const tick = time.Second / 100 // USER_HZ is 100 on every architecture of Go's
	return time.Duration(user+system) * tick, errors.Join(err1, err2)
}

// end stops a resolver.
func end(process *exec.Cmd) {
	process.Process.Signal(unix.SIGTERM)
	killed := time.AfterFunc(5*time.Second, func() { process.Process.Kill() })
	defer killed.Stop()
	process.Wait() // how it ends is not what is measured
}
