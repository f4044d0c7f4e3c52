package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The figures.
const (
	rate          = "cached queries a second"
	perCore       = "cached queries a core-second"
	cpuQuery      = "CPU a cached query, µs"
	medianLatency = "median latency, µs"
	p99Latency    = "p99 latency, µs"
	uncachedRate  = "queries a second that are not cached"
	tunnelsOpen   = "tunnels open at once"
)

// bar is what this program has to reach: the ratio of a figure of name to that of
// other is at least limit, or at most; no limit: it is only told.
type bar struct {
	figure, name, other string
	limit               float64
	most                bool
}

var bars = []bar{
	{figure: perCore, name: oursName, other: dnsmasqName, limit: 1},
	{figure: perCore, name: oursName, other: unboundName, limit: 0.7},
	{figure: p99Latency, name: oursName, other: dnsmasqName, limit: 1, most: true},
	// What captures, and what the kernel then does for each query, the others do not do.
	{figure: perCore, name: capturedName, other: dnsmasqName},
	{figure: perCore, name: capturedName, other: unboundName},
	{figure: p99Latency, name: capturedName, other: dnsmasqName},
	{figure: uncachedRate, name: pipelineName, other: sameTunnelsName, limit: 20},
	{figure: uncachedRate, name: pipelineName, other: yardstickName},
}

// results are all samples, by contender and figure.
type results map[string]map[string][]float64

func (r results) add(name, figure string, value float64) {
	if r[name] == nil {
		r[name] = make(map[string][]float64)
	}
	r[name][figure] = append(r[name][figure], value)
}

// cell is the median with the least and the greatest.
func (r results) cell(name, figure string) string {
	all := r[name][figure]
	if len(all) == 0 {
		return ""
	}
	return fmt.Sprintf("**%s** (%s–%s)", readable(median(all)), readable(slices.Min(all)), readable(slices.Max(all)))
}

// readable is a figure with three digits that count.
func readable(value float64) string {
	if value < 99.95 {
		return fmt.Sprintf("%.3g", value)
	}
	unit := math.Pow(10, math.Floor(math.Log10(value))-2)
	text := fmt.Sprintf("%.0f", math.Round(value/unit)*unit)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// median of at least one value.
func median(values []float64) float64 {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}

// markdown is the section of the figures.
func (b *bencher) markdown() string {
	var kernel unix.Utsname
	unix.Uname(&kernel)
	var text strings.Builder
	fmt.Fprintf(&text, "`make bench-dns`, Linux %s, %d rounds, %s. dnsperf in a namespace of its own on the same processors; medians, with the\n"+
		"least and the greatest of all rounds. Every resolver forwards to the same server and has room for %d entries, of which %d are\n"+
		"asked for: as fast as it goes for %s, and %d a second for %s (the latencies). Processor time is user and system of the\n"+
		"resolver's process; unbound has one thread. %s is asked as an ordinary resolver, without its rules in the kernel\n"+
		"(--disable-iptables), as the others have none; captured is with them, asked at an address that nobody has.\n\n",
		unix.ByteSliceToString(kernel.Release[:]), b.rounds, time.Now().Format(time.DateOnly),
		cacheEntries, b.load.names, b.load.cached, b.load.pacedRate, b.load.paced, oursName)
	columns := []string{oursName, capturedName, dnsmasqName, unboundName}
	text.WriteString("| | " + strings.Join(columns, " | ") + " |\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, figure := range []string{rate, perCore, cpuQuery, medianLatency, p99Latency} {
		text.WriteString("| " + figure + " |")
		for _, name := range columns {
			text.WriteString(" " + b.results.cell(name, figure) + " |")
		}
		text.WriteString("\n")
	}
	fmt.Fprintf(&text, "\nNot in the cache, through a proxy whose tunnels take %s there and back, %d queries at once: %s a second, with at most\n"+
		"%s tunnels open. With one connection a query, which takes two such delays: %s with that many tunnels at once,\n%s with a tunnel for each of the %d.\n",
		tunnelDelay, uncachedInFlight, b.results.cell(pipelineName, uncachedRate), b.results.cell(pipelineName, tunnelsOpen),
		b.results.cell(sameTunnelsName, uncachedRate), b.results.cell(yardstickName, uncachedRate), uncachedInFlight)

	text.WriteString("\n| what | ratio | bar | |\n|---|---|---|---|\n")
	for _, bar := range bars {
		ours, other := b.results[bar.name][bar.figure], b.results[bar.other][bar.figure]
		if len(ours) == 0 || len(other) == 0 {
			continue
		}
		if bar.limit == 0 {
			fmt.Fprintf(&text, "| %s: %s / %s | %.2f | | |\n", bar.figure, bar.name, bar.other, median(ours)/median(other))
			continue
		}
		ratio, sign := median(ours)/median(other), "≥"
		holds := ratio >= bar.limit
		if bar.most {
			sign, holds = "≤", ratio <= bar.limit
		}
		fmt.Fprintf(&text, "| %s: %s / %s | %.2f | %s %.2f | %s |\n", bar.figure, bar.name, bar.other, ratio, sign, bar.limit,
			map[bool]string{true: "✓", false: "✗"}[holds])
	}
	return text.String()
}

// report writes the figures, into a file as well if one is named.
func (b *bencher) report(out io.Writer) error {
	text := b.markdown()
	if _, err := io.WriteString(out, text); err != nil || b.write == "" {
		return err
	}
	old, err := os.ReadFile(b.write)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.WriteFile(b.write, replaceSection(old, text), 0o644)
}

// The lines around the section that this command writes; the rest of the file is
// not its own.
const (
	sectionBegin = "<!-- begin: written by make bench-dns -->\n"
	sectionEnd   = "<!-- end: written by make bench-dns -->\n"
)

// replaceSection puts text between the lines, at the end of the document if they are
// not in it.
func replaceSection(document []byte, text string) []byte {
	section := sectionBegin + text + sectionEnd
	before, rest, begins := bytes.Cut(document, []byte(sectionBegin))
	_, after, ends := bytes.Cut(rest, []byte(sectionEnd))
	if !begins || !ends {
		return slices.Concat(document, []byte("\n## DNS\n\n"), []byte(section))
	}
	return slices.Concat(before, []byte(section), after)
}
