//go:build !nopac

package pac

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/dop251/goja"
)

const (
	// maxLookups bounds the names that one evaluation may have looked up. Tables of
	// isInNet ask for the one name of the flow, over and over: it counts once.
	maxLookups = 16

	// maxAlerts bounds the calls of alert that one evaluation has logged.
	maxAlerts = 4
)

// install puts the functions into the runtime that a PAC script may use: those of
// Netscape's "Navigator Proxy Auto-Config File Format" of 1996 and Microsoft's
// extensions for IPv6, whose names end in Ex. Arguments are made strings as
// JavaScript would; one that is missing is the empty string.
func (e *evaluator) install() error {
	functions := map[string]func(arguments []string) any{
		"isPlainHostName":     func(a []string) any { return !strings.ContainsAny(at(a, 0), ".:") },
		"dnsDomainIs":         func(a []string) any { return strings.HasSuffix(at(a, 0), at(a, 1)) },
		"localHostOrDomainIs": func(a []string) any { return localHostOrDomainIs(at(a, 0), at(a, 1)) },
		"dnsDomainLevels":     func(a []string) any { return strings.Count(at(a, 0), ".") },
		"shExpMatch":          func(a []string) any { return shellMatch([]rune(at(a, 0)), []rune(at(a, 1))) },
		"convert_addr":        func(a []string) any { return convertAddress(at(a, 0)) },

		"isResolvable": func(a []string) any { return len(only4(e.resolve(at(a, 0)))) > 0 },
		"dnsResolve":   func(a []string) any { return first(only4(e.resolve(at(a, 0)))) },
		"isInNet":      func(a []string) any { return isInNet(only4(e.resolve(at(a, 0))), at(a, 1), at(a, 2)) },
		"myIpAddress": func([]string) any {
			if own := only4(addresses(e.ask(message{Kind: kindAddresses}))); len(own) > 0 {
				return own[0].String()
			}
			return "127.0.0.1" // what browsers say without a network
		},

		"isResolvableEx": func(a []string) any { return len(e.resolve(at(a, 0))) > 0 },
		"dnsResolveEx":   func(a []string) any { return join(e.resolve(at(a, 0))) },
		"isInNetEx":      func(a []string) any { return isInNetEx(e.resolve(at(a, 0)), at(a, 1)) },
		"myIpAddressEx":  func([]string) any { return join(addresses(e.ask(message{Kind: kindAddresses}))) },
		"sortIpAddressList": func(a []string) any {
			sorted, ok := sortAddresses(at(a, 0))
			if !ok {
				return false
			}
			return sorted
		},
		"getClientVersion": func([]string) any { return "1.0" },

		"weekdayRange": func(a []string) any { return weekdayRange(e.now(), a) },
		"dateRange":    func(a []string) any { return dateRange(e.now(), a) },
		"timeRange":    func(a []string) any { return timeRange(e.now(), a) },

		"alert": func(a []string) any {
			e.alert(at(a, 0))
			return goja.Undefined()
		},
	}
	for name, function := range functions {
		if err := e.runtime.Set(name, func(call goja.FunctionCall) goja.Value {
			arguments := make([]string, len(call.Arguments))
			for i, argument := range call.Arguments {
				arguments[i] = argument.String()
			}
			return e.runtime.ToValue(function(arguments))
		}); err != nil {
			return fmt.Errorf("define %s: %w", name, err)
		}
	}
	return nil
}

// at returns one of the arguments.
func at(arguments []string, i int) string {
	if i < len(arguments) {
		return arguments[i]
	}
	return ""
}

// resolve returns the addresses of a host: itself if it is an address, else those
// that the program finds. An evaluation that has asked for too many names gets no
// further answers.
func (e *evaluator) resolve(host string) []netip.Addr {
	host = strings.TrimSpace(host)
	if address, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return []netip.Addr{address.Unmap().WithZone("")}
	}
	if !plainName(host) {
		return nil
	}
	host = strings.ToLower(host)
	known, asked := e.known[host]
	if !asked {
		if e.lookups == maxLookups {
			return nil
		}
		e.lookups++
		e.varies = true
		known = e.ask(message{Kind: kindResolve, Host: host})
		e.known[host] = known
	}
	return addresses(known)
}

// alert has the program log what the script says.
func (e *evaluator) alert(text string) {
	if e.alerts < maxAlerts && e.broken == nil {
		e.alerts++
		e.broken = send(e.out, message{Kind: kindAlert, Text: oneLine(text)})
	}
}

// addresses reads what the program has answered.
func addresses(texts []string) []netip.Addr {
	var read []netip.Addr
	for _, text := range texts {
		if address, err := netip.ParseAddr(text); err == nil {
			read = append(read, address.Unmap().WithZone(""))
		}
	}
	return read
}

// only4 leaves the IPv4 addresses; the functions of 1996 know no others.
func only4(all []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(all, func(address netip.Addr) bool { return !address.Is4() })
}

// first is an address as dnsResolve returns it: null when there is none.
func first(all []netip.Addr) any {
	if len(all) == 0 {
		return goja.Null()
	}
	return all[0].String()
}

// join is a list of addresses as the Ex functions return it.
func join(all []netip.Addr) string {
	var texts []string
	for _, address := range all {
		texts = append(texts, address.String())
	}
	return strings.Join(texts, ";")
}

// localHostOrDomainIs matches a whole name, or its first label alone.
func localHostOrDomainIs(host, name string) bool {
	return host == name || strings.HasPrefix(name, host+".")
}

// convertAddress makes a number of an IPv4 address, signed as JavaScript's bit
// operations have it; 0 of anything else.
func convertAddress(text string) int32 {
	address, err := netip.ParseAddr(text)
	if err != nil || !address.Is4() {
		return 0
	}
	octets := address.As4()
	return int32(uint32(octets[0])<<24 | uint32(octets[1])<<16 | uint32(octets[2])<<8 | uint32(octets[3]))
}

// isInNet compares the first address under a mask, which need not be contiguous.
func isInNet(all []netip.Addr, pattern, mask string) bool {
	network, err := netip.ParseAddr(pattern)
	under, err2 := netip.ParseAddr(mask)
	if err != nil || err2 != nil || !network.Is4() || !under.Is4() || len(all) == 0 {
		return false
	}
	bits := convertAddress(mask)
	return convertAddress(all[0].String())&bits == convertAddress(pattern)&bits
}

// isInNetEx tells whether one of the addresses lies in a prefix.
func isInNetEx(all []netip.Addr, text string) bool {
	prefix, err := netip.ParsePrefix(text)
	return err == nil && slices.ContainsFunc(all, prefix.Contains)
}

// sortAddresses sorts a list of addresses: IPv6 before IPv4, each ascending. A
// list with anything else in it is not sorted.
func sortAddresses(list string) (sorted string, ok bool) {
	var all []netip.Addr
	for text := range strings.SplitSeq(list, ";") {
		address, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil {
			return "", false
		}
		all = append(all, address)
	}
	slices.SortFunc(all, func(a, b netip.Addr) int {
		if a.Is4() != b.Is4() {
			return b.BitLen() - a.BitLen()
		}
		return a.Compare(b)
	})
	return join(all), true
}
