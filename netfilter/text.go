package netfilter

import (
	"fmt"
	"strings"
)

// Text returns what [Handle.Apply] installs, as text that nft -f loads, but for the owner flag: an owner's table would go
// when nft ends. Loading replaces the tables, again and again. c is valid.
func Text(c Config) string {
	tables := []table{captureTable(&c)}
	if c.FailClosed {
		tables = append(tables, guardTable(&c))
	}
	var text strings.Builder
	for i, t := range tables {
		if i > 0 {
			text.WriteByte('\n')
		}
		fmt.Fprintf(&text, "table inet %s\ndelete table inet %[1]s\n", t.name)
		t.write(&text)
	}
	return text.String()
}

func (t table) write(text *strings.Builder) {
	fmt.Fprintf(text, "table inet %s {\n", t.name)
	for _, s := range t.sets {
		s.write(text)
		text.WriteByte('\n')
	}
	for i, c := range t.chains {
		if i > 0 {
			text.WriteByte('\n')
		}
		c.write(text)
	}
	text.WriteString("}\n")
}

func (s set) write(text *strings.Builder) {
	fmt.Fprintf(text, "\tset %s {\n\t\ttype %s\n", s.name, s.kind.Name)
	if s.interval {
		text.WriteString("\t\tflags interval\n")
	}
	fmt.Fprintf(text, "\t\tcomment %q\n", s.comment)
	if len(s.elements) > 0 {
		text.WriteString("\t\telements = {\n")
		for _, e := range s.elements {
			fmt.Fprintf(text, "\t\t\t%s,\n", e.text)
		}
		text.WriteString("\t\t}\n")
	}
	text.WriteString("\t}\n")
}

func (c chain) write(text *strings.Builder) {
	fmt.Fprintf(text, "\tchain %s {\n", c.name)
	if c.hook != nil {
		fmt.Fprintf(text, "\t\t%s; policy accept;\n", c.hook.text)
	}
	for _, r := range c.rules {
		text.WriteString("\t\t")
		for _, part := range r.clauses {
			text.WriteString(part.text + " ")
		}
		fmt.Fprintf(text, "comment %q\n", r.comment)
	}
	text.WriteString("\t}\n")
}
