package auth

import (
	"encoding/asn1"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/jcmturner/gokrb5/v8/iana/chksumtype"
	"github.com/jcmturner/gokrb5/v8/messages"
	"github.com/jcmturner/gokrb5/v8/types"
)

// Object identifiers, in DER.
var (
	oidSPNEGO   = []byte{0x06, 0x06, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x02}                   // 1.3.6.1.5.5.2 (RFC 4178)
	oidKerberos = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x12, 0x01, 0x02, 0x02} // 1.2.840.113554.1.2.2 (RFC 4121)
)

// token returns a proof for a service, good for one use: SPNEGO's first token (RFC 4178
// section 4.2.1) with Kerberos' (RFC 4121 section 4.1) in it; nil if there is no ticket.
func (k *Kerberos) token(service string, binding []byte) []byte {
	k.mutex.Lock()
	t := k.tickets[service]
	now := time.Now()
	if !t.holds(now) {
		k.mutex.Unlock()
		return nil
	}
	// The service takes two proofs of the same microsecond for a replay.
	if now = now.Truncate(time.Microsecond); !now.After(k.last) {
		now = k.last.Add(time.Microsecond)
	}
	k.last = now
	k.mutex.Unlock()
	request, err := t.prove(now.UTC(), binding)
	if err != nil {
		return nil // the key is of a kind that the library cannot use; its ticket would not have been read
	}
	inner := der(0x60, oidKerberos, []byte{1, 0}, request)
	mechanisms := der(0xa0, der(0x30, oidKerberos))
	return der(0x60, oidSPNEGO, der(0xa0, der(0x30, mechanisms, der(0xa2, der(0x04, inner)))))
}

// prove makes an AP-REQ, whose checksum says what it is for (RFC 4121 section 4.1.1).
func (t *ticket) prove(now time.Time, binding []byte) ([]byte, error) {
	const integrity, confidentiality = 32, 16 // of the context, as other clients ask for
	authenticator, err := types.NewAuthenticator(t.realm, t.client)
	if err != nil {
		return nil, err
	}
	authenticator.CTime, authenticator.Cusec = now, now.Nanosecond()/1000
	checksum := make([]byte, 24)
	binary.LittleEndian.PutUint32(checksum, 16)
	copy(checksum[4:20], binding)
	binary.LittleEndian.PutUint32(checksum[20:], integrity|confidentiality)
	authenticator.Cksum = types.Checksum{CksumType: chksumtype.GSSAPI, Checksum: checksum}
	request, err := messages.NewAPReq(t.Ticket, t.key, authenticator)
	if err != nil {
		return nil, err
	}
	return request.Marshal()
}

// der encodes an element of ASN.1 whose contents are the parts.
func der(tag byte, parts ...[]byte) []byte {
	length := 0
	for _, part := range parts {
		length += len(part)
	}
	out := []byte{tag}
	switch {
	case length < 1<<7:
		out = append(out, byte(length))
	case length < 1<<8:
		out = append(out, 0x81, byte(length))
	case length < 1<<16:
		out = append(out, 0x82, byte(length>>8), byte(length))
	default:
		out = append(out, 0x83, byte(length>>16), byte(length>>8), byte(length))
	}
	for _, part := range parts {
		out = append(out, part...)
	}
	return out
}

// replyState is how far a proxy says that the negotiation is (RFC 4178 section 4.2.2).
type replyState int

const (
	replyUnknown  replyState = -1 // a token that is none of SPNEGO's answers
	replyRejected replyState = 2
)

// parseReply reads the state of SPNEGO's second token. The Kerberos answer in it, which
// would prove the proxy to this side, is not looked at: it was not asked for.
func parseReply(token []byte) replyState {
	var choice, sequence, field asn1.RawValue
	if _, err := asn1.Unmarshal(token, &choice); err != nil || choice.Class != asn1.ClassContextSpecific || choice.Tag != 1 {
		return replyUnknown
	}
	if _, err := asn1.Unmarshal(choice.Bytes, &sequence); err != nil || sequence.Tag != asn1.TagSequence {
		return replyUnknown
	}
	if _, err := asn1.Unmarshal(sequence.Bytes, &field); err != nil || field.Class != asn1.ClassContextSpecific || field.Tag != 0 {
		return replyUnknown
	}
	var state asn1.Enumerated
	if _, err := asn1.Unmarshal(field.Bytes, &state); err != nil {
		return replyUnknown
	}
	return replyState(state)
}

// refusedToken says what a token means that came with a 407 to a proof.
func refusedToken(token string) error {
	text, err := base64.StdEncoding.DecodeString(token)
	if err == nil {
		if state := parseReply(text); state != replyUnknown && state != replyRejected {
			return fmt.Errorf("%w: it wants to go on negotiating (state %d), which Kerberos needs not", ErrRefused, state)
		}
	}
	return ErrRefused
}
