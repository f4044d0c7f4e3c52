// Command transproxy-tproxy is a gateway that lets machines with no proxy
// settings reach the network through an HTTP or SOCKS5 proxy. This package alone knows all
// others: it reads the flags, works out what they mean on this host, and starts
// and stops the parts in their order.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
)

// version is set by the linker.
var version = "devel"

// Exit statuses.
const (
	exitFailure = 1
	exitUsage   = 2 // the command line or the environment is wrong; nothing was tried
)

func main() {
	arguments := takeArguments(os.Args[1:])
	if err := dispatch(arguments); err != nil {
		if status, silent := err.(exitStatus); silent {
			os.Exit(int(status))
		}
		fmt.Fprintln(os.Stderr, "transproxy-tproxy:", redact(err.Error(), arguments))
		var usage usageError
		if errors.As(err, &usage) {
			os.Exit(exitUsage)
		}
		os.Exit(exitFailure)
	}
}

// commandNames are the commands, for suggestions.
var commandNames = []string{"run", "demo", "rules", "guard", "cleanup", "probe", "version", "help"}

// usageError is a mistake in what the user wrote.
type usageError struct{ error }

// dispatch carries out one command line.
func dispatch(arguments []string) error {
	command := "run"
	if len(arguments) > 0 && !strings.HasPrefix(arguments[0], "-") {
		command, arguments = arguments[0], arguments[1:]
	}
	if command == "run" && len(arguments) == 1 && slices.Contains([]string{"-v", "-version", "--version"}, arguments[0]) {
		command, arguments = "version", nil
	}
	switch command {
	case "help", "version":
		if len(arguments) > 0 {
			return usageError{fmt.Errorf("%s takes no arguments, and not %q", command, arguments[0])}
		}
	}
	switch command {
	case "help":
		writeHelp(os.Stdout, options())
		return nil
	case "version":
		fmt.Printf("transproxy-tproxy %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return nil
	case "demo":
		return demo(arguments)
	case evaluatorCommand:
		return evaluate()
	}

	commands := map[string]func(*settings) error{"run": run, "rules": rules, "guard": guard, "cleanup": cleanUp, "probe": probeProxy}
	action, known := commands[command]
	if !known {
		return usageError{fmt.Errorf("%q is not a command%s (--help lists all)", command, suggest(command, "", commandNames))}
	}
	s, err := parseFlags(options(), arguments)
	if errors.Is(err, errHelp) {
		writeHelp(os.Stdout, options())
		return nil
	}
	if err != nil {
		return usageError{err}
	}
	s.auth.exposed = exposes(arguments)
	if s.probe.given != "" && command != "probe" {
		return usageError{fmt.Errorf("%s is a flag of probe: transproxy-tproxy probe %s", s.probe.given, s.probe.given)}
	}
	return action(s)
}
