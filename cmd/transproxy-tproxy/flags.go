package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// errHelp asks for the help text instead of a run.
var errHelp = errors.New("help")

// parseFlags reads the command line over the environment over the defaults.
// Every error is one line that names the value and the remedy.
func parseFlags(table []option, arguments []string) (*settings, error) {
	s := &settings{install: true}
	for _, o := range table {
		if o.preset != "" {
			if err := o.set(s, o.preset); err != nil {
				return nil, fmt.Errorf("default of --%s: %w", o.name, err)
			}
		}
	}
	if err := checkEnvironment(table); err != nil {
		return nil, err
	}
	for _, o := range table {
		if value, set := os.LookupEnv(o.environment()); set && value != "" {
			if err := o.set(s, value); err != nil {
				return nil, fmt.Errorf("$%s: %w", o.environment(), err)
			}
		}
	}

	// The package flag takes one dash and two, which both the ancestor's users and
	// everyone else type; its messages are replaced by ones that say what to do.
	set := flag.NewFlagSet("transproxy-tproxy", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	var failure error
	for _, o := range table {
		store := func(value string) error {
			if err := o.set(s, value); err != nil && failure == nil {
				failure = fmt.Errorf("--%s: %w", o.name, err)
			}
			return failure
		}
		if o.value == "" {
			set.BoolFunc(o.name, o.help, store)
		} else {
			set.Func(o.name, o.help, store)
		}
	}
	err := set.Parse(arguments)
	switch {
	case failure != nil:
		return nil, failure
	case errors.Is(err, flag.ErrHelp):
		return nil, errHelp
	case err != nil:
		return nil, explainFlag(err, table)
	case set.NArg() > 0 && slices.Contains(commandNames, set.Arg(0)):
		return nil, fmt.Errorf("the command comes first: transproxy-tproxy %s [flags]", set.Arg(0))
	case set.NArg() > 0:
		return nil, fmt.Errorf("%q is not a flag: flags begin with --, see --help", set.Arg(0))
	}
	return s, nil
}

// explainFlag turns the message of package flag about an unknown or incomplete
// flag into one that names the nearest real flag.
func explainFlag(err error, table []option) error {
	text := err.Error()
	if name, found := strings.CutPrefix(text, "flag provided but not defined: -"); found {
		names := make([]string, 0, len(table))
		for _, o := range table {
			names = append(names, o.name)
		}
		return fmt.Errorf("--%s is not a flag%s (--help lists all)", name, suggest(name, "--", names))
	}
	if name, found := strings.CutPrefix(text, "flag needs an argument: -"); found {
		return fmt.Errorf("--%s needs a value: --%s VALUE", name, name)
	}
	return fmt.Errorf("%s: see --help", text)
}

// checkEnvironment refuses variables that look like ours and set nothing: a
// misspelt one would be overlooked for good.
func checkEnvironment(table []option) error {
	names := make([]string, 0, len(table))
	for _, o := range table {
		names = append(names, o.environment())
	}
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(name, environmentPrefix) && !slices.Contains(names, name) {
			return fmt.Errorf("$%s sets no flag%s (--help lists all)", name, suggest(name, "$", names))
		}
	}
	return nil
}

// suggest returns a question with the candidate that word was probably meant to
// be, or "" if none is near.
func suggest(word, prefix string, candidates []string) string {
	best, bestDistance := "", len(word)/3+2
	for _, candidate := range candidates {
		if distance := editDistance(word, candidate); distance < bestDistance {
			best, bestDistance = candidate, distance
		}
	}
	if best == "" {
		return ""
	}
	return ": did you mean " + prefix + best + "?"
}

// editDistance is the number of insertions, deletions and substitutions of bytes
// that turn a into b (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// helpColumn is where the text about a flag begins.
const helpColumn = 34

// writeHelp prints the commands and the flags, grouped by purpose.
func writeHelp(w io.Writer, table []option) {
	fmt.Fprint(w, `transproxy-tproxy lets machines with no proxy settings reach the network through an HTTP or SOCKS5 proxy.

Usage:
  sudo transproxy-tproxy [run] --upstream http://user:password@proxy:3128 [flags]

Commands:
  run      capture and carry traffic until it is stopped (the default)
  demo     show it at work in private namespaces; needs no root and no network
           (--shell then gives a shell on the client)
  rules    print the nftables rules and ip commands that run would install
  guard    refuse what run would capture, from before the network is up; a run with
           --fail closed takes it over and leaves it behind, until cleanup
  probe    ask the proxy what it allows, and print that and the flags to use; needs no
           root, changes nothing; status 0: usable, 1: not, 2: wrong command line
  cleanup  remove what a killed instance left in the kernel, and the guard
  version  print the version
`)
	for _, group := range groups {
		fmt.Fprintf(w, "\n%s:\n", group)
		for _, o := range table {
			if o.group != group || o.help == "" {
				continue
			}
			flag := "--" + o.name
			if o.value != "" {
				flag += " " + o.value
			}
			help := o.help
			if o.preset != "" && o.preset != "0" {
				help += " (default " + o.preset + ")"
			}
			line := fmt.Sprintf("  %-*s", helpColumn-len("  "), flag+" ")
			if len(line) > helpColumn {
				line, help = "  "+flag, "\n"+help
			}
			fmt.Fprintln(w, line+strings.ReplaceAll(help, "\n", "\n"+strings.Repeat(" ", helpColumn)))
		}
	}
	fmt.Fprint(w, `
One dash or two. Each flag also from the environment: --no-proxy is $TRANSPROXY_NO_PROXY.
SIGHUP lets a credential that the proxy refused be tried again and reopens the access log.
SIGTERM and SIGINT undo every change; a second one ends the program at once.
`)
}
