package cache

import "encoding/binary"

// The parts of a message (RFC 1035, section 4.1).
const (
	messageHeader  = 12 // bytes; section 4.1.1
	questionFields = 4  // bytes after the name: type, class; section 4.1.2
	recordFields   = 10 // bytes after the name: type, class, TTL, length of the data; section 4.1.3
	soaFields      = 20 // bytes after the two names: five numbers, MINIMUM the last; section 3.3.13
	maxName        = 255

	// maxPointers is how many pointers a name may have: one a label, as in a name of
	// 127 labels; it keeps pointers to pointers from costing time.
	maxPointers = 126

	flagsMask = 1<<15 | 0xf<<11 | 1<<9 // QR, Opcode, TC
	flagsGood = 1 << 15                // a response to QUERY, whole
	rcodeMask = 0xf

	rcodeSuccess   = 0
	rcodeNameError = 3

	typeSOA = 6
	typeOPT = 41
	typeANY = 255
)

// message is what the cache needs to know of an answer.
type message struct {
	// ttl is how long the answer may be kept, in seconds: as long as every record of
	// it, in all sections, because it is given out whole (RFC 4035, section 4.5), and
	// for a negative answer as long as SOA MINIMUM says (RFC 2308, section 5). TTLs have
	// 32 bits without a sign (RFC 8767, section 4).
	ttl      uint32
	negative bool     // NXDOMAIN or NODATA
	ttls     []uint16 // where the TTLs are
}

// parse looks at a whole answer and appends the places of TTLs to ttls. It is not ok
// if nothing can be concluded from it: malformed, truncated, not the answer to one
// question, an error of the server, negative without SOA.
//
// Names of records must be well-formed, with pointers that only point back. Data is
// not looked into, but for that of SOA.
func parse(b []byte, ttls []uint16) (m message, ok bool) {
	if len(b) < messageHeader || len(b) > maxMessage {
		return m, false
	}
	flags := binary.BigEndian.Uint16(b[2:])
	rcode := flags & rcodeMask
	if flags&flagsMask != flagsGood || rcode != rcodeSuccess && rcode != rcodeNameError || binary.BigEndian.Uint16(b[4:]) != 1 {
		return m, false
	}
	at, ok := skipName(b, messageHeader)
	if !ok || len(b)-at < questionFields {
		return m, false
	}
	asked := binary.BigEndian.Uint16(b[at:])
	at += questionFields

	m = message{ttl: 1<<32 - 1, negative: true, ttls: ttls}
	minimum, authority := m.ttl, false // of the SOA record; whether there is one
	for section := range 3 {
		for range binary.BigEndian.Uint16(b[6+2*section:]) {
			if at, ok = skipName(b, at); !ok || len(b)-at < recordFields {
				return m, false
			}
			kind, ttl := binary.BigEndian.Uint16(b[at:]), binary.BigEndian.Uint32(b[at+4:])
			data := at + recordFields
			end := data + int(binary.BigEndian.Uint16(b[at+8:]))
			if end > len(b) || kind == typeOPT {
				return m, false
			}
			m.ttl = min(m.ttl, ttl)
			m.ttls = append(m.ttls, uint16(at+4))
			switch {
			case section == 0 && (kind == asked || asked == typeANY):
				m.negative = rcode == rcodeNameError
			case section == 1 && kind == typeSOA:
				if !soa(b[:end], data) {
					return m, false
				}
				minimum, authority = min(minimum, binary.BigEndian.Uint32(b[end-4:])), true
			}
			at = end
		}
	}
	if at != len(b) || m.negative && !authority {
		return m, false
	}
	if m.negative {
		m.ttl = min(m.ttl, minimum)
	}
	return m, true
}

// soa reports whether what lies from at to the end of b is the data of an SOA record.
func soa(b []byte, at int) bool {
	for range 2 {
		var ok bool
		if at, ok = skipName(b, at); !ok {
			return false
		}
	}
	return len(b)-at == soaFields
}

// skipName returns where the name that begins at at ends. It follows the pointers
// of compression (RFC 1035, section 4.1.4) to see that the name ends anywhere.
func skipName(b []byte, at int) (end int, ok bool) {
	length, limit := 0, at // of the name; a pointer must go to before limit
	for pointers := 0; at < len(b); {
		switch n := int(b[at]); n & 0xc0 {
		case 0x00:
			at += 1 + n
			if length += 1 + n; length > maxName {
				return 0, false
			}
			if n > 0 {
				continue
			}
			if pointers == 0 {
				end = at
			}
			return end, true
		case 0xc0:
			if at+1 >= len(b) {
				return 0, false
			}
			target := (n&0x3f)<<8 | int(b[at+1])
			if pointers == 0 {
				end = at + 2
			}
			pointers++
			if target < messageHeader || target >= limit || pointers > maxPointers {
				return 0, false
			}
			at, limit = target, target
		default: // reserved
			return 0, false
		}
	}
	return 0, false
}
