package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
)

// ancestor are the flags of go-transproxy, all of which are known here.
var ancestor = []string{
	"disable-iptables", "dns-over-https-enabled", "dns-over-https-endpoint", "dns-over-tcp-disabled", "dns-proxy-listen",
	"dns-tcp", "dns-udp", "explicit-proxy-listen", "explicit-proxy-only", "explicit-proxy-with-auth-listen",
	"http-proxy-listen", "https-proxy-listen", "loglevel", "private-dns", "public-dns", "tcp-proxy-dports", "tcp-proxy-listen",
}

func TestFlagsOfTheAncestorAreKnown(t *testing.T) {
	for _, name := range ancestor {
		_, err := parseFlags(options(), []string{"-" + name, "x"})
		if err != nil && strings.Contains(err.Error(), "-"+name+" is not a flag") {
			t.Errorf("-%s: %v", name, err)
		}
	}
}

func TestFlagsOverEnvironmentOverDefaults(t *testing.T) {
	t.Setenv("TRANSPROXY_TCP_PROXY_DPORTS", "25")
	t.Setenv("TRANSPROXY_IDLE_TIMEOUT", "1m")
	s, err := parseFlags(options(), []string{"-idle-timeout=2m", "--interface", "lan0,lan1"})
	if err != nil {
		t.Fatal(err)
	}
	if want := (netfilter.PortRange{First: 25, Last: 25}); !slices.Contains(s.ports, want) {
		t.Errorf("ports %v lack that of the environment", s.ports)
	}
	if s.idleTimeout != 2*time.Minute || s.peekTimeout != 5*time.Second || !slices.Equal(s.interfaces, []string{"lan0", "lan1"}) {
		t.Errorf("settings %+v", s)
	}
	t.Setenv("TRANSPROXY_FAIL", "perhaps")
	if _, err := parseFlags(options(), nil); err == nil || !strings.Contains(err.Error(), "$TRANSPROXY_FAIL") {
		t.Errorf("a wrong variable: %v", err)
	}
}

func TestEveryOptionIsDescribed(t *testing.T) {
	var help strings.Builder
	writeHelp(&help, options())
	for _, o := range options() {
		if !strings.Contains(help.String(), "--"+o.name) {
			t.Errorf("--%s is not in the help", o.name)
		}
		if !slices.Contains(groups, o.group) {
			t.Errorf("--%s is in no group", o.name)
		}
	}
	for line := range strings.Lines(help.String()) {
		if len(line) > 140 {
			t.Errorf("a line of the help has %d characters: %s", len(line), line)
		}
	}
}

func TestPasswordIsFound(t *testing.T) {
	for argument, want := range map[string]string{
		"http://user:secret@proxy:3128":            "secret",
		"--upstream=http://user:secret@proxy:3128": "secret",
		"-upstream=user:secret@proxy:3128":         "secret",
		"user:secret@proxy":                        "secret",
		"http://user:se@cr:et@proxy:3128":          "se@cr:et",
		"user:pa=ss@proxy":                         "pa=ss",
		"http://user@proxy:3128":                   "",
		"http://proxy:3128":                        "",
		"--loglevel":                               "",
		"10.0.0.0/8,example.org:443":               "",
	} {
		start, end, found := password(argument)
		if got := argument[start:end]; got != want || found != (want != "") {
			t.Errorf("%s: %q, %t; want %q", argument, got, found, want)
		}
	}
}

func TestSuggestions(t *testing.T) {
	var names []string
	for _, o := range options() {
		names = append(names, o.name)
	}
	for word, want := range map[string]string{
		"upstraem":       ": did you mean --upstream?",
		"no-porxy":       ": did you mean --no-proxy?",
		"tcp-prxy-dport": ": did you mean --tcp-proxy-dports?",
		"foo":            "",
		"verbose":        "",
	} {
		if got := suggest(word, "--", names); got != want {
			t.Errorf("%s: %q, want %q", word, got, want)
		}
	}
	t.Setenv("TRANSPROXY_UPSTREM", "http://x")
	if _, err := parseFlags(options(), nil); err == nil || !strings.Contains(err.Error(), "$TRANSPROXY_UPSTREAM") {
		t.Errorf("a misspelt variable: %v", err)
	}
}

// TestNoMessageHasAPassword: a URL may stand anywhere on a command line.
func TestNoMessageHasAPassword(t *testing.T) {
	for _, arguments := range [][]string{
		{"http://u:s3cret@p"},
		{"run", "--disable-iptables", "http://u:s3cret@p"},
		{"---upstream=http://u:s3cret@p"},
		{"demo", "http://u:s3cret@p"},
		{"--no-proxy", "http://u:s3cret@p"},
		{"--allow-clients", "http://u:s3cret@p"},
		{"--interface", "http://u:s3cret@p", "--upstream", "http://x"},
		{"--upstream", "ftp://u:s3cret@p"},
		{"--upstream", "http://u:s3cret/@p"},
		{"version", "http://u:s3cret@p"},
	} {
		err := dispatch(arguments)
		if err == nil {
			t.Errorf("%v: no error", arguments)
			continue
		}
		if text := redact(err.Error(), arguments); strings.Contains(text, "s3cret") {
			t.Errorf("%v: %s", arguments, text)
		}
	}
}

func TestMarksAreTheThreeBitsOfTheMask(t *testing.T) {
	want := marks{mask: 0x07000000, lan: 0x01000000, local: 0x02000000, bypass: 0x04000000}
	if got := splitMask(0x07000000); got != want {
		t.Errorf("%#v", got)
	}
	want = marks{mask: 0x80000101, lan: 0x1, local: 0x100, bypass: 0x80000000}
	if got := splitMask(0x80000101); got != want {
		t.Errorf("%#v", got)
	}
}
