//go:build !nopac

package pac

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// evaluatorCommand is the command line of the tests' evaluators.
var evaluatorCommand []string

// TestMain lets the test's own binary be the evaluator, as the program's is.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "evaluate" {
		if err := Evaluate(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "pac")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	file, err := evaluatorFile(dir)
	if err != nil {
		panic(err)
	}
	evaluatorCommand = []string{file, "evaluate"}
	return m.Run()
}

// names are what the tests' resolver knows.
var names = map[string][]string{
	"inside.example":   {"10.1.2.3"},
	"outside.example":  {"203.0.113.77"},
	"two.example":      {"198.51.100.2", "2001:db8::2"},
	"six.example":      {"2001:db8::6"},
	"slow.example":     {"10.9.9.9"},
	"script.example":   {"127.0.0.1"},
	"prefixed.example": {"2001:db8::77"},
}

// resolver counts what it is asked.
type resolver struct{ asked atomic.Int64 }

func (r *resolver) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	r.asked.Add(1)
	if strings.HasPrefix(host, "dead") {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if host == "slow.example" {
		time.Sleep(runLimit + runLimit/2) // longer than a script may compute
	}
	if strings.HasSuffix(host, ".many.example") {
		return []netip.Addr{netip.MustParseAddr("192.0.2.9")}, nil
	}
	var found []netip.Addr
	for _, text := range names[host] {
		found = append(found, netip.MustParseAddr(text))
	}
	if found == nil {
		return nil, errors.New("no such name")
	}
	return found, nil
}

// configure is what every test's script gets.
func configure(location string, names *resolver) Config {
	return Config{
		Location:  location,
		Evaluator: evaluatorCommand,
		Resolve:   names.resolve,
		Addresses: func() []netip.Addr {
			return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
		},
		Logger: zerolog.Nop(),
	}
}

// open opens a script for the time of a test.
func open(t testing.TB, location string) *Script {
	t.Helper()
	s, err := Open(t.Context(), configure(location, new(resolver)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// write puts a script into a file.
func write(t testing.TB, text string) string {
	t.Helper()
	name := t.TempDir() + "/proxy.pac"
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// show writes choices as the tables of the tests do.
func show(choices []Choice) string {
	var texts []string
	for _, choice := range choices {
		if choice.Direct {
			texts = append(texts, "direct")
			continue
		}
		texts = append(texts, choice.Proxy)
	}
	return strings.Join(texts, " ")
}
