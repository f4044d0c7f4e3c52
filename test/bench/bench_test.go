package main

import (
	"os"
	"os/exec"
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
	dir := t.TempDir()
	o := options{rounds: 1, scale: 0.01, write: dir + "/FIGURES.md", program: dir + "/program", loads: "connections,slow,exchanges,bulk,idle,steady"}
	build := exec.Command("go", "build", "-o", o.program, "../../cmd/transproxy-tproxy")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, output)
	}
	if err := bench(o); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("a distant proxy needs a TUN device: %v", err)
	}
	if err := benchDistant(o); err != nil {
		t.Fatal(err)
	}
}
