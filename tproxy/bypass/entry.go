package bypass

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

const (
	maxName  = 253 // bytes of a name's text: RFC 1035, section 3.1, less length bytes and root
	maxLabel = 63  // bytes: RFC 1035, section 2.3.4

	// maxEntry is room for the longest name in Unicode, four bytes a character, with
	// its port. There is a limit because conversion to ASCII takes quadratic time.
	maxEntry = 1024 // bytes
)

// entry is one entry of a list: a prefix, or a name with its scope. The empty name
// with all below it stands for everything, addresses included.
type entry struct {
	prefix netip.Prefix
	name   string
	scope  scope // 0 for a prefix
	port   uint16
}

// parseEntry reads one entry. The error names it.
func parseEntry(text string) (entry, error) {
	parsed, remedy := readEntry(text)
	if remedy != "" {
		return entry{}, fmt.Errorf("entry %.*q: %s", maxEntry, text, remedy)
	}
	return parsed, nil
}

// readEntry reads one entry. The remedy says what is wrong and what to write
// instead, and is empty when all is well.
func readEntry(text string) (parsed entry, remedy string) {
	switch {
	case len(text) > maxEntry:
		return entry{}, fmt.Sprintf("longer than %d bytes: separate entries with commas", maxEntry)
	case strings.Contains(text, "://"):
		return entry{}, "a URL: write the host alone, without scheme and path"
	case strings.Contains(text, "%"):
		return entry{}, "a % stands in no entry: leave out the zone of an address, and write names without percent encoding"
	}
	host, port, remedy := splitPort(text)
	if remedy != "" {
		return entry{}, remedy
	}
	switch address, err := netip.ParseAddr(host); {
	case err == nil:
		parsed.prefix = unmapped(address, address.BitLen())
	case strings.ContainsAny(host, ":/"):
		parsed.prefix, remedy = readPrefix(host)
	case text[0] == '[':
		remedy = "brackets are for IPv6 addresses: write anything else without them"
	case host == "*":
		parsed.scope = below
	default:
		parsed.name, parsed.scope, remedy = readName(host)
	}
	parsed.port = port
	return parsed, remedy
}

// splitPort separates the port, 0 if there is none, and takes brackets away.
func splitPort(text string) (host string, port uint16, remedy string) {
	// The port's colon is behind the bracket, behind the slash, or the only one.
	var digits string
	var found bool
	if text[0] == '[' {
		address, rest, closed := strings.Cut(text[1:], "]")
		if !closed {
			return "", 0, "no closing bracket: write an IPv6 address with port like [2001:db8::1]:443"
		}
		rest, digits, found = strings.Cut(rest, ":")
		if rest != "" && rest[0] != '/' {
			return "", 0, "something behind the bracket: only a prefix length and a port can follow, like [2001:db8::]/32:443"
		}
		host = address + rest
	} else if slash := strings.IndexByte(text, '/'); slash >= 0 {
		host, digits, found = strings.Cut(text[slash:], ":")
		host = text[:slash] + host
	} else if strings.Count(text, ":") > 1 {
		host = text
	} else {
		host, digits, found = strings.Cut(text, ":")
	}
	if !found {
		return host, 0, ""
	}
	number, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || digits[0] == '0' {
		return "", 0, "the port behind the colon is not a number from 1 to 65535: correct it, or leave colon and port out for all ports"
	}
	return host, uint16(number), ""
}

// readPrefix reads an address prefix, or says what is wrong with an address.
func readPrefix(text string) (prefix netip.Prefix, remedy string) {
	prefix, err := netip.ParsePrefix(text)
	if err == nil {
		return unmapped(prefix.Addr(), prefix.Bits()), ""
	}
	base, _, slash := strings.Cut(text, "/")
	address, err := netip.ParseAddr(base)
	switch {
	case err == nil:
		remedy = fmt.Sprintf("the prefix length behind the slash is not a number from 0 to %d: "+
			"correct it, or leave slash and length out for the one address", address.BitLen())
	case slash:
		remedy = "no address in front of the slash: write a prefix like 10.0.0.0/8 or 2001:db8::/32, or a name without path"
	default:
		remedy = "not an IPv6 address: write it like 2001:db8::1, with a port like [2001:db8::1]:443"
	}
	return netip.Prefix{}, remedy
}

// unmapped returns the prefix of an address, in IPv4 if all of it is IPv4-mapped
// (RFC 4291, section 2.5.5.2).
func unmapped(address netip.Addr, bits int) netip.Prefix {
	const mapped = 96 // bits in front of the IPv4 address
	if address.Is4In6() && bits >= mapped {
		address, bits = address.Unmap(), bits-mapped
	}
	return netip.PrefixFrom(address, bits).Masked()
}

// readName reads a name, with its scope from what stands before it.
func readName(text string) (name string, scope scope, remedy string) {
	name, scope = text, itself|below
	if rest, ok := strings.CutPrefix(strings.TrimPrefix(text, "*"), "."); ok {
		name, scope = rest, below
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r >= utf8.RuneSelf }) {
		ascii, err := idna.Lookup.ToASCII(name)
		if err != nil || !utf8.ValidString(name) { // idna does not look at the latter
			return "", 0, "not a name that has an ASCII form: write it as DNS has it, with labels that start with xn--"
		}
		name = ascii
	}
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if len(name) > maxName {
		return "", 0, fmt.Sprintf("a name of more than %d bytes: shorten it", maxName)
	}
	for label := range strings.SplitSeq(name, ".") {
		if remedy := checkLabel(label); remedy != "" {
			return "", 0, remedy
		}
	}
	if last := name[strings.LastIndexByte(name, '.')+1:]; strings.Trim(last, "0123456789") == "" {
		return "", 0, "neither a name nor an IPv4 address: write the address as four numbers from 0 to 255 with dots, a prefix like 10.0.0.0/8"
	}
	return name, scope, ""
}

// checkLabel returns the remedy for a label, in lower case, that no name has.
func checkLabel(label string) (remedy string) {
	switch {
	case label == "":
		return "an empty label: write a name like example.org or .example.org, without two dots in a row"
	case len(label) > maxLabel:
		return fmt.Sprintf("a label of more than %d bytes: shorten it", maxLabel)
	case strings.Contains(label, "*"):
		return "a * can only be everything or stand before the first dot: write *, *.example.org, or example.org for the name and all below it"
	case strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "":
		return "a character that no name has: write letters, digits, hyphens and dots, and separate entries with commas"
	}
	return ""
}

// prefixes returns the addresses that the entry stands for.
func (e entry) prefixes() []netip.Prefix {
	switch {
	case e.scope == 0:
		return []netip.Prefix{e.prefix}
	case e.name == "":
		return []netip.Prefix{
			netip.PrefixFrom(netip.IPv4Unspecified(), 0),
			netip.PrefixFrom(netip.IPv6Unspecified(), 0),
		}
	}
	return nil
}

// String returns the entry as parseEntry reads it.
func (e entry) String() string {
	var text string
	switch {
	case e.scope == 0:
		text = e.prefix.String()
		if e.prefix.IsSingleIP() {
			text = e.prefix.Addr().String()
		}
		if e.port != everyPort && e.prefix.Addr().Is6() {
			text = "[" + text + "]"
		}
	case e.name == "":
		text = "*"
	case e.scope == below:
		text = "*." + e.name
	default:
		text = e.name
	}
	if e.port != everyPort {
		text += ":" + strconv.Itoa(int(e.port))
	}
	return text
}
