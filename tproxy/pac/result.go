package pac

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

const (
	// maxChoices bounds what is kept of a script's answer. Lists of more than a few
	// proxies do not occur, and each entry may cost a client one connect time-out.
	maxChoices = 16

	// maxResult bounds a script's answer in bytes: maxChoices elements, each of a
	// keyword, a name of the greatest length (RFC 1035 section 2.3.4) and a port.
	maxResult = maxChoices * 280
)

// kinds are the keywords of an answer: the scheme of the URL that each stands for
// and the port that is meant when none is written, which is what browsers take.
//
// SOCKS alone meant version 4 when Netscape wrote it; Chromium still reads it so,
// Firefox takes it as version 5. Here it is 5: a proxy that has only version 4
// to offer is hardly met any more, version 5 carries names and IPv6, and who
// means 4 can write SOCKS4. That is taken as 4a, which leaves names to the proxy.
var kinds = map[string]struct {
	scheme string
	port   uint16
}{
	"PROXY":  {"http", 80},
	"HTTP":   {"http", 80},
	"HTTPS":  {"https", 443},
	"SOCKS":  {"socks5", 1080},
	"SOCKS5": {"socks5", 1080},
	"SOCKS4": {"socks4a", 1080},
}

// parseResult reads what FindProxyForURL returned: elements parted by semicolons,
// each DIRECT or a keyword and host[:port], in the order in which to try them.
// Keywords are taken in any case. Elements that are neither are left out, as
// browsers do, and so is what follows the first maxChoices. An empty answer means
// DIRECT. An answer in which there is no usable element at all is an error:
// browsers go direct then, but a mistyped proxy must not open a way past it.
func parseResult(result string) ([]Choice, error) {
	if len(result) > maxResult {
		return nil, fmt.Errorf("the script returned %d bytes: at most %d are read", len(result), maxResult)
	}
	var choices []Choice
	empty := true
	for element := range strings.SplitSeq(result, ";") {
		element = strings.TrimSpace(element)
		if element == "" {
			continue
		}
		empty = false
		if choice, ok := parseChoice(element); ok && len(choices) < maxChoices {
			choices = append(choices, choice)
		}
	}
	switch {
	case empty:
		return []Choice{{Direct: true}}, nil
	case len(choices) == 0:
		return nil, fmt.Errorf("the script returned %.80q: write \"PROXY host:port\", \"HTTPS host:port\", \"SOCKS5 host:port\" or \"DIRECT\"", result)
	}
	return choices, nil
}

// parseChoice reads one element, without white space around it.
func parseChoice(element string) (Choice, bool) {
	fields := strings.Fields(element)
	keyword := strings.ToUpper(fields[0])
	if keyword == "DIRECT" {
		return Choice{Direct: true}, len(fields) == 1
	}
	kind, known := kinds[keyword]
	if !known || len(fields) != 2 {
		return Choice{}, false
	}
	host, port, ok := splitHostPort(fields[1], kind.port)
	if !ok {
		return Choice{}, false
	}
	return Choice{Proxy: kind.scheme + "://" + net.JoinHostPort(host, strconv.Itoa(int(port)))}, true
}

// splitHostPort reads host[:port]; an IPv6 address stands in brackets, or bare
// when there is no port.
func splitHostPort(text string, defaultPort uint16) (host string, port uint16, ok bool) {
	if address, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil && address.Zone() == "" {
		return address.String(), defaultPort, true
	}
	host, digits, err := net.SplitHostPort(text)
	if err != nil {
		return text, defaultPort, plainName(text)
	}
	number, err := strconv.ParseUint(digits, 10, 16)
	if err != nil || number == 0 {
		return "", 0, false
	}
	if strings.Contains(host, ":") {
		address, err := netip.ParseAddr(host)
		return address.String(), uint16(number), err == nil && address.Zone() == ""
	}
	return host, uint16(number), plainName(host)
}

// maxName is the greatest length of a name in bytes as text (RFC 1035 section
// 2.3.4, without the root's dot).
const maxName = 253

// plainName tells whether text can be a host's name and nothing else: no byte of
// it has a meaning in a URL.
func plainName(text string) bool {
	if text == "" || len(text) > maxName {
		return false
	}
	for i := range len(text) {
		switch c := text[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}
