package main

import (
	"os"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestMain(m *testing.M) {
	// The yardstick is this program, started again with its name.
	if len(os.Args) == 2 && os.Args[1] == yardstickName {
		main()
		return
	}
	os.Exit(netns.Main(m))
}

// TestBenchWorks takes every figure once, of tiny loads, so that the benchmark does
// not rot. It says nothing about the figures.
func TestBenchWorks(t *testing.T) {
	if err := bench(1, 0.01, t.TempDir()+"/FIGURES.md"); err != nil {
		t.Fatal(err)
	}
}
