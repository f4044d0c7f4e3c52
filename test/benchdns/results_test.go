package main

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"
	"time"
)

func TestDnsperfIsRead(t *testing.T) {
	const good = `DNS Performance Testing Tool
Version 2.10.0

[Status] Stopping after 1.000000 seconds
> NOERROR a.example A 0.001011
> NOERROR b.example A 0.000654
[Status] Testing complete (time limit)

Statistics:

  Queries sent:         2
  Queries completed:    2 (100.00%)
  Queries lost:         0 (0.00%)

  Response codes:       NOERROR 2 (100.00%)
  Average packet size:  request 27, response 43
  Run time (s):         1.000425
  Queries per second:   1.999150
`
	a, err := parse(strings.NewReader(good))
	if err != nil || a.queries != 2 || a.perSecond != 1.99915 || percentile(a.latencies, 99) != 1011*time.Microsecond {
		t.Errorf("%v, %+v", err, a)
	}
	for name, text := range map[string]string{
		"lost queries":  strings.Replace(good, "lost:         0 (0.00%)", "lost:         1 (50.00%)", 1),
		"failures":      strings.Replace(good, "NOERROR 2 (100.00%)", "SERVFAIL 2 (100.00%)", 1),
		"some failures": strings.Replace(good, "NOERROR 2 (100.00%)", "NOERROR 1 (50.00%), SERVFAIL 1 (50.00%)", 1),
		"no statistics": good[:100],
	} {
		if a, err := parse(strings.NewReader(text)); err == nil {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func TestSectionIsReplaced(t *testing.T) {
	const hand = "# Figures\n\nBy hand.\n"
	first := string(replaceSection([]byte(hand), "one\n"))
	if want := hand + "\n## DNS\n\n" + sectionBegin + "one\n" + sectionEnd; first != want {
		t.Errorf("added: %q", first)
	}
	second := string(replaceSection([]byte(first+"After.\n"), "two\n"))
	if want := hand + "\n## DNS\n\n" + sectionBegin + "two\n" + sectionEnd + "After.\n"; second != want {
		t.Errorf("replaced: %q", second)
	}
}

func TestStandInAnswers(t *testing.T) {
	query, _ := hex.DecodeString("abcd01000001000000000001" + "0161076578616d706c6500" + "00010001" + "0000290400000080000000")
	want := "abcd81800001000100000000" + "0161076578616d706c6500" + "00010001" + "c00c0001000100000e100004cb00711b"
	if got := hex.EncodeToString(answer(nil, query)); got != want {
		t.Errorf("answer %s", got)
	}
	for length := range len(query) - 11 {
		answer(nil, query[:length]) // never panics
	}
	query[2] |= 0x80
	if answer(nil, query) != nil {
		t.Error("an answer is answered")
	}
}

func TestProcessorTimeIsRead(t *testing.T) {
	before, err := cpu(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if after, err := cpu(os.Getpid()); err != nil || after > before {
			return
		}
	}
	t.Error("five seconds of work do not count")
}

func TestFiguresAreReadable(t *testing.T) {
	for value, want := range map[float64]string{0.1234: "0.123", 15.31: "15.3", 1234: "1,230", 50_666: "50,700", 123_456: "123,000", 1_234_567: "1,230,000", 999.9: "1,000", 99.97: "100", 523.4: "523"} {
		if got := readable(value); got != want {
			t.Errorf("%v is %s and not %s", value, got, want)
		}
	}
}
