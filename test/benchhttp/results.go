package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// requestFigures are those of requests.
type requestFigures struct{ rate, p99, cpu string }

// The figures.
var (
	keptFigures = requestFigures{
		"requests a second, kept connections", "p99 latency, kept connections, ms", "CPU a request, kept connections, µs",
	}
	closedFigures = requestFigures{
		"requests a second, a connection each", "p99 latency, a connection each, ms", "CPU a request, a connection each, µs",
	}
)

const (
	idleMemory      = "memory an idle connection, KiB"
	idleDescriptors = "descriptors an idle connection"
)

var figures = []string{
	keptFigures.rate, keptFigures.p99, keptFigures.cpu,
	closedFigures.rate, closedFigures.p99, closedFigures.cpu,
	idleMemory, idleDescriptors,
}

// bar is what this program has to reach: the ratio of its figure to that of other is
// at most limit, or at least.
type bar struct {
	figure, other string
	limit         float64
	least         bool
}

// bars ask to be no worse than either. Descriptors have none: all hold one for an idle
// connection, and some more for the connections to the proxy that the load happened
// to need.
func bars() (all []bar) {
	for _, other := range []string{squidName, reverseProxyName} {
		for _, requests := range []requestFigures{keptFigures, closedFigures} {
			all = append(all,
				bar{figure: requests.rate, other: other, limit: 1, least: true},
				bar{figure: requests.p99, other: other, limit: 1},
				bar{figure: requests.cpu, other: other, limit: 1})
		}
		all = append(all, bar{figure: idleMemory, other: other, limit: 1})
	}
	return all
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
	fmt.Fprintf(&text, "`make bench-http`, Linux %s, %d rounds, %s. %s with %d connections, %s a load, answers of %d bytes; medians, with the\n"+
		"least and the greatest of all rounds. Namespaces, reno, client and server on the same processors. Every gateway passes the requests to\n"+
		"the same stand-in proxy, in absolute form and on kept connections, behind the same rules, and logs none. Processor time is user and\n"+
		"system of the gateway's processes; memory (PSS) and descriptors are what %d connections add that rest after a request each.\n"+
		"wrk's latency does not include connecting. %s has `http_port … tproxy` and one worker; %s is go-transproxy's approach: a\n"+
		"server and a Transport of Go's library, with room for %d idle connections to the proxy. %s is the limit: nobody stands\nbetween client and server.\n\n",
		unix.ByteSliceToString(kernel.Release[:]), b.rounds, time.Now().Format(time.DateOnly), version("wrk", "-v"),
		connections, b.sizes.length, bodySize, b.sizes.idle, version("squid", "-v"), reverseProxyName, idleToProxy, routingName)
	columns := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return b.results[name] == nil })
	text.WriteString("| | " + strings.Join(columns, " | ") + " |\n|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, figure := range figures {
		text.WriteString("| " + figure + " |")
		for _, name := range columns {
			text.WriteString(" " + b.results.cell(name, figure) + " |")
		}
		text.WriteString("\n")
	}
	text.WriteString("\n| what | ratio | bar | |\n|---|---|---|---|\n")
	for _, bar := range bars() {
		ours, other := b.results[oursName][bar.figure], b.results[bar.other][bar.figure]
		if len(ours) == 0 || len(other) == 0 {
			continue
		}
		ratio, sign := median(ours)/median(other), "≤"
		holds := ratio <= bar.limit
		if bar.least {
			sign, holds = "≥", ratio >= bar.limit
		}
		fmt.Fprintf(&text, "| %s / %s | %.2f | %s %.2f | %s |\n", bar.figure, bar.other, ratio, sign, bar.limit,
			map[bool]string{true: "✓", false: "✗"}[holds])
	}
	return text.String()
}

// version is the name of a program and the version in the first line that it tells.
func version(program, flag string) string {
	output, _ := exec.Command(program, flag).CombinedOutput() // wrk's status is 1
	return firstVersion(program, string(output))
}

func firstVersion(program, output string) string {
	line, _, _ := strings.Cut(output, "\n")
	for word := range strings.FieldsSeq(line) {
		word = strings.TrimPrefix(word, "debian/")
		if word[0] >= '0' && word[0] <= '9' {
			return program + " " + word
		}
	}
	return program
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
	sectionBegin = "<!-- begin: written by make bench-http -->\n"
	sectionEnd   = "<!-- end: written by make bench-http -->\n"
)

// replaceSection puts text between the lines, at the end of the document if they are
// not in it.
func replaceSection(document []byte, text string) []byte {
	section := sectionBegin + text + sectionEnd
	before, rest, begins := bytes.Cut(document, []byte(sectionBegin))
	_, after, ends := bytes.Cut(rest, []byte(sectionEnd))
	if !begins || !ends {
		return slices.Concat(document, []byte("\n## Plain HTTP\n\n"), []byte(section))
	}
	return slices.Concat(before, []byte(section), after)
}
