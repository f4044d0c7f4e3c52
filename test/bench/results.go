package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The figures.
const (
	cpuConnection   = "CPU a new connection, µs"
	cpuSlow         = "CPU a connection at 60 a second, µs"
	cpuDown8        = "CPU a GB, 8 streams down, s"
	cpuUp8          = "CPU a GB, 8 streams up, s"
	throughput1     = "throughput, 1 stream, Gb/s"
	throughput8     = "throughput, 8 streams, Gb/s"
	cpuExchange     = "CPU an exchange on 64 kept connections, µs"
	exchangeP99     = "p99 of an exchange, µs"
	idleMemory      = "memory an idle connection, KiB"
	idleDescriptors = "descriptors an idle connection"
	idleCPU         = "CPU with all idle, ms a second"
	idleSlowdown    = "CPU a new connection with idle ones, against none"
	steadyP99       = "p99 delay of 100 kB/s flows, ms"
	steadySlowP99   = "the same beside a slow reader, ms"
	steadySlowdown  = "p99 delay beside a slow reader, against without"
)

var figures = []string{
	cpuConnection, cpuSlow, cpuDown8, cpuUp8, throughput1, throughput8, cpuExchange, exchangeP99,
	idleMemory, idleDescriptors, idleCPU, idleSlowdown, steadyP99, steadySlowP99, steadySlowdown,
}

// bar is what this program has to reach: at most limit, or at least, of the figure of
// other, or of the figure itself where other is empty.
type bar struct {
	figure, other string
	limit         float64
	least         bool
}

const oursName = "transproxy-tproxy"

var bars = []bar{
	{figure: cpuConnection, other: "redsocks", limit: 0.85},
	{figure: cpuConnection, other: yardstickName, limit: 0.75},
	{figure: cpuSlow, other: yardstickName, limit: 0.6},
	{figure: cpuDown8, other: yardstickName, limit: 0.95},
	{figure: cpuUp8, other: yardstickName, limit: 0.95},
	{figure: cpuDown8, other: "redsocks", limit: 0.9},
	{figure: cpuUp8, other: "redsocks", limit: 0.9},
	{figure: throughput1, other: yardstickName, limit: 1, least: true},
	{figure: throughput8, other: yardstickName, limit: 1, least: true},
	{figure: cpuExchange, other: yardstickName, limit: 0.8},
	{figure: exchangeP99, other: yardstickName, limit: 1},
	{figure: idleMemory, limit: 1},
	{figure: idleDescriptors, limit: 2},
	{figure: idleSlowdown, limit: 1.15},
	{figure: steadySlowdown, limit: 1.2},
}

// results are all samples, by contender and figure.
type results struct {
	names  []string
	values map[string]map[string][]float64
	notes  map[string]string
}

func newResults() *results {
	return &results{values: make(map[string]map[string][]float64), notes: make(map[string]string)}
}

// sample takes the figures of a contender in a round.
type sample struct {
	results *results
	name    string
}

func newSample(r *results, name string) *sample {
	if r.values[name] == nil {
		r.names = append(r.names, name)
		r.values[name] = make(map[string][]float64)
	}
	return &sample{r, name}
}

func (s *sample) add(figure string, value float64) {
	s.results.values[s.name][figure] = append(s.results.values[s.name][figure], value)
}

func (s *sample) note(text string) { s.results.notes[s.name] = text }

// median of a contender's figure; ok is false if there is none.
func (r *results) median(name, figure string) (value float64, ok bool) {
	sorted := slices.Sorted(slices.Values(r.values[name][figure]))
	if len(sorted) == 0 {
		return 0, false
	}
	return sorted[len(sorted)/2], true
}

// report writes the tables, to a file with its chart as well if one is named.
func (r *results) report(out io.Writer, rounds int, size sizes, file string) error {
	text := r.markdown(rounds, size)
	if _, err := io.WriteString(out, text); err != nil {
		return err
	}
	if file == "" {
		return nil
	}
	chart := filepath.Join(filepath.Dir(file), "figures.svg")
	if err := os.WriteFile(chart, []byte(r.chart()), 0o644); err != nil {
		return err
	}
	// What stands below the line is written by hand.
	const line = "\n<!-- above: written by make bench -->\n"
	rest := ""
	if old, err := os.ReadFile(file); err == nil {
		_, rest, _ = strings.Cut(string(old), line)
	}
	return os.WriteFile(file, []byte("# Figures\n\n![Ratios to the yardstick](figures.svg)\n\n"+text+line+rest), 0o644)
}

func (r *results) markdown(rounds int, size sizes) string {
	var text strings.Builder
	var kernel unix.Utsname
	unix.Uname(&kernel)
	fmt.Fprintf(&text, "`make bench`, Linux %s, %d rounds, %s. Processor time is user and system of the gateway process; medians, with the\n"+
		"least and the greatest of all rounds. Namespaces, reno, client and server on the same processors.\n",
		unix.ByteSliceToString(kernel.Release[:]), rounds, time.Now().Format(time.DateOnly))
	fmt.Fprintf(&text, "Loads: %d connections of a byte each way by 64 clients, %d at 60 a second, %d MB in bulk, 64 × %d exchanges of %d and %d bytes, %d idle\n"+
		"connections, %d flows of 100 kB/s.\n\n",
		size.connections, size.slow, size.bytes/1e6, size.exchanges, requestSize, answerSize, size.idle, size.steady)

	text.WriteString("| |")
	for _, name := range r.names {
		text.WriteString(" " + name + " |")
	}
	text.WriteString("\n|---|" + strings.Repeat("---|", len(r.names)) + "\n")
	for _, figure := range figures {
		text.WriteString("| " + figure + " |")
		for _, name := range r.names {
			if median, ok := r.median(name, figure); ok {
				all := r.values[name][figure]
				fmt.Fprintf(&text, " **%.3g** (%.3g–%.3g) |", median, slices.Min(all), slices.Max(all))
			} else {
				text.WriteString(" |")
			}
		}
		text.WriteString("\n")
	}
	for name, note := range r.notes {
		fmt.Fprintf(&text, "\n%s: %s.\n", name, note)
	}

	text.WriteString("\n| what | ratio or figure | bar | |\n|---|---|---|---|\n")
	for _, b := range bars {
		value, ok := r.median(oursName, b.figure)
		what := b.figure
		if b.other != "" {
			other, known := r.median(b.other, b.figure)
			ok = ok && known && other > 0
			value /= other
			what += " / " + b.other
		}
		if !ok {
			fmt.Fprintf(&text, "| %s | not measured here | | |\n", what)
			continue
		}
		sign, holds := "≤", value <= b.limit
		if b.least {
			sign, holds = "≥", value >= b.limit
		}
		fmt.Fprintf(&text, "| %s | %.2f | %s %.2f | %s |\n", what, value, sign, b.limit, map[bool]string{true: "✓", false: "✗"}[holds])
	}
	for _, figure := range []string{throughput1, throughput8} {
		ours, _ := r.median(oursName, figure)
		if limit, ok := r.median(routingName, figure); ok {
			fmt.Fprintf(&text, "| %s / %s | %.2f | | |\n", figure, routingName, ours/limit)
		}
	}
	return text.String()
}

// chart draws this program's and redsocks' costs as shares of the yardstick's. The
// colours can be read on a light ground and on a dark one.
func (r *results) chart() string {
	const left, width, row = 330, 380, 46
	drawn := []string{cpuConnection, cpuSlow, cpuExchange, cpuDown8, cpuUp8, idleMemory}
	var svg strings.Builder
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13" fill="#808080">`+"\n",
		left+width+70, 50+row*len(drawn))
	svg.WriteString(`<text x="10" y="20" font-size="15">Cost, as a share of the yardstick's (a goroutine a direction, io.Copy); less is better</text>` + "\n")
	for i, figure := range drawn {
		base, ok := r.median(yardstickName, figure)
		if !ok || base <= 0 {
			continue
		}
		y := 40 + i*row
		fmt.Fprintf(&svg, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", left-10, y+20, figure)
		for j, bar := range []struct{ name, colour string }{{oursName, "#2e8b57"}, {"redsocks", "#b8860b"}} {
			value, ok := r.median(bar.name, figure)
			if !ok {
				continue
			}
			share := value / base
			length := min(share, 1.3) / 1.3 * width
			fmt.Fprintf(&svg, `<rect x="%d" y="%d" width="%.0f" height="15" fill="%s"/><text x="%.0f" y="%d">%.2f %s</text>`+"\n",
				left, y+j*18, length, bar.colour, left+length+6, y+j*18+12, share, bar.name)
		}
	}
	fmt.Fprintf(&svg, `<line x1="%d" y1="32" x2="%d" y2="%d" stroke="#808080" stroke-dasharray="3"/>`+"\n</svg>\n",
		left+width*10/13, left+width*10/13, 40+row*len(drawn))
	return svg.String()
}
