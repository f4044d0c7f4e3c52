//go:build !nopac

package pac

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"github.com/dop251/goja"
	"github.com/dop251/goja/parser"
	"golang.org/x/sys/unix"
)

// built says whether this build can evaluate scripts.
const built = true

const (
	// heapTarget is where the collector begins to work harder, in bytes: half of
	// what maxMemory leaves above what the Go runtime maps for itself (42 MiB).
	heapTarget = 40 << 20

	// maxStack bounds a goroutine's stack in bytes: a script that is nested too
	// deeply for the parser ends the process here and not at Go's 1 GB.
	maxStack = 16 << 20

	// maxCalls bounds the depth of calls in a script. Real ones nest a few; those
	// that pass through a function of the library (map, replace, toString) take
	// about 2 KiB of stack each.
	maxCalls = 1000
)

// Evaluate is what the process does that Config.Evaluator starts: it evaluates
// scripts on behalf of the program that started it, which talks to it on in and
// out, the process's standard input and output. It first lowers what the process
// may use (memory, files) for good, so it is of use in a process of its own only.
// It returns nil when in ends, which may be in the middle of an evaluation; the
// process is to end then.
func Evaluate(in io.Reader, out io.Writer) error {
	if err := confine(); err != nil {
		return err
	}
	e := &evaluator{out: out, incoming: make(chan message)}
	failed := make(chan error, 1)
	go func() { failed <- e.serve() }()
	for {
		m, err := receive(in, maxToEvaluator)
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		select {
		case e.incoming <- m:
		case err := <-failed:
			return err
		}
	}
}

// confine bounds what this process can use of the machine. The kernel holds the
// bound on memory: RLIMIT_DATA counts what can be written to, and not, as
// RLIMIT_AS would, the address space that the Go runtime reserves.
func confine() error {
	debug.SetMemoryLimit(heapTarget)
	debug.SetMaxStack(maxStack)
	// The Go runtime opens the time zone's file and a descriptor to wait on when it
	// first needs them, which later it cannot any more.
	_, _ = time.Now().Zone()
	time.AfterFunc(time.Hour, func() {}).Stop()
	for _, limit := range []struct {
		resource int
		name     string
		most     uint64
	}{
		{unix.RLIMIT_DATA, "RLIMIT_DATA", maxMemory},
		{unix.RLIMIT_NOFILE, "RLIMIT_NOFILE", 0}, // no file or socket any more; what is open stays
		{unix.RLIMIT_CORE, "RLIMIT_CORE", 0},
	} {
		if err := unix.Setrlimit(limit.resource, &unix.Rlimit{Cur: limit.most, Max: limit.most}); err != nil {
			return fmt.Errorf("set %s to %d: %w", limit.name, limit.most, err)
		}
	}
	return nil
}

// evaluator is the one script of the process and the dialogue about it.
type evaluator struct {
	out      io.Writer
	incoming chan message

	runtime *goja.Runtime
	find    goja.Callable

	// Of the evaluation under way:
	stopwatch stopwatch
	lookups   int
	known     map[string][]string // addresses already asked for
	alerts    int
	varies    bool
	broken    error // the dialogue has failed
}

// serve answers the program's messages, one at a time.
func (e *evaluator) serve() error {
	for m := range e.incoming {
		done := message{Kind: kindDone}
		e.begin(m.limit())
		var err error
		switch m.Kind {
		case kindLoad:
			err = e.load(m.Name, m.Text)
		case kindFind:
			done.Text, err = e.call(m.URL, m.Host)
		default:
			err = fmt.Errorf("a message of the unknown kind %.20q", string(m.Kind))
		}
		e.end()
		if e.broken != nil {
			return e.broken
		}
		if err != nil {
			done.Text, done.Error = "", oneLine(describe(err))
		}
		done.Varies = e.varies
		if err := send(e.out, done); err != nil {
			return err
		}
	}
	return nil
}

// load compiles and runs a script.
func (e *evaluator) load(name, text string) error {
	if e.runtime != nil {
		return errors.New("a second script for one process")
	}
	// A comment can name a source map, which goja would read from the disk.
	tree, err := parser.ParseFile(nil, name, text, 0, parser.WithDisableSourceMaps)
	if err != nil {
		return err
	}
	program, err := goja.CompileAST(tree, false)
	if err != nil {
		return err
	}
	e.runtime = goja.New()
	e.runtime.SetParserOptions(parser.WithDisableSourceMaps)
	e.runtime.SetMaxCallStackSize(maxCalls)
	e.runtime.SetTimeSource(e.now)
	e.runtime.SetRandSource(func() float64 {
		e.varies = true
		return rand.Float64()
	})
	if err := e.install(); err != nil {
		return err
	}
	e.begin(startLimit) // now there is a runtime to interrupt
	if _, err := e.runtime.RunProgram(program); err != nil {
		return err
	}
	for _, function := range []string{"FindProxyForURLEx", "FindProxyForURL"} {
		if find, ok := goja.AssertFunction(e.runtime.Get(function)); ok {
			e.find = find
			return nil
		}
	}
	return fmt.Errorf("%s: there is no function FindProxyForURL(url, host): is this a PAC script?", name)
}

// call asks the script; it returns its answer as it is.
func (e *evaluator) call(url, host string) (string, error) {
	if e.find == nil {
		return "", errors.New("no script is loaded")
	}
	value, err := e.find(goja.Undefined(), e.runtime.ToValue(url), e.runtime.ToValue(host))
	if err != nil {
		return "", err
	}
	if goja.IsNull(value) || goja.IsUndefined(value) {
		return "", nil
	}
	text, ok := value.Export().(string)
	if !ok {
		return "", fmt.Errorf("the script returned %s and not a string: return \"PROXY host:port\" or \"DIRECT\"", value.ExportType())
	}
	if len(text) > maxResult {
		return "", fmt.Errorf("the script returned %d bytes: at most %d are read", len(text), maxResult)
	}
	return text, nil
}

// begin starts the account of an evaluation.
func (e *evaluator) begin(limit time.Duration) {
	e.lookups, e.alerts, e.varies = 0, 0, false
	e.known = make(map[string][]string)
	if e.runtime != nil {
		e.runtime.ClearInterrupt()
		e.stopwatch.start(limit, func() { e.runtime.Interrupt(limit) })
	}
}

// end closes the account.
func (e *evaluator) end() { e.stopwatch.stop() }

// now is the time that a script sees.
func (e *evaluator) now() time.Time {
	e.varies = true
	return time.Now()
}

// ask puts a question to the program and returns the addresses that it answers.
// The time until then is not counted as the script's.
func (e *evaluator) ask(question message) []string {
	if e.broken != nil {
		return nil
	}
	e.stopwatch.pause()
	defer e.stopwatch.resume()
	if e.broken = send(e.out, question); e.broken != nil {
		return nil
	}
	answer := <-e.incoming
	if answer.Kind != kindAnswer {
		e.broken = fmt.Errorf("a message %.20q in place of an answer", string(answer.Kind))
		return nil
	}
	return answer.Addresses
}

// describe says what failed and, where goja knows it, at which line of the script.
func describe(err error) string {
	var interrupted *goja.InterruptedError
	if errors.As(err, &interrupted) {
		return fmt.Sprintf("%sthe script ran for more than %v and was interrupted: is there a loop without an end?", where(&interrupted.Exception), interrupted.Value())
	}
	var overflow *goja.StackOverflowError
	if errors.As(err, &overflow) {
		return fmt.Sprintf("%smore than %d nested calls: is there a recursion without an end?", where(&overflow.Exception), maxCalls)
	}
	var thrown *goja.Exception
	if errors.As(err, &thrown) {
		return where(thrown) + "the script threw " + thrown.Value().String()
	}
	var list parser.ErrorList
	if errors.As(err, &list) && len(list) > 0 {
		return fmt.Sprintf("%s:%d:%d: %s: is this a PAC script?", list[0].Position.Filename, list[0].Position.Line, list[0].Position.Column, list[0].Message)
	}
	var syntax *goja.CompilerSyntaxError
	if errors.As(err, &syntax) && syntax.File != nil {
		at := syntax.File.Position(syntax.Offset)
		return fmt.Sprintf("%s:%d:%d: %s", at.Filename, at.Line, at.Column, syntax.Message)
	}
	return err.Error()
}

// where is "file:line:column: " of the innermost call in the script.
func where(thrown *goja.Exception) string {
	for _, frame := range thrown.Stack() {
		if at := frame.Position(); at.Line > 0 {
			return fmt.Sprintf("%s:%d:%d: ", frame.SrcName(), at.Line, at.Column)
		}
	}
	return ""
}

// oneLine makes a line of what a script, or its author, has worded.
func oneLine(text string) string {
	const most = 400 // bytes
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
}
