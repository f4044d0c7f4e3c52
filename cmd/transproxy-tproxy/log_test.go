package main

import (
	"bufio"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
)

var record = tproxy.Record{
	Client:      netip.MustParseAddrPort("192.0.2.2:1"),
	Destination: netip.MustParseAddrPort("203.0.113.7:443"),
	Name:        "example.org", NameFrom: "sni", Way: "upstream", Err: errors.New("why"),
}

// TestAccessLogIsReopened: as after a rotation.
func TestAccessLogIsReopened(t *testing.T) {
	file := filepath.Join(t.TempDir(), "access.log")
	log, err := openAccessLog(&settings{accessLog: file, logFormat: "auto"}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	log.flow(record)
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	if err := log.reopen(); err != nil {
		t.Fatal(err)
	}
	log.flow(record)
	log.flow(record)
	log.close()
	log.flow(record) // late, and of no consequence
	for name, want := range map[string]int{file + ".1": 1, file: 2} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if lines := strings.Count(string(text), `"end":"why"`); lines != want {
			t.Errorf("%s has %d lines and not %d: %s", filepath.Base(name), lines, want, text)
		}
	}
}

// TestSlowReaderOfTheLogHoldsNothingUp: the lines that it cannot take are counted.
func TestSlowReaderOfTheLogHoldsNothingUp(t *testing.T) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	var lost atomic.Int64
	out := newSink("json", writer, func() { lost.Add(1) })
	logger := zerolog.New(out)
	const lines = 4 * logQueue
	start := time.Now()
	for range lines {
		logger.Log().Str("filler", strings.Repeat("x", 100)).Msg("")
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("writing took %v", took)
	}
	// Once it reads again the rest arrives.
	arrived := make(chan int)
	go func() {
		n := 0
		for scanner := bufio.NewScanner(reader); scanner.Scan(); n++ {
		}
		arrived <- n
	}()
	out.close()
	total, given := <-arrived, int(lost.Load())
	if given == 0 || total+given != lines {
		t.Errorf("%d lines arrived and %d are said to be lost, of %d", total, given, lines)
	}
}
