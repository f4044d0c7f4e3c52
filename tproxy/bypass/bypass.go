// Package bypass holds the destinations that are reached directly, in the grammar
// of the no_proxy variable. Its prefixes are for the kernel, its names for flows
// whose name is known.
//
// A list is of entries with commas or white space between them:
//
//	192.0.2.1, 2001:db8::1   an address; IPv6 in brackets or not
//	10.0.0.0/8               a prefix; bits behind its length do not count
//	example.org              the name and all below it
//	.example.org             only what is below it, also written *.example.org
//	*                        everything
//
// Each may end in a port, as in example.org:443, [2001:db8::1]:443, 10.0.0.0/8:443
// or *:443; a port behind an IPv6 address needs the brackets. Case and
// one trailing dot do not count. A name in Unicode means its ASCII form (IDNA,
// RFC 5891), which is what DNS and TLS carry. An IPv4-mapped IPv6 address means the
// IPv4 address, in the list as in a destination.
package bypass

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"unicode"

	"go4.org/netipx"
)

// List is a parsed list. It never changes and is safe for concurrent use. Nil and
// the zero value exempt nothing.
type List struct {
	// By port; everyPort holds what was written without one.
	addresses map[uint16]*netipx.IPSet
	names     map[suffix]scope
	text      []string
}

// everyPort stands for all ports; no flow has port 0.
const everyPort = 0

// suffix is the end of a name, from a label border on, with the port it is for. The
// empty suffix is the end of every name.
type suffix struct {
	name string
	port uint16
}

// scope is what of a suffix is exempt.
type scope uint8

const (
	itself scope = 1 << iota
	below
)

// Parse reads a list. Empty entries do not count, so that an empty text gives a list
// that exempts nothing. The error is one line that names the first malformed entry
// and says what to write instead.
func Parse(text string) (*List, error) {
	l := &List{addresses: map[uint16]*netipx.IPSet{}, names: map[suffix]scope{}}
	builders := map[uint16]*netipx.IPSetBuilder{}
	for text := range strings.FieldsFuncSeq(text, separates) {
		entry, err := parseEntry(text)
		if err != nil {
			return nil, err
		}
		l.text = append(l.text, entry.String())
		for _, prefix := range entry.prefixes() {
			if builders[entry.port] == nil {
				builders[entry.port] = new(netipx.IPSetBuilder)
			}
			builders[entry.port].AddPrefix(prefix)
		}
		if entry.scope != 0 {
			l.names[suffix{entry.name, entry.port}] |= entry.scope
		}
	}
	for port, builder := range builders {
		// It has errors for prefixes that are not valid, and such were refused.
		l.addresses[port], _ = builder.IPSet()
	}
	return l, nil
}

// separates reports whether a character stands between entries.
func separates(r rune) bool {
	return r == ',' || unicode.IsSpace(r)
}

// Prefixes returns the exempt addresses that the entries without a port give:
// merged, disjoint and sorted, IPv4 first. The caller may keep and change it.
// [List.MatchAddr] knows the entries with a port too.
func (l *List) Prefixes() []netip.Prefix {
	if l == nil || l.addresses[everyPort] == nil {
		return nil
	}
	return l.addresses[everyPort].Prefixes()
}

// Suffix stands for the names that end in Name, from a label border on: for Name
// itself, too, unless Below is set. The empty Name is the end of every name.
type Suffix struct {
	Name  string // in lower case, without dots at its ends
	Below bool
}

// Suffixes returns the exempt names, sorted, those that are exempt at some ports
// only as well: a name service is not told the port. The caller may keep and change
// it.
func (l *List) Suffixes() []Suffix {
	if l == nil {
		return nil
	}
	scopes := map[string]scope{}
	for suffix, scope := range l.names {
		scopes[suffix.name] |= scope
	}
	var suffixes []Suffix
	for _, name := range slices.Sorted(maps.Keys(scopes)) {
		suffixes = append(suffixes, Suffix{name, scopes[name]&itself == 0})
	}
	return suffixes
}

// MatchAddr reports whether a destination is exempt by its address. The zone of an
// IPv6 address does not count. The cost grows with the logarithm of the list.
func (l *List) MatchAddr(destination netip.AddrPort) bool {
	if l == nil {
		return false
	}
	address := destination.Addr().Unmap().WithZone("")
	for _, port := range [...]uint16{everyPort, destination.Port()} {
		if set := l.addresses[port]; set != nil && set.Contains(address) {
			return true
		}
	}
	return false
}

// MatchName reports whether a destination is exempt by its name. That is a DNS name
// in ASCII (any case, one trailing dot does not count); the text of an address is
// no name, and only * matches it. The cost grows with the labels of the name and
// not with the list.
func (l *List) MatchName(name string, port uint16) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if l == nil || name == "" || len(name) > maxName {
		return false
	}
	wanted := itself
	for end := name; ; wanted = below {
		if (l.names[suffix{end, everyPort}]|l.names[suffix{end, port}])&wanted != 0 {
			return true
		}
		if end == "" {
			return false
		}
		_, end, _ = strings.Cut(end, ".")
	}
}

// String returns the list as [Parse] reads it: the entries in their order, separated
// by commas, each in its shortest form.
func (l *List) String() string {
	if l == nil {
		return ""
	}
	return strings.Join(l.text, ",")
}
