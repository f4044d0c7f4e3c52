package forward

import (
	"bytes"
	"errors"
	"fmt"
)

// maxHead bounds a head, its first line and the empty line included. Squid takes as
// much, nginx and Apache less.
const maxHead = 64 << 10 // bytes

// maxFields bounds the fields of a head; Apache takes 100.
const maxFields = 256

// field is one line of a head. Its slices are parts of the buffer that was parsed.
type field struct {
	name, value []byte
}

func (f field) is(name string) bool { return len(f.name) == len(name) && equalFold(f.name, name) }

// equalFold compares ASCII without regard to case; name is as long as text.
func equalFold(text []byte, name string) bool {
	for i, c := range text {
		if c != name[i] && lower(c) != lower(name[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}

// What makes a head unusable.
var (
	errHeadTooLong = fmt.Errorf("the head is longer than %d bytes", maxHead)
	errManyFields  = fmt.Errorf("the head has more than %d fields", maxFields)
	errBareLF      = errors.New("a line of the head ends without CR (RFC 9112 section 2.2)")
	errBareCR      = errors.New("a CR in the head ends no line (RFC 9112 section 2.2)")
	errFold        = errors.New("a field goes on in the next line (obs-fold, RFC 9112 section 5.2)")
	errFieldName   = errors.New("a line of the head is no field, or has white space before its colon (RFC 9112 section 5.1)")
	errFieldValue  = errors.New("a field has a control character in its value (RFC 9110 section 5.5)")
)

// endOfHead returns the length of the head at the start of text, its empty line
// included, or 0 if its end has not arrived. from is how much of text was looked at
// before. A line may end in LF alone: what that means is for the parser to say.
func endOfHead(text []byte, from int) int {
	from = max(0, from-2) // the line break before may have been the last to arrive
	for {
		newline := bytes.IndexByte(text[from:], '\n')
		if newline < 0 {
			return 0
		}
		from += newline + 1
		switch {
		case from < len(text) && text[from] == '\n':
			return from + 1
		case from+1 < len(text) && text[from] == '\r' && text[from+1] == '\n':
			return from + 2
		}
	}
}

// cutLine splits off a line that ends in CRLF.
func cutLine(text []byte) (line, rest []byte, err error) {
	newline := bytes.IndexByte(text, '\n')
	if newline < 1 || text[newline-1] != '\r' {
		return nil, nil, errBareLF
	}
	line = text[:newline-1]
	if bytes.IndexByte(line, '\r') >= 0 {
		return nil, nil, errBareCR
	}
	return line, text[newline+1:], nil
}

// parseFields reads field lines up to and with the empty line, as strictly as RFC
// 9112 section 5 has it, and appends them to fields.
func parseFields(text []byte, fields []field) ([]field, error) {
	for {
		line, rest, err := cutLine(text)
		if err != nil {
			return fields, err
		}
		if len(line) == 0 {
			return fields, nil
		}
		if line[0] == ' ' || line[0] == '\t' {
			return fields, errFold
		}
		if len(fields) == maxFields {
			return fields, errManyFields
		}
		f, err := parseField(line)
		if err != nil {
			return fields, err
		}
		fields = append(fields, f)
		text = rest
	}
}

// parseField reads one field line, without its end.
func parseField(line []byte) (field, error) {
	colon := bytes.IndexByte(line, ':')
	if colon < 1 || !isToken(line[:colon]) {
		return field{}, errFieldName
	}
	value := trim(line[colon+1:])
	for _, c := range value {
		if c < ' ' && c != '\t' || c == 0x7f {
			return field{}, errFieldValue
		}
	}
	return field{line[:colon], value}, nil
}

// tolerate makes a head of a response, of which servers in use break the rules, one
// that parseFields reads the way that RFC 9112 gives to a proxy: a line may end in
// LF alone (section 2.2), a line break before white space becomes space (section
// 5.2), white space before a colon goes (section 5.1). The head, with its empty line
// at the end, is changed in place but for the line breaks, which need a copy.
func tolerate(head []byte) []byte {
	clean := make([]byte, 0, len(head)+32)
	first := true
	for len(head) > 0 {
		newline := bytes.IndexByte(head, '\n')
		if newline < 0 {
			break
		}
		line := bytes.TrimSuffix(head[:newline], []byte{'\r'})
		head = head[newline+1:]
		switch {
		case first:
			first = false
		case len(line) > 0 && (line[0] == ' ' || line[0] == '\t') && len(clean) > 2:
			clean = append(clean[:len(clean)-2], ' ') // the line break of the field before
		default:
			if colon := bytes.IndexByte(line, ':'); colon > 0 {
				clean = append(clean, bytes.TrimRight(line[:colon], " \t")...)
				line = line[colon:]
			}
		}
		clean = append(clean, line...)
		clean = append(clean, '\r', '\n')
	}
	return clean
}

// trim takes optional white space off both ends (RFC 9110 section 5.6.3).
func trim(text []byte) []byte {
	for len(text) > 0 && (text[0] == ' ' || text[0] == '\t') {
		text = text[1:]
	}
	for len(text) > 0 && (text[len(text)-1] == ' ' || text[len(text)-1] == '\t') {
		text = text[:len(text)-1]
	}
	return text
}

// tokenBytes are the bytes of a token (RFC 9110 section 5.6.2).
var tokenBytes = func() (set [256]bool) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		set[c] = true
	}
	return set
}()

func isToken(text []byte) bool {
	for _, c := range text {
		if !tokenBytes[c] {
			return false
		}
	}
	return len(text) > 0
}

// eachElement calls f with the elements of a comma-separated list (RFC 9110 section
// 5.6.1), the empty ones left out, until it returns false.
func eachElement(list []byte, f func(element []byte) bool) {
	for len(list) > 0 {
		element := list
		if comma := bytes.IndexByte(list, ','); comma >= 0 {
			element, list = list[:comma], list[comma+1:]
		} else {
			list = nil
		}
		if element = trim(element); len(element) > 0 && !f(element) {
			return
		}
	}
}
