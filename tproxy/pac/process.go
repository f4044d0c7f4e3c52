package pac

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
)

// services are what an evaluator may ask for.
type services interface {
	resolve(ctx context.Context, host string) []netip.Addr
	addresses() []netip.Addr
	alert(text string)
}

// errMemory is the death of an evaluator for want of memory.
var errMemory = fmt.Errorf("the script took more than %d MiB of memory: is there a string or a list that grows without an end?", maxMemory>>20)

// evaluatorProcess is a process with one version of the script.
type evaluatorProcess struct {
	script   *version
	command  *exec.Cmd
	in       io.WriteCloser
	out      io.ReadCloser
	complain *complaint
	answered int         // calls of the script
	hung     atomic.Bool // it was killed because its time was up
}

// startEvaluator starts a process. It gets nothing of the environment, in which
// there may be passwords, but the time zone.
func startEvaluator(command []string, script *version) (*evaluatorProcess, error) {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = "/"
	// Two threads: one computes, one sees that the program has ended.
	cmd.Env = []string{"GOTRACEBACK=none", "GOMAXPROCS=2"}
	if zone, set := os.LookupEnv("TZ"); set {
		cmd.Env = append(cmd.Env, "TZ="+zone)
	}
	process := &evaluatorProcess{script: script, command: cmd, complain: new(complaint)}
	cmd.Stderr = process.complain
	var err error
	if process.in, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("start the PAC evaluator: %w", err)
	}
	if process.out, err = cmd.StdoutPipe(); err != nil {
		return nil, fmt.Errorf("start the PAC evaluator: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the PAC evaluator: %w", err)
	}
	return process, nil
}

// ask puts one question (load or find) and serves the evaluator until it has
// answered. After an error the process is gone; it is errMemory where that
// was the cause.
func (e *evaluatorProcess) ask(ctx context.Context, question message, host services) (message, error) {
	allowed := question.limit() + killGrace
	var limit stopwatch
	limit.start(allowed, func() {
		e.hung.Store(true)
		e.kill()
	})
	defer limit.stop()
	lookups, cancel := context.WithTimeout(ctx, lookupLimit)
	defer cancel()

	answer, err := e.converse(question, host, &limit, lookups)
	if err != nil {
		e.kill()
		e.wait()
		switch {
		case e.hung.Load():
			return message{}, fmt.Errorf("the script did not answer within %v: is there a loop or a regular expression without an end?", allowed)
		case e.complain.ofMemory():
			return message{}, errMemory
		case ctx.Err() != nil:
			return message{}, context.Cause(ctx)
		}
		return message{}, fmt.Errorf("the PAC evaluator ended (%v) %s", err, e.complain)
	}
	return answer, nil
}

// converse is the dialogue of one evaluation.
func (e *evaluatorProcess) converse(question message, host services, limit *stopwatch, lookups context.Context) (message, error) {
	if err := send(e.in, question); err != nil {
		return message{}, err
	}
	for {
		m, err := receive(e.out, maxFromEvaluator)
		if err != nil {
			return message{}, err
		}
		switch m.Kind {
		case kindDone:
			return m, nil
		case kindAlert:
			host.alert(m.Text)
			continue
		}

		var found []netip.Addr
		limit.pause()
		switch m.Kind {
		case kindResolve:
			found = host.resolve(lookups, m.Host)
		case kindAddresses:
			found = host.addresses()
		default:
			return message{}, errors.New("a message of an unknown kind")
		}
		limit.resume()
		answer := message{Kind: kindAnswer}
		for _, address := range found {
			answer.Addresses = append(answer.Addresses, address.String())
		}
		if err := send(e.in, answer); err != nil {
			return message{}, err
		}
	}
}

// kill ends the process, if it has not ended yet.
func (e *evaluatorProcess) kill() {
	// The error is that it has ended, which is what is wanted.
	_ = e.command.Process.Kill()
}

// wait returns when the process is gone and what it held is free.
func (e *evaluatorProcess) wait() {
	// It was killed or has failed: how it ended is known better from elsewhere.
	_ = e.command.Wait()
}

// complaint keeps the beginning of what a process writes to its standard error.
type complaint struct {
	mutex sync.Mutex
	text  bytes.Buffer
}

// maxComplaint bounds it in bytes: the line that says why the Go runtime gave up,
// and not the dump behind it.
const maxComplaint = 1024

func (c *complaint) Write(p []byte) (int, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.text.Write(p[:min(len(p), maxComplaint-c.text.Len())])
	return len(p), nil
}

// String is the first line.
func (c *complaint) String() string {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	line, _, _ := strings.Cut(c.text.String(), "\n")
	return line
}

// ofMemory tells whether the Go runtime gave up for want of memory: in words, or,
// where it has none to say them, by a fault inside itself.
func (c *complaint) ofMemory() bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	text := c.text.String()
	for _, sign := range []string{"out of memory", "cannot allocate memory", "SIGSEGV", "stack overflow", "stack exceeds"} {
		if strings.Contains(text, sign) {
			return true
		}
	}
	return false
}
