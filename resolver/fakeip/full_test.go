package fakeip

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFullDisk runs fullDisk where a file system of its own can be mounted.
func TestFullDisk(t *testing.T) {
	command := exec.Command("/proc/self/exe")
	command.Env = append(os.Environ(), roleVariable+"=full", storeVariable+"="+t.TempDir())
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	output, err := command.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() == exitDenied, err != nil && !errors.As(err, &exit):
		t.Skipf("no user namespace to mount a file system in: %v %s", err, output)
	case err != nil:
		t.Fatalf("%v\n%s", err, output)
	}
}

// exitDenied is the status of a program that may not mount.
const exitDenied = 77

// fullDisk fills a small disk under a pool, three times, and returns the exit status of
// this program.
func fullDisk() int {
	directory := os.Getenv(storeVariable)
	if err := unix.Mount("tmpfs", directory, "tmpfs", 0, "size=256k"); err != nil {
		fmt.Println(err)
		return exitDenied
	}
	status := 0
	check := func(ok bool, format string, arguments ...any) {
		if !ok {
			fmt.Printf(format+"\n", arguments...)
			status = 1
		}
	}
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	ballast := filepath.Join(directory, "ballast")
	fill := func() {
		file, err := os.Create(ballast)
		must(err)
		defer file.Close()
		for err == nil {
			_, err = file.Write(make([]byte, 4096))
		}
	}

	var failures []error
	config := Config{
		IPv4: ipv4, IPv6: ipv6, Store: filepath.Join(directory, "store"),
		StoreFailed: func(err error) { failures = append(failures, err) },
	}
	p, err := Open(config)
	must(err)
	given := make(map[string]string)
	ask := func(from, to int) {
		for i := from; i < to; i++ {
			name := fmt.Sprintf("%d.test", i)
			address, _, err := p.Lookup(name)
			check(err == nil, "%s: %v", name, err)
			given[name] = address.String()
		}
	}
	reload := func() {
		must(p.Close())
		p, err = Open(config)
		must(err)
	}
	same := func(when string, all bool) {
		check(!all || len(p.table.byName) == len(given), "%s: %d names, want %d", when, len(p.table.byName), len(given))
		for name, at := range p.table.byName {
			address, _ := p.ranges.addresses(p.table.places[at].offset)
			check(given[name] == address.String(), "%s: %s has %s, had %q", when, name, address, given[name])
		}
	}

	ask(0, 10)
	check(len(failures) == 0, "failed with space left: %v", failures)
	fill()
	ask(0, 500) // the page that the store already has takes some of them
	check(len(failures) == 1 && errors.Is(failures[0], unix.ENOSPC) && strings.Contains(failures[0].Error(), config.Store),
		"full: %v", failures)
	p.tend()
	ask(500, 600)
	check(len(failures) == 1, "told more than once: %v", failures)

	// What a kill would leave now: some of the names, none of them wrong.
	text, err := os.ReadFile(config.Store)
	must(err)
	check(strings.HasSuffix(string(text), "\n"), "the store ends with %q", text[max(0, len(text)-100):])
	killed := newTable(1000)
	found, err := p.ranges.read(strings.NewReader(string(text)), func(e entry) { killed.restore(e) })
	check(err == nil && found == contents{}, "the store has %+v, %v", found, err)
	check(len(killed.byName) > 10 && len(killed.byName) < 500, "the store has %d names", len(killed.byName))

	must(os.Remove(ballast))
	p.tend()
	ask(600, 610)
	same("in memory", true)
	check(len(failures) == 1, "failed with space again: %v", failures)
	fill()
	ask(610, 1000)
	check(len(failures) == 2, "full for the second time: %v", failures)
	must(os.Remove(ballast))
	reload()
	check(len(p.Notes()) == 0, "notes: %v", p.Notes())
	same("after the first start", true)

	// A start with a full disk, from a store that ends with part of a line.
	must(p.Close())
	file, err := os.OpenFile(config.Store, os.O_WRONLY|os.O_APPEND, 0)
	must(err)
	_, err = file.WriteString("torn.test 198.18")
	must(err)
	must(file.Close())
	fill()
	p, err = Open(config)
	must(err)
	check(len(failures) == 3, "opened on a full disk: %v", failures)
	same("on a full disk", true)
	ask(1000, 1010)
	check(p.Close() != nil, "closed on a full disk")
	must(os.Remove(ballast))
	for name := range given {
		var number int
		fmt.Sscanf(name, "%d", &number)
		if number >= 1000 {
			delete(given, name) // these had nowhere to go
		}
	}
	p, err = Open(config)
	must(err)
	same("after the second start", true)
	check(len(failures) == 3, "failed: %v", failures)
	must(p.Close())
	return status
}
