package exchange

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
)

// The header of a message (RFC 1035 section 4.1.1), offsets in bytes.
const (
	headerSize = 12
	flagsAt    = 2
	countsAt   = 4 // QDCOUNT, ANCOUNT, NSCOUNT, ARCOUNT

	flagAnswer    = 0x80 // QR, in the first byte of flags
	flagTruncated = 0x02 // TC, in the first byte of flags
	maskOpcode    = 0x78 // in the first byte of flags
	maskRcode     = 0x0f // in the second byte of flags
)

const (
	maxMessage = 65535 // bytes; the length before it on a stream has 16 bits
	maxName    = 255   // bytes in wire form (RFC 1035 section 2.3.4)
	maxLabel   = 63    // bytes
)

// Response codes (RFC 1035 section 4.1.1).
const (
	rcodeServFail = 2
	rcodeRefused  = 5
)

var (
	errQuery     = errors.New("not a DNS query with one question")
	errMalformed = errors.New("malformed message")
)

// questionEnd returns where the one question of a message ends. Its name, the
// first in the message, has nothing before it that could be pointed at.
func questionEnd(message []byte) (end int, ok bool) {
	if len(message) < headerSize || binary.BigEndian.Uint16(message[countsAt:]) != 1 {
		return 0, false
	}
	at := headerSize
	for {
		if at >= len(message) {
			return 0, false
		}
		length := int(message[at])
		at += 1 + length
		if length > maxLabel || at-headerSize > maxName {
			return 0, false
		}
		if length == 0 {
			break
		}
	}
	end = at + 4 // type and class
	return end, end <= len(message)
}

// checkQuery returns where the question of a query ends, or why it cannot be asked.
func checkQuery(query []byte) (end int, err error) {
	end, ok := questionEnd(query)
	if !ok || len(query) > maxMessage || query[flagsAt]&flagAnswer != 0 {
		return 0, errQuery
	}
	return end, nil
}

// answers reports whether answer is one to the question query[:end]. The ids are
// not compared, and what follows the question is not looked at.
func answers(answer, query []byte, end int) bool {
	return len(answer) >= end &&
		answer[flagsAt]&flagAnswer != 0 &&
		answer[flagsAt]&maskOpcode == query[flagsAt]&maskOpcode &&
		binary.BigEndian.Uint16(answer[countsAt:]) == 1 &&
		bytes.Equal(answer[headerSize:end], query[headerSize:end])
}

// bareError reports whether answer is a header that says no more than that there
// was an error: what some servers send when they cannot read the query.
func bareError(answer, query []byte) bool {
	return len(answer) == headerSize &&
		answer[flagsAt]&flagAnswer != 0 &&
		answer[flagsAt]&maskOpcode == query[flagsAt]&maskOpcode &&
		answer[flagsAt+1]&maskRcode != 0 &&
		binary.BigEndian.Uint64(answer[countsAt:]) == 0
}

// withQuestion returns a copy of answer, a bare error, as one that repeats the
// question query[:end] like every other answer.
func withQuestion(answer, query []byte, end int) []byte {
	whole := make([]byte, 0, end)
	whole = append(whole, answer...)
	whole[countsAt+1] = 1
	return append(whole, query[headerSize:end]...)
}

// own returns a copy of answer with the id of query.
func own(answer, query []byte) []byte {
	answer = bytes.Clone(answer)
	copy(answer, query[:2])
	return answer
}

// rcode returns the response code without the bits that EDNS adds.
func rcode(answer []byte) byte { return answer[flagsAt+1] & maskRcode }

// walk goes over all records of a message whose question ends at end, and returns
// where the last one ends. visit, if there is one, is told where the owner's name
// of each begins and where its type, followed by class, TTL and length (RFC 1035
// section 4.1.3), begins. What is in the records is not looked at.
func walk(message []byte, end int, visit func(owner, fixed int)) (int, error) {
	records := 0
	for i := 1; i < 4; i++ {
		records += int(binary.BigEndian.Uint16(message[countsAt+2*i:]))
	}
	at := end
	for range records {
		fixed, ok := skipName(message, at)
		if !ok || fixed+10 > len(message) {
			return 0, errMalformed
		}
		next := fixed + 10 + int(binary.BigEndian.Uint16(message[fixed+8:]))
		if next > len(message) {
			return 0, errMalformed
		}
		if visit != nil {
			visit(at, fixed)
		}
		at = next
	}
	return at, nil
}

// skipName returns where the name at start, perhaps compressed (RFC 1035 section
// 4.1.4), ends. A pointer must lead back; it is not followed.
func skipName(message []byte, start int) (end int, ok bool) {
	at := start
	for at < len(message) {
		length := int(message[at])
		switch {
		case length == 0:
			return at + 1, true
		case length <= maxLabel:
			if at += 1 + length; at-start >= maxName {
				return 0, false
			}
		case length >= 0xc0:
			if at+2 > len(message) || int(binary.BigEndian.Uint16(message[at:])&0x3fff) >= start {
				return 0, false
			}
			return at + 2, true
		default: // 0x40 and 0x80 are reserved
			return 0, false
		}
	}
	return 0, false
}

// disguise gives a query that ends its question at end a random id and random
// case: what a forger who does not see the query has to guess, besides the port
// (RFC 5452 section 4, draft-vixie-dnsext-dns0x20). The name of a query has at most
// 255 letters; the bytes that tell the lengths of labels are none.
func disguise(query []byte, end int) {
	var random [2 + (maxName+7)/8]byte
	rand.Read(random[:]) // never fails
	copy(query, random[:2])
	name := query[headerSize : end-4]
	for i, c := range name {
		if 'a' <= c|0x20 && c|0x20 <= 'z' {
			name[i] = c ^ random[2+i/8]>>(i%8)&1<<5
		}
	}
}

// reveal undoes disguise in an answer that has been walked over: it puts in the id
// and the question of query, and writes the name asked for in the query's case
// wherever a record's owner repeats it instead of pointing at the question.
func reveal(answer, query []byte, end int) {
	var asked [maxName]byte
	name := asked[:copy(asked[:], answer[headerSize:end-4])]
	walk(answer, end, func(owner, _ int) {
		if bytes.HasPrefix(answer[owner:], name) {
			copy(answer[owner:], query[headerSize:end-4])
		}
	})
	copy(answer, query[:2])
	copy(answer[headerSize:end], query[headerSize:end])
}

// age takes seconds off the TTL of every record. An OPT record (RFC 6891 section
// 6.1.3) has flags in that place.
func age(answer []byte, end int, seconds uint32) {
	const typeOPT = 41
	walk(answer, end, func(_, fixed int) {
		if binary.BigEndian.Uint16(answer[fixed:]) != typeOPT {
			ttl := binary.BigEndian.Uint32(answer[fixed+4:])
			binary.BigEndian.PutUint32(answer[fixed+4:], ttl-min(ttl, seconds))
		}
	})
}
