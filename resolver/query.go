package resolver

import (
	"encoding/binary"
	"errors"
)

// Parts of a message: RFC 1035 section 4.1.1, EDNS: RFC 6891 section 6.1.
const (
	headerSize = 12

	flagResponse           = 1 << 15
	flagAuthoritative      = 1 << 10
	flagTruncated          = 1 << 9
	flagRecursionDesired   = 1 << 8
	flagRecursionAvailable = 1 << 7
	flagAuthentic          = 1 << 5
	flagCheckingDisabled   = 1 << 4

	typeOPT     = 41
	optSize     = 11 // a root name, type, class, TTL and an empty RDLENGTH
	optionECS   = 8  // RFC 7871 section 6
	flagDO      = 1 << 15
	maxNameSize = 255 // in wire form
	maxLabel    = 63
)

// Response codes: RFC 1035 section 4.1.1, RFC 6891 section 9.
const (
	rcodeSuccess  = 0
	rcodeFormErr  = 1
	rcodeServFail = 2
	rcodeNXDomain = 3
	rcodeNotImp   = 4
	rcodeRefused  = 5
	rcodeBadVers  = 16
)

// query is a client's question, as far as it was read. Its slices are parts of the
// message.
type query struct {
	message []byte // from the header to the end of the question
	flags   uint16 // of the header
	name    []byte // in wire form, as the client wrote it
	kind    uint16 // QTYPE
	class   uint16

	edns    bool
	size    uint16 // of an answer over UDP, as the client says
	version uint8
	do      bool
	ecs     []byte // the option's data; nil if there is none
}

// Faults of a message that is no query to work on. What is not even the header of a
// query gets no answer, lest two servers answer one another for ever.
var (
	errIgnored = errors.New("not a query")
	errForm    = errors.New("malformed")
	errOpcode  = errors.New("not a standard query")
)

// read reads a query. With errForm and errOpcode as much of q is set as an answer
// needs.
func (q *query) read(message []byte) error {
	*q = query{}
	if len(message) < headerSize {
		return errIgnored
	}
	q.flags = binary.BigEndian.Uint16(message[2:])
	if q.flags&flagResponse != 0 {
		return errIgnored
	}
	q.message = message[:headerSize]
	if opcode := q.flags >> 11 & 0xf; opcode != 0 {
		return errOpcode
	}
	questions := binary.BigEndian.Uint16(message[4:])
	answers, authorities := binary.BigEndian.Uint16(message[6:]), binary.BigEndian.Uint16(message[8:])
	if questions != 1 || answers != 0 || authorities != 0 {
		return errForm
	}
	end := headerSize
	for {
		if end >= len(message) {
			return errForm
		}
		length := int(message[end])
		end++
		if length == 0 {
			break
		}
		// A question is the first name, so that there is nothing to point to.
		if end += length; length > maxLabel || end-headerSize >= maxNameSize {
			return errForm
		}
	}
	if end+4 > len(message) {
		return errForm
	}
	q.message, q.name = message[:end+4], message[headerSize:end]
	q.kind, q.class = binary.BigEndian.Uint16(message[end:]), binary.BigEndian.Uint16(message[end+2:])
	return q.readAdditional(message[end+4:], int(binary.BigEndian.Uint16(message[10:])))
}

// readAdditional looks for the OPT record, of which there may be one. Others say
// nothing to a resolver.
func (q *query) readAdditional(rest []byte, records int) error {
	for range records {
		name, ok := skipName(rest)
		if !ok || len(rest) < name+10 {
			return errForm
		}
		fields, length := rest[name:], int(binary.BigEndian.Uint16(rest[name+8:]))
		if len(fields) < 10+length {
			return errForm
		}
		if binary.BigEndian.Uint16(fields) == typeOPT {
			if q.edns || name != 1 {
				return errForm
			}
			q.edns, q.size = true, binary.BigEndian.Uint16(fields[2:])
			q.version, q.do = fields[5], binary.BigEndian.Uint16(fields[6:])&flagDO != 0
			if !q.readOptions(fields[10 : 10+length]) {
				return errForm
			}
		}
		rest = fields[10+length:]
	}
	if len(rest) > 0 {
		return errForm
	}
	return nil
}

func (q *query) readOptions(options []byte) bool {
	for len(options) > 0 {
		if len(options) < 4 {
			return false
		}
		code, length := binary.BigEndian.Uint16(options), int(binary.BigEndian.Uint16(options[2:]))
		if len(options) < 4+length {
			return false
		}
		if code == optionECS {
			q.ecs = options[4 : 4+length]
		}
		options = options[4+length:]
	}
	return true
}

// skipName returns the length of a name in a message from its first byte on; a
// pointer ends it and is not followed.
func skipName(name []byte) (length int, ok bool) {
	for length < len(name) {
		label := int(name[length])
		switch {
		case label == 0:
			return length + 1, true
		case label >= 0xc0:
			return length + 2, length+2 <= len(name)
		case label > maxLabel:
			return 0, false
		}
		if length += 1 + label; length >= maxNameSize {
			return 0, false
		}
	}
	return 0, false
}

// key appends what the answer depends on.
func (q *query) key(to []byte) []byte {
	for _, letter := range q.name {
		to = append(to, lower(letter))
	}
	end := len(q.message) - 4
	to = append(to, q.message[end:]...)
	var bits byte
	if q.do {
		bits |= 1
	}
	if q.flags&flagCheckingDisabled != 0 {
		bits |= 2
	}
	return append(to, bits)
}

// wantsAuthentic reports whether the client understands the AD bit (RFC 6840,
// sections 5.7 and 5.8).
func (q *query) wantsAuthentic() bool { return q.do || q.flags&flagAuthentic != 0 }

// lower is also right for the length bytes of a name, which are below all letters.
func lower(letter byte) byte {
	if 'A' <= letter && letter <= 'Z' {
		return letter + 'a' - 'A'
	}
	return letter
}

// text returns the name in lower case, without a dot at its end. What cannot stand in
// a host name is escaped as in zone files (RFC 1035 section 5.1).
func (q *query) text() string {
	return nameText(q.name)
}

func nameText(name []byte) string {
	text := make([]byte, 0, len(name)+8)
	for len(name) > 1 {
		label := name[1 : 1+name[0]]
		name = name[1+len(label):]
		if len(text) > 0 {
			text = append(text, '.')
		}
		for _, letter := range label {
			switch letter = lower(letter); {
			case letter <= ' ' || letter > '~' || letter == '.' || letter == '\\':
				// Also a dot in a label, so that every dot in the text is a border.
				text = append(text, '\\', '0'+letter/100, '0'+letter/10%10, '0'+letter%10)
			default:
				text = append(text, letter)
			}
		}
	}
	return string(text)
}

// limit returns how long an answer over UDP may be. Without EDNS it is 512 bytes
// (RFC 1035 section 4.2.1). What a client claims to take is believed up to 4,096,
// the customary most (RFC 6891 section 6.2.5).
func (q *query) limit() int {
	const least, most = 512, 4096
	if !q.edns {
		return least
	}
	return max(least, min(most, int(q.size)))
}
