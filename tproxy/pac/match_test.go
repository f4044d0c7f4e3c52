//go:build !nopac

package pac

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// FuzzShellMatch compares with the regular expression that browsers make of a
// pattern, here by an engine with linear time.
func FuzzShellMatch(f *testing.F) {
	for _, seed := range [][2]string{
		{"www.example", "*.example"},
		{"", ""},
		{"", "*"},
		{"a", "?"},
		{"ab", "a*b*"},
		{"aXb", "a?b"},
		{"a.b", "a.b"},
		{"aab", "*a*b"},
		{"mississippi", "m*issip*"},
		{"[x]", "[x]"},
		{"ä", "?"},
		{"a\nb", "a*b"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, text, pattern string) {
		if len(text)+len(pattern) > 200 {
			t.Skip("long")
		}
		text, pattern = strings.ToValidUTF8(text, "."), strings.ToValidUTF8(pattern, ".")
		quoted := regexp.QuoteMeta(pattern)
		quoted = strings.ReplaceAll(strings.ReplaceAll(quoted, `\*`, ".*"), `\?`, ".")
		want := regexp.MustCompile(`(?s)\A` + quoted + `\z`).MatchString(text)
		if got := shellMatch([]rune(text), []rune(pattern)); got != want {
			t.Errorf("shExpMatch(%q, %q) = %v", text, pattern, got)
		}
	})
}

func TestShellMatchOfAHostilePattern(t *testing.T) {
	text, pattern := []rune(strings.Repeat("a", 10_000)), []rune(strings.Repeat("*a", 1000)+"b")
	start := time.Now()
	if shellMatch(text, pattern) {
		t.Error("it matches")
	}
	if took := time.Since(start); took > runLimit {
		t.Errorf("it took %v", took)
	}
}
