package auth

import (
	"bytes"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"strings"
	"time"
	"unicode/utf16"

	//lint:ignore SA1019 NTLM is made of it ([MS-NLMP] section 3.3.2).
	"golang.org/x/crypto/md4"
)

// NTLM version 2 after [MS-NLMP]; the numbers of sections are its. It is written here
// because the library for it, Azure/go-ntlmssp, sends no message integrity code, which
// servers that set a time stamp ask for (3.1.5.1.2), has no channel binding, and gives no
// access to the time and the client's challenge that the published vectors fix.

// Flags of section 2.2.2.5.
const (
	ntlmUnicode           = 1 << 0
	ntlmTarget            = 1 << 2 // the server is to say who it is
	ntlmNTLM              = 1 << 9
	ntlmAlwaysSign        = 1 << 15
	ntlmExtended          = 1 << 19 // extended session security
	ntlmTargetInfo        = 1 << 23
	ntlm128               = 1 << 29
	ntlm56                = 1 << 31
	ntlmFlags      uint32 = ntlmUnicode | ntlmTarget | ntlmNTLM | ntlmAlwaysSign | ntlmExtended | ntlmTargetInfo | ntlm128 | ntlm56
)

// Attributes of section 2.2.2.1.
const (
	avEnd         = 0
	avFlags       = 6
	avTime        = 7
	avTargetName  = 9
	avBinding     = 10
	avFlagMIC     = 2 // in avFlags: the message has an integrity code
	ntlmSignature = "NTLMSSP\x00"
)

// ntlmNegotiate is the first message (2.2.1.1), the same for everybody: it says neither
// a domain nor the name of this host.
func ntlmNegotiate() []byte {
	message := append([]byte(ntlmSignature), 1, 0, 0, 0)
	message = binary.LittleEndian.AppendUint32(message, ntlmFlags)
	return append(message, make([]byte, 16)...) // the empty fields of domain and workstation
}

// ntlmChallenge is what is needed of the second message.
type ntlmChallenge struct {
	message []byte
	flags   uint32
	server  [8]byte
	info    []byte // the attributes, without their end
	time    []byte // of the server; nil if it does not say
	avFlags uint32
}

// Why an NTLM challenge cannot be answered.
var (
	errNTLM        = errors.New("the proxy's NTLM challenge is malformed ([MS-NLMP] section 2.2.1.2)")
	errNTLMUnicode = errors.New("the proxy's NTLM does not do Unicode, as no system in use does not")
)

// maxNTLM bounds the message; those of Windows domains have some 300 bytes.
const maxNTLM = 8 << 10 // bytes

// parseNTLM reads the second message (2.2.1.2).
func parseNTLM(message []byte) (*ntlmChallenge, error) {
	const fixed = 48 // up to the end of the field that says where the attributes are
	if len(message) < 32 || len(message) > maxNTLM || !bytes.HasPrefix(message, []byte(ntlmSignature+"\x02\x00\x00\x00")) {
		return nil, errNTLM
	}
	c := &ntlmChallenge{message: message, flags: binary.LittleEndian.Uint32(message[20:])}
	copy(c.server[:], message[24:])
	if c.flags&ntlmUnicode == 0 {
		return nil, errNTLMUnicode
	}
	if c.flags&ntlmTargetInfo == 0 || len(message) < fixed {
		return c, nil // as servers before NTLM version 2 had it
	}
	length, offset := int(binary.LittleEndian.Uint16(message[40:])), uint64(binary.LittleEndian.Uint32(message[44:]))
	if length == 0 {
		return c, nil
	}
	if offset+uint64(length) > uint64(len(message)) {
		return nil, errNTLM
	}
	info := message[offset : offset+uint64(length)]
	for rest := info; ; {
		if len(rest) < 4 {
			return nil, errNTLM
		}
		id, size := binary.LittleEndian.Uint16(rest), int(binary.LittleEndian.Uint16(rest[2:]))
		if id == avEnd {
			c.info = info[:len(info)-len(rest)]
			return c, nil
		}
		if rest = rest[4:]; size > len(rest) {
			return nil, errNTLM
		}
		switch {
		case id == avTime && size == 8:
			c.time = rest[:size]
		case id == avFlags && size == 4:
			c.avFlags = binary.LittleEndian.Uint32(rest)
		}
		rest = rest[size:]
	}
}

// ntlmRandom is what a proof needs beside what both sides know.
type ntlmRandom struct {
	challenge [8]byte
	now       time.Time
}

// authenticate returns the third message (2.2.1.3) for an account. target is the service
// that is meant, HTTP/host, and binding what says which TLS connection it is on; nil for none.
func (c *ntlmChallenge) authenticate(account *Account, target string, binding []byte) []byte {
	random := ntlmRandom{now: time.Now()}
	rand.Read(random.challenge[:])
	return c.answer(account, target, binding, random)
}

func (c *ntlmChallenge) answer(account *Account, target string, binding []byte, random ntlmRandom) []byte {
	user, domain := account.split()
	key := ntlmKey(user, domain, account.Password)
	info, timestamp := c.attributes(target, binding), c.time
	if timestamp == nil {
		timestamp = fileTime(random.now)
	}
	nt, session := ntlmProof(key, c.server, random.challenge, timestamp, info)
	lm := make([]byte, 24) // with the server's time no proof by LM (3.1.5.1.2)
	if c.time == nil {
		lm = append(hmacMD5(key, c.server[:], random.challenge[:]), random.challenge[:]...)
	}
	return c.marshal(lm, nt, utf16LE(domain), utf16LE(user), session)
}

// marshal puts the third message together, with an integrity code over all three where the
// server has set a time (3.1.5.1.2).
func (c *ntlmChallenge) marshal(lm, nt, domain, user, session []byte) []byte {
	const head, code = 72, 16 // bytes; the head is with the version, which is zero
	message := append([]byte(ntlmSignature), 3, 0, 0, 0)
	offset := head + code
	field := func(content []byte) {
		message = binary.LittleEndian.AppendUint16(message, uint16(len(content)))
		message = binary.LittleEndian.AppendUint16(message, uint16(len(content)))
		message = binary.LittleEndian.AppendUint32(message, uint32(offset))
		offset += len(content)
	}
	// The order of the fields is one thing, that of their contents another; both are free
	// in the second, and this is Windows'.
	contents := [][]byte{lm, nt, domain, user, nil, nil} // workstation, session key
	for _, content := range contents {
		field(content)
	}
	message = binary.LittleEndian.AppendUint32(message, c.flags&ntlmFlags)
	message = append(message, make([]byte, 8+code)...)
	for _, content := range contents {
		message = append(message, content...)
	}
	if c.time != nil {
		copy(message[head:], hmacMD5(session, ntlmNegotiate(), c.message, message))
	}
	return message
}

// attributes are the server's and the client's own, which the proof covers.
func (c *ntlmChallenge) attributes(target string, binding []byte) []byte {
	info := append([]byte(nil), c.info...)
	if c.time != nil {
		info = dropAttribute(info, avFlags)
		info = appendAttribute(info, avFlags, binary.LittleEndian.AppendUint32(nil, c.avFlags|avFlagMIC))
	}
	if c.time != nil || binding != nil {
		if binding == nil {
			binding = make([]byte, md5.Size) // there is no such connection
		}
		info = appendAttribute(info, avBinding, binding)
		info = appendAttribute(info, avTargetName, utf16LE(target))
	}
	return append(info, avEnd, 0, 0, 0)
}

func appendAttribute(info []byte, id uint16, value []byte) []byte {
	info = binary.LittleEndian.AppendUint16(info, id)
	info = binary.LittleEndian.AppendUint16(info, uint16(len(value)))
	return append(info, value...)
}

// dropAttribute takes the attributes of a kind out of those that parseNTLM has checked.
func dropAttribute(info []byte, id uint16) []byte {
	var kept []byte
	for len(info) > 0 {
		size := 4 + int(binary.LittleEndian.Uint16(info[2:]))
		if binary.LittleEndian.Uint16(info) != id {
			kept = append(kept, info[:size]...)
		}
		info = info[size:]
	}
	return kept
}

// ntlmKey is NTOWFv2 (3.3.2).
func ntlmKey(user, domain, password string) []byte {
	h := md4.New()
	h.Write(utf16LE(password))
	return hmacMD5(h.Sum(nil), utf16LE(strings.ToUpper(user)+domain))
}

// ntlmProof is the response of NTLM version 2 (3.3.2) and the key of the session.
func ntlmProof(key []byte, server, client [8]byte, timestamp, info []byte) (response, session []byte) {
	blob := []byte{1, 1, 0, 0, 0, 0, 0, 0}
	blob = append(blob, timestamp...)
	blob = append(blob, client[:]...)
	blob = append(blob, 0, 0, 0, 0)
	blob = append(blob, info...)
	blob = append(blob, 0, 0, 0, 0)
	proof := hmacMD5(key, server[:], blob)
	return append(proof, blob...), hmacMD5(key, proof)
}

func hmacMD5(key []byte, parts ...[]byte) []byte {
	mac := hmac.New(md5.New, key)
	for _, part := range parts {
		mac.Write(part)
	}
	return mac.Sum(nil)
}

// fileTime is a time as Windows has it: in units of 100 ns since 1601 ([MS-DTYP] section 2.3.3).
func fileTime(t time.Time) []byte {
	const epoch = 11_644_473_600 // seconds from 1601 to 1970
	return binary.LittleEndian.AppendUint64(nil, uint64((t.Unix()+epoch)*10_000_000+int64(t.Nanosecond()/100)))
}

func utf16LE(text string) []byte {
	var out []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return out
}
