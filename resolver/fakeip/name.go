package fakeip

import "strings"

const (
	maxName  = 253 // bytes of a name's text: RFC 1035, section 3.1, less length bytes and root
	maxLabel = 63  // bytes: RFC 1035, section 2.3.4
)

// valid reports whether a name, in lower case, can be that of a host. Labels are
// of letters, digits, hyphens, which may stand anywhere because such names are in
// use, and underscores (RFC 8552). Not valid are addresses in every notation that
// some resolver takes for one (127.1, 0x7f000001: the last label is a number, as
// in the URL Standard, section 3.5) and localhost with all below it (RFC 6761,
// section 6.3).
func valid(name string) bool {
	if len(name) > maxName {
		return false
	}
	last := 0 // where the last label starts
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if i == last || i-last > maxLabel {
				return false
			}
			if i < len(name) {
				last = i + 1
			}
		} else if !nameByte(name[i]) {
			return false
		}
	}
	return name[last:] != "localhost" && !number(name[last:])
}

// nameByte reports whether a byte may be part of a label.
func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// number reports whether a label is a number to an address parser: decimal or
// octal digits, or hexadecimal ones, even none, after 0x.
func number(label string) bool {
	digits := "0123456789"
	if strings.HasPrefix(label, "0x") {
		label, digits = label[2:], "0123456789abcdef"
	}
	return strings.Trim(label, digits) == ""
}
