package sniff

import "strings"

const (
	maxName  = 253 // bytes of a name's text: RFC 1035, section 3.1, less length bytes and root
	maxLabel = 63  // bytes: RFC 1035, section 2.3.4
)

// ValidName reports whether a name that a client sent can be believed to name a
// host in the DNS, and returns it in lower case and without a trailing dot.
//
// Labels are of letters, digits, hyphens and underscores, at most 63 bytes each
// and 253 together; hyphens may stand anywhere, because such names are in use.
// Refused are addresses in every notation that some resolver would take for one
// (127.1, 0x7f000001: a last label that is a number, as in the URL Standard,
// section 3.5) and localhost with all below it (RFC 6761, section 6.3), which
// would be the proxy's own.
func ValidName(name string) (canonical string, ok bool) {
	name = strings.TrimSuffix(name, ".")
	if len(name) > maxName {
		return "", false
	}
	label := 0 // where it starts
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '.' {
			if i == label || i-label > maxLabel {
				return "", false
			}
			label = i + 1
		} else if !nameByte(name[i]) {
			return "", false
		}
	}
	name = strings.ToLower(name)
	last := name[strings.LastIndexByte(name, '.')+1:]
	if last == "localhost" || number(last) {
		return "", false
	}
	return name, true
}

// nameByte reports whether a byte may be part of a label.
func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// number reports whether a label in lower case is a number to an address parser:
// decimal or octal digits, or hexadecimal ones, even none, after 0x.
func number(label string) bool {
	digits := "0123456789"
	if strings.HasPrefix(label, "0x") {
		label, digits = label[2:], "0123456789abcdef"
	}
	return strings.Trim(label, digits) == ""
}
