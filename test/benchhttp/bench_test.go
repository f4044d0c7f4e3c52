//go:build interop

package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	// The reverse proxy is this program, started again with its name.
	if len(os.Args) == 2 && os.Args[1] == reverseProxyName {
		main()
		return
	}
	status, err := inSandbox(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		status = 1
	}
	os.Exit(status)
}

// TestBenchWorks takes every figure once, of small loads, so that the benchmark does
// not rot. It says nothing about the figures.
func TestBenchWorks(t *testing.T) {
	dir := t.TempDir()
	o := options{rounds: 1, scale: 0.05, write: dir + "/FIGURES.md", program: dir + "/program", loads: strings.Join(loadNames(), ",")}
	build := exec.Command("go", "build", "-o", o.program, "../../cmd/transproxy-tproxy")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, output)
	}
	if err := bench(o); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(o.write)
	if err != nil {
		t.Fatal(err)
	}
	for _, bar := range bars() {
		if !strings.Contains(string(text), "| "+bar.figure+" / "+bar.other+" |") {
			t.Errorf("%s is not compared with that of %s:\n%s", bar.figure, bar.other, text)
		}
	}
}
