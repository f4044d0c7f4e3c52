package fakeip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
)

const (
	// skipped addresses at the start of a prefix are not given out: that of the
	// network or of any router (RFC 4291, section 2.6.1), and the one that people
	// take for a gateway.
	skipped = 2
	// reserved are those and the last one, which is IPv4's broadcast address.
	reserved = skipped + 1
)

// ranges numbers the addresses that can be given out, from 0 and alike in both
// families. A zero prefix is of no address.
type ranges struct {
	ipv4, ipv6 netip.Prefix // masked
	size       uint32       // numbers that there are
}

// newRanges checks the prefixes.
func newRanges(ipv4, ipv6 netip.Prefix) (ranges, error) {
	if !ipv4.IsValid() && !ipv6.IsValid() {
		return ranges{}, errors.New("no prefix to take addresses from")
	}
	if ipv4.IsValid() && !ipv4.Addr().Is4() {
		return ranges{}, fmt.Errorf("prefix %s is not of IPv4", ipv4)
	}
	if ipv6.IsValid() && (!ipv6.Addr().Is6() || ipv6.Addr().Is4In6()) {
		return ranges{}, fmt.Errorf("prefix %s is not of IPv6", ipv6)
	}
	r := ranges{size: math.MaxInt32} // an int on every platform
	for _, prefix := range []netip.Prefix{ipv4, ipv6} {
		if !prefix.IsValid() {
			continue
		}
		free := prefix.Addr().BitLen() - prefix.Bits()
		if free < 2 {
			return ranges{}, fmt.Errorf("prefix %s has no address to give out: at least 4 are needed", prefix)
		}
		if free < 31 {
			r.size = min(r.size, 1<<free-reserved)
		}
	}
	r.ipv4, r.ipv6 = ipv4.Masked(), ipv6.Masked()
	return r, nil
}

// contains reports whether an address is in one of the prefixes.
func (r *ranges) contains(address netip.Addr) bool {
	return r.ipv4.Contains(address) || r.ipv6.Contains(address)
}

// addresses returns those of a number; the zero Addr for a family without prefix.
func (r *ranges) addresses(offset uint32) (ipv4, ipv6 netip.Addr) {
	if r.ipv4.IsValid() {
		bytes := r.ipv4.Addr().As4()
		base := binary.BigEndian.Uint32(bytes[:])
		binary.BigEndian.PutUint32(bytes[:], base+skipped+offset)
		ipv4 = netip.AddrFrom4(bytes)
	}
	if r.ipv6.IsValid() {
		bytes := r.ipv6.Addr().As16()
		base := binary.BigEndian.Uint64(bytes[8:])
		binary.BigEndian.PutUint64(bytes[8:], base+skipped+uint64(offset))
		ipv6 = netip.AddrFrom16(bytes)
	}
	return ipv4, ipv6
}

// offset returns the number of an address that can be given out.
func (r *ranges) offset(address netip.Addr) (offset uint32, ok bool) {
	var distance uint64
	switch {
	case r.ipv4.Contains(address):
		base, bytes := r.ipv4.Addr().As4(), address.As4()
		distance = uint64(binary.BigEndian.Uint32(bytes[:]) - binary.BigEndian.Uint32(base[:]))
	case r.ipv6.Contains(address):
		base, bytes := r.ipv6.Addr().As16(), address.As16()
		if [8]byte(bytes[:8]) != [8]byte(base[:8]) {
			return 0, false // beyond the last number in a prefix shorter than 64 bits
		}
		distance = binary.BigEndian.Uint64(bytes[8:]) - binary.BigEndian.Uint64(base[8:])
	default:
		return 0, false
	}
	if distance < skipped || distance-skipped >= uint64(r.size) {
		return 0, false
	}
	return uint32(distance - skipped), true
}
