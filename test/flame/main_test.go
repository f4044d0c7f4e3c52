package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const recorded = `
gateway  12 [000]  1.0: 1 cpu-clock:
	ffff1 tcp_sendmsg+0x12 ([kernel.kallsyms])
	ffff2 handle_softirqs+0x1 ([kernel.kallsyms])
	ffff3 __x64_sys_sendto+0x1c ([kernel.kallsyms])
	4001 relay.(*loop).run+0x10 (/bin/gateway)

gateway  12 [000]  1.1: 1 cpu-clock:
	4002 relay.(*loop).pump+0x20 (/bin/gateway)
	4001 relay.(*loop).run+0x10 (/bin/gateway)

other  13 [000]  1.2: 1 cpu-clock:
	4009 main.main+0x20 (/bin/other)

`

func TestStacksAreCounted(t *testing.T) {
	root, shares, err := read(strings.NewReader(recorded), "gateway")
	if err != nil {
		t.Fatal(err)
	}
	run := root.callees["relay.(*loop).run"]
	if root.samples != 2 || run == nil || run.samples != 2 || run.callees["relay.(*loop).pump"].samples != 1 {
		t.Errorf("the tree has %d samples: %+v", root.samples, root.callees)
	}
	if got := *shares["sendto"]; got != (share{1, 1}) {
		t.Errorf("sendto has %+v", got)
	}
	if got := *shares[userShare]; got != (share{1, 0}) {
		t.Errorf("the program has %+v", got)
	}
}

func TestDrawing(t *testing.T) {
	out := filepath.Join(t.TempDir(), "flame.svg")
	if err := flame(strings.NewReader(recorded), "gateway", out); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"relay.(*loop).pump: 50.0 %", "__x64_sys_sendto: 50.0 %", "</svg>"} {
		if !strings.Contains(string(svg), want) {
			t.Errorf("the drawing lacks %q", want)
		}
	}
	if err := flame(strings.NewReader(recorded), "absent", out); err == nil {
		t.Error("a program without samples is no error")
	}
}
