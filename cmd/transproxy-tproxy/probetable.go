package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// write prints the findings, a line each, and the command line to use; on a terminal with
// marks before the words.
func (p probed) write(w io.Writer, terminal bool) error {
	var text strings.Builder
	findings := gathered(p.Findings)
	widest := 0
	for _, f := range findings {
		widest = max(widest, utf8.RuneCountInString(f.Asked))
	}
	for _, f := range findings {
		mark := ""
		if terminal {
			mark = map[probe.Verdict]string{probe.Yes: "✓ ", probe.No: "✗ ", probe.Unclear: "? ", probe.Skipped: "- "}[f.Verdict]
		}
		fmt.Fprintf(&text, "  %s%-7s  %-*s  %s\n", mark, f.Verdict, widest, f.Asked, f.Proof)
	}
	if p.Usable {
		fmt.Fprintf(&text, "\nThe flags to use:\n\n  sudo transproxy-tproxy %s\n", commandLine(p.Flags))
		if p.credential {
			text.WriteString("\nwith the user name and the password, which are left out here: --upstream scheme://user:password@host:port,\n" +
				"in a file (--upstream-credentials), or the whole URL in TRANSPROXY_UPSTREAM (sudo drops https_proxy).\n")
		}
	} else {
		text.WriteString("\nThe proxy cannot be used:\n")
	}
	if len(p.Notes) > 0 {
		text.WriteString("\n")
	}
	for _, note := range p.Notes {
		fmt.Fprintf(&text, "  - %s\n", note)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// gathered are the findings with one line for all that were skipped for the same reason.
func gathered(findings []probe.Finding) []probe.Finding {
	var lines []probe.Finding
	var skipped []probe.Finding
	count := map[string]int{}
	for _, f := range findings {
		switch {
		case f.Verdict != probe.Skipped:
			lines = append(lines, f)
		case count[f.Proof] == 0:
			skipped = append(skipped, f)
			fallthrough
		default:
			count[f.Proof]++
		}
	}
	for _, f := range skipped {
		if n := count[f.Proof]; n > 1 {
			f.Asked = fmt.Sprintf("%d other checks", n)
		}
		lines = append(lines, f)
	}
	return lines
}

// commandLine are words as a shell reads them.
func commandLine(words []string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/:,@%=+"
	quoted := make([]string, len(words))
	for i, word := range words {
		quoted[i] = word
		if word == "" || strings.Trim(word, plain) != "" {
			quoted[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}
