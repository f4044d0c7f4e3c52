package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// usage is what a gateway has used and holds, with all processes that it has started.
type usage struct {
	cpu         time.Duration // user and system
	memory      int64         // bytes, proportional set size
	descriptors int
}

// measure reads the figures of a process and of those below it.
func measure(root int) (sum usage, err error) {
	pids, err := processTree(root)
	if err != nil {
		return sum, err
	}
	for _, pid := range pids {
		s, err := readStat(pid)
		if err != nil {
			return sum, err
		}
		if pid == root && s.ended {
			return sum, errors.New("it has ended")
		}
		memory, err := proportionalSet(pid)
		if err != nil {
			return sum, err
		}
		descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return sum, err
		}
		sum.cpu += s.cpu
		sum.memory += memory
		sum.descriptors += len(descriptors)
	}
	return sum, nil
}

// processTree is a process and all below it.
func processTree(root int) ([]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := make(map[int][]int)
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(file))
		if err != nil {
			return nil, err
		}
		if s, err := readStat(pid); err == nil { // others come and go
			children[s.parent] = append(children[s.parent], pid)
		}
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = slices.Concat(tree, children[tree[i]])
	}
	return tree, nil
}

// stat is what /proc/PID/stat says.
type stat struct {
	parent int
	ended  bool
	// cpu is that of its threads, ended ones too, and of the children that have ended.
	cpu time.Duration
}

func readStat(pid int) (stat, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	return parseStat(text)
}

// parseStat reads the fields 3, 4 and 14 to 17 (proc(5)).
func parseStat(text []byte) (s stat, err error) {
	// The second field is in parentheses and may hold anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 15 {
		return s, errors.New("the line of /proc/PID/stat is short")
	}
	s.ended = fields[0] == "Z"
	s.parent, err = strconv.Atoi(fields[1])
	for _, field := range fields[11:15] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return s, err
		}
		s.cpu += time.Duration(ticks) * time.Second / 100 // USER_HZ is 100 on every architecture of Go's
	}
	return s, err
}

// proportionalSet is the memory of a process in bytes: what it shares counts in parts.
func proportionalSet(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, "Pss:"); found {
			kilobytes, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB\n")), 10, 64)
			return kilobytes << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no memory", pid)
}
