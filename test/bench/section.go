package main

import (
	"bytes"
	"fmt"
	"os"
	"slices"
)

// publish prints a text, and puts it into its section of a document if that has a name.
func publish(text, document, command, title string) error {
	if _, err := os.Stdout.WriteString(text); err != nil || document == "" {
		return err
	}
	whole, err := os.ReadFile(document)
	if err != nil {
		return err
	}
	begin := fmt.Appendf(nil, "<!-- begin: written by %s -->\n", command)
	end := fmt.Appendf(nil, "<!-- end: written by %s -->\n", command)
	before, rest, begins := bytes.Cut(whole, begin)
	_, after, ends := bytes.Cut(rest, end)
	if !begins || !ends {
		before, after = fmt.Appendf(whole, "\n## %s\n\n", title), nil
	}
	return os.WriteFile(document, slices.Concat(before, begin, []byte(text), end, after), 0o644)
}
