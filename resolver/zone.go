package resolver

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// zones finds the longest zone of a name.
type zones map[string]zone

// zone is who is asked for a suffix and for what is below it.
type zone struct {
	itself, below *Zone
}

func newZones(all []Zone) zones {
	z := make(zones)
	for i := range all {
		suffix := strings.ToLower(strings.Trim(all[i].Suffix, "."))
		entry := z[suffix]
		if entry.below == nil {
			entry.below = &all[i]
		}
		if entry.itself == nil && !all[i].Below {
			entry.itself = &all[i]
		}
		z[suffix] = entry
	}
	return z
}

// of returns the longest zone of a name in lower case, without a dot at its end;
// nil if there is none.
func (z zones) of(name string) *Zone {
	if found := z[name].itself; found != nil {
		return found
	}
	for end := name; end != ""; {
		_, end, _ = strings.Cut(end, ".")
		if found := z[end].below; found != nil {
			return found
		}
	}
	return nil
}

// ReverseZones returns the zones in which the addresses of a prefix have their names
// (RFC 1035 section 3.5, RFC 3596 section 2.5), without a dot at the end. A prefix
// that does not end at a label takes several: up to 128 for IPv4, 8 for IPv6.
func ReverseZones(prefix netip.Prefix) []string {
	prefix = prefix.Masked()
	step, root := 8, "in-addr.arpa"
	if prefix.Addr().Is6() {
		step, root = 4, "ip6.arpa"
	}
	labels := (prefix.Bits() + step - 1) / step // of the zones, rounded up
	zones := make([]string, 0, 1)
	bytes := prefix.Addr().AsSlice()
	for i := range 1 << (labels*step - prefix.Bits()) {
		var zone strings.Builder
		for label := labels - 1; label >= 0; label-- {
			var digit int
			if step == 8 {
				digit = int(bytes[label])
			} else {
				digit = int(bytes[label/2]) >> (4 * (1 - label%2)) & 0xf
			}
			if label == labels-1 {
				digit += i
			}
			if step == 8 {
				fmt.Fprintf(&zone, "%d.", digit)
			} else {
				zone.WriteString(strconv.FormatInt(int64(digit), 16) + ".")
			}
		}
		zones = append(zones, zone.String()+root)
	}
	return zones
}

// reversed returns the address that a name of the reverse zones stands for, which
// has to be a whole one.
func reversed(name string) (netip.Addr, bool) {
	if labels, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		parts := strings.Split(labels, ".")
		if len(parts) != 4 {
			return netip.Addr{}, false
		}
		address, err := netip.ParseAddr(parts[3] + "." + parts[2] + "." + parts[1] + "." + parts[0])
		return address, err == nil
	}
	labels, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(labels) != 63 {
		return netip.Addr{}, false
	}
	var bytes [16]byte
	for i := range 32 {
		digit, err := strconv.ParseUint(labels[2*i:2*i+1], 16, 8)
		if err != nil || i < 31 && labels[2*i+1] != '.' {
			return netip.Addr{}, false
		}
		bytes[15-i/2] |= byte(digit) << (4 * (i % 2))
	}
	return netip.AddrFrom16(bytes), true
}
