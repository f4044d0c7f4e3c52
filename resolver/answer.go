package resolver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
)

// offered is the size of UDP messages that we say to take: what passes everywhere
// without fragments (RFC 9715 section 3, DNS flag day 2020).
const offered = 1232

// ede is an extended error (RFC 8914): its code, or none.
type ede int

const (
	noEDE             ede = -1
	edeStale          ede = 3
	edeProhibited     ede = 18
	edeNoReachable    ede = 22
	edeNetwork        ede = 23
	optionEDE             = 15
	edeSize               = 4 + 2
	extendedRcodeBits     = 4
)

// dress makes a stored answer the answer to a query, in place: id, flags and letter
// case are the client's. It appends our OPT record if the client sent one, and cuts
// the whole down to limit bytes. The stored answer has no OPT record and is about
// the same question.
func (q *query) dress(answer []byte, rcode int, why ede, limit int) []byte {
	flags := binary.BigEndian.Uint16(answer[2:])
	flags &^= flagAuthoritative | flagTruncated | flagRecursionDesired | flagCheckingDisabled
	if !q.wantsAuthentic() {
		flags &^= flagAuthentic
	}
	flags |= flagResponse | flagRecursionAvailable | q.flags&(flagRecursionDesired|flagCheckingDisabled)
	copy(answer, q.message[:2])
	binary.BigEndian.PutUint16(answer[2:], flags)
	copy(answer[headerSize:], q.name)

	extra := 0
	if q.edns {
		extra = optSize
		if why != noEDE {
			extra += edeSize
		}
	}
	if len(answer)+extra > limit {
		answer = answer[:len(q.message)]
		binary.BigEndian.PutUint16(answer[2:], flags|flagTruncated)
		clear(answer[6:headerSize])
	}
	if !q.edns {
		return answer
	}
	binary.BigEndian.PutUint16(answer[10:], binary.BigEndian.Uint16(answer[10:])+1)
	var flagsEDNS uint16
	if q.do {
		flagsEDNS = flagDO
	}
	answer = append(answer, 0, 0, typeOPT, offered>>8, offered&0xff, byte(rcode>>extendedRcodeBits), 0, byte(flagsEDNS>>8), 0, 0, byte(extra-optSize))
	if why != noEDE {
		answer = append(answer, 0, optionEDE, 0, 2, byte(why>>8), byte(why))
	}
	return answer
}

// bare returns an answer without records: a header and, if it could be read, the
// question.
func (q *query) bare(rcode int) []byte {
	answer := make([]byte, len(q.message), len(q.message)+optSize+edeSize)
	copy(answer, q.message)
	clear(answer[4:headerSize])
	if len(answer) > headerSize {
		answer[5] = 1
	}
	const opcode = 0xf << 11
	binary.BigEndian.PutUint16(answer[2:], q.flags&opcode|flagResponse|uint16(rcode&0xf))
	return answer
}

// record is one of an answer, as offsets into the message.
type record struct {
	start, fields, end int // fields is where its type begins
	kind               uint16
	section            int // 1 answer, 2 authority, 3 additional
}

func (r record) data(message []byte) []byte { return message[r.fields+10 : r.end] }

// records walks through the records behind the question, which ends at an offset.
// The last element has an error if the message is malformed.
func records(message []byte, questionEnd int) iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		at := questionEnd
		for section := 1; section <= 3; section++ {
			for range binary.BigEndian.Uint16(message[4+2*section:]) {
				length, ok := skipName(message[at:])
				if !ok || at+length+10 > len(message) {
					yield(record{}, errForm)
					return
				}
				r := record{start: at, fields: at + length, section: section}
				r.end = r.fields + 10 + int(binary.BigEndian.Uint16(message[r.fields+8:]))
				if r.end > len(message) {
					yield(record{}, errForm)
					return
				}
				r.kind = binary.BigEndian.Uint16(message[r.fields:])
				if !yield(r, nil) {
					return
				}
				at = r.end
			}
		}
		if at != len(message) {
			yield(record{}, errForm)
		}
	}
}

// cleaned checks a server's answer to a question and takes its OPT record off. rcode
// has its extended bits.
func cleaned(answer []byte, q *query) (clean []byte, rcode int, err error) {
	end := len(q.message)
	if len(answer) < end {
		return nil, 0, errors.New("the answer is shorter than the question")
	}
	flags := binary.BigEndian.Uint16(answer[2:])
	if flags&flagResponse == 0 || binary.BigEndian.Uint16(answer[4:]) != 1 {
		return nil, 0, errors.New("the answer is none")
	}
	if flags&flagTruncated != 0 {
		// Whoever asked would take what is there for all of it.
		return nil, 0, errors.New("the answer is truncated")
	}
	rcode = int(flags & 0xf)
	opt := record{start: -1}
	for r, err := range records(answer, end) {
		if err != nil {
			return nil, 0, fmt.Errorf("the answer is %w", err)
		}
		if r.kind != typeOPT {
			continue
		}
		if opt.start >= 0 || r.section != 3 || r.fields != r.start+1 {
			return nil, 0, errors.New("the answer has a misplaced OPT record")
		}
		opt = r
	}
	if opt.start < 0 {
		return answer, rcode, nil
	}
	rcode |= int(answer[opt.fields+4]) << extendedRcodeBits
	if opt.end != len(answer) {
		// Records behind it may hold pointers to one another, which would have to be
		// moved with them. They are additional: nobody depends on them.
		dropped := 0
		for r := range records(answer, end) {
			if r.start > opt.start {
				dropped++
			}
		}
		binary.BigEndian.PutUint16(answer[10:], binary.BigEndian.Uint16(answer[10:])-uint16(dropped))
	}
	binary.BigEndian.PutUint16(answer[10:], binary.BigEndian.Uint16(answer[10:])-1)
	return answer[:opt.start], rcode, nil
}
