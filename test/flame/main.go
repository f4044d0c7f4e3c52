// Command flame draws a flame graph of one program from the output of perf-script(1),
// and says which share of its processor time which system call has. `make profile`
// runs it.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"html"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	program := flag.String("program", "", "the program whose samples count, as perf names it: the first 15 bytes")
	out := flag.String("out", "flame.svg", "where to draw")
	flag.Parse()
	if err := flame(os.Stdin, *program, *out); err != nil {
		fmt.Fprintln(os.Stderr, "flame:", err)
		os.Exit(1)
	}
}

func flame(in io.Reader, program, out string) error {
	root, shares, err := read(in, program)
	if err != nil {
		return err
	}
	if root.samples == 0 {
		return fmt.Errorf("no sample of %q", program)
	}
	shares.print(os.Stdout, root.samples)
	return os.WriteFile(out, []byte(draw(root)), 0o644)
}

// frame is a function as called from the one above it.
type frame struct {
	samples int
	callees map[string]*frame
}

func (f *frame) callee(name string) *frame {
	if f.callees == nil {
		f.callees = make(map[string]*frame)
	}
	if f.callees[name] == nil {
		f.callees[name] = new(frame)
	}
	return f.callees[name]
}

// read takes the stacks of a program in. A sample is a line with the program's name
// and, below it, the stack from its top, a frame a line; an empty line ends it.
func read(in io.Reader, program string) (root *frame, s shares, err error) {
	root, s = new(frame), make(shares)
	var stack []string
	counts := false
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
			if counts && len(stack) > 0 {
				root.add(stack)
				s.add(stack)
			}
			stack, counts = nil, false
		case line[0] != ' ' && line[0] != '\t':
			counts = strings.HasPrefix(line, program)
		case len(fields) > 1:
			name, _, _ := strings.Cut(strings.Join(fields[1:], " "), "+0x")
			stack = append(stack, name)
		}
	}
	return root, s, lines.Err()
}

// add takes a stack in, whose top is its first.
func (f *frame) add(stack []string) {
	f.samples++
	for _, name := range slices.Backward(stack) {
		f = f.callee(name)
		f.samples++
	}
}

// shares are samples by system call; of each, those that were spent in what the
// kernel then did for the other side of the connection as well (softirq).
type shares map[string]*share

type share struct{ all, network int }

// userShare has what is no system call.
const userShare = "the program itself"

func (s shares) add(stack []string) {
	call, network := userShare, 0
	for _, name := range stack {
		if rest, ok := strings.CutPrefix(name, "__x64_sys_"); ok {
			call = rest
		}
		if strings.Contains(name, "softirq") {
			network = 1
		}
	}
	if s[call] == nil {
		s[call] = new(share)
	}
	s[call].all++
	s[call].network += network
}

func (s shares) print(out io.Writer, samples int) {
	percent := func(n int) float64 { return 100 * float64(n) / float64(samples) }
	names := slices.SortedFunc(maps.Keys(s), func(a, b string) int { return s[b].all - s[a].all })
	fmt.Fprintf(out, "%d samples\n\n| system call | share of the time | of it, packets on their way |\n|---|---|---|\n", samples)
	for _, name := range names {
		if percent(s[name].all) >= 0.5 {
			fmt.Fprintf(out, "| %s | %.1f %% | %.1f %% |\n", name, percent(s[name].all), percent(s[name].network))
		}
	}
}

// Sizes of the drawing, in pixels.
const (
	width     = 1200
	rowHeight = 17
	maxDepth  = 60
	least     = 0.5 // a narrower frame is left out
)

// draw makes the picture: callers below, callees above, width by samples. Hovering
// shows the name and the share.
func draw(root *frame) string {
	var body strings.Builder
	depth := root.draw(&body, "all", 0, 0, width/float64(root.samples), root.samples)
	height := (depth + 1) * rowHeight
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 %d %d %d" font-family="sans-serif" font-size="11">`,
		-height+rowHeight, width, height) + "\n" + body.String() + "</svg>\n"
}

// draw adds a frame and what it calls, and returns how many rows that took.
func (f *frame) draw(out *strings.Builder, name string, left float64, depth int, scale float64, all int) int {
	wide := float64(f.samples) * scale
	if wide < least || depth > maxDepth {
		return depth
	}
	// The kernel's functions have no dot, Go's have one: two shades.
	colour := "#e8a33d"
	if strings.Contains(name, ".") {
		colour = "#6aa5d8"
	}
	text := ""
	if fits := int(wide / 6.5); fits >= 3 {
		text = name[:min(len(name), fits)]
	}
	fmt.Fprintf(out, `<g><title>%s: %.1f %%</title><rect x="%.1f" y="%d" width="%.1f" height="%d" fill="%s" stroke="#fff" stroke-width=".4"/><text x="%.1f" y="%d">%s</text></g>`+"\n",
		html.EscapeString(name), 100*float64(f.samples)/float64(all), left, -depth*rowHeight, wide, rowHeight-1, colour,
		left+2, -depth*rowHeight+12, html.EscapeString(text))
	rows := depth
	for _, name := range slices.Sorted(maps.Keys(f.callees)) {
		callee := f.callees[name]
		rows = max(rows, callee.draw(out, name, left, depth+1, scale, all))
		left += float64(callee.samples) * scale
	}
	return rows
}
