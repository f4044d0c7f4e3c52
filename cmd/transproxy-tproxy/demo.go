package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// exitStatus ends the program with a status and no further word.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// demo shows the program at work between hosts in private namespaces.
func demo(arguments []string) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	shell := flags.Bool("shell", false, "")
	switch err := flags.Parse(arguments); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Println("Usage: transproxy-tproxy demo [--shell]\n\n  --shell  after the checks, a shell on the client; leave it to end the demo")
		return nil
	case err != nil || flags.NArg() > 0:
		return usageError{fmt.Errorf("demo %s: it takes no argument but --shell", strings.Join(arguments, " "))}
	}
	status, err := netns.Run(func() int {
		held, err := perform(os.Stdout, *shell)
		if err != nil {
			fmt.Fprintf(os.Stderr, "transproxy-tproxy: demo: %v\n", err)
		}
		if err != nil || !held {
			return exitFailure
		}
		return 0
	})
	if err == nil && status != 0 {
		return exitStatus(status)
	}
	return err
}

// perform sets the stage, runs the checks, prints what everyone saw, and says
// whether all checks held.
func perform(out io.Writer, shell bool) (held bool, err error) {
	s, err := newStage()
	if err != nil {
		return false, err
	}
	defer s.close()
	fmt.Fprintf(out, `
  client ─────────────── gateway ─────────────── proxy ─────────────── origin
  %-22s %-23s %-21s %s
  no proxy settings      this program            demands a password    no other way to it

`, lab.Client4, lab.Gateway4, lab.Proxy4, lab.Origin4)

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "  CHECK\tRESULT\tSEEN")
	held = true
	for _, check := range s.checks() {
		seen, err := check.run()
		result := "ok"
		if err != nil {
			result, seen, held = "FAILED", err.Error(), false
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\n", check.name, result, seen)
	}
	if err := table.Flush(); err != nil {
		return false, err
	}

	fmt.Fprintf(out, "\n  What each host saw\n")
	fmt.Fprintf(out, "    proxy    %s\n", strings.Join(s.asked(), "\n             "))
	fmt.Fprintf(out, "             %d requests with a wrong password, %d without one\n", s.proxy.Refused(), s.proxy.Demanded())
	fmt.Fprintf(out, "    origin   %d connections, all from the proxy\n", len(s.origin.Sources()))
	fmt.Fprintf(out, "    gateway  its access log:\n")
	for _, line := range s.program.accessLines() {
		fmt.Fprintf(out, "             %s\n", line)
	}
	if !held {
		fmt.Fprintf(out, "\n  The program said:\n%s\n", s.program.output)
	}
	if shell {
		return held, s.shell(out)
	}
	return held, nil
}

// shell runs a shell on the client, with a gateway at work.
func (s *stage) shell(out io.Writer) error {
	if err := s.start(); err != nil {
		return err
	}
	path := os.Getenv("SHELL")
	if path == "" {
		path = "/bin/sh"
	}
	fmt.Fprintf(out, `
  This shell is on the client; there is no DNS in it. Try:
    curl -k --resolve %[1]s:443:%[2]s https://%[1]s/
    curl -g http://[%[3]s]/
  and leave it with exit.

`, demoName, lab.Origin4, lab.Origin6)
	command := exec.Command(path)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	command.Env = append(os.Environ(), "PS1=client$ ")
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	err := s.lab.Client.Do(command.Run)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // the status of the last command typed
	}
	return err
}
