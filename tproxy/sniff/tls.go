package sniff

import "golang.org/x/crypto/cryptobyte"

// The parts of TLS that a ClientHello is made of (RFC 8446; the same in TLS 1.0
// to 1.2).
const (
	recordHeader    = 5  // bytes: type, legacy version (2), length (2); section 5.1
	handshakeHeader = 4  // bytes: type, length (3); section 4
	randomLength    = 32 // bytes; section 4.1.2

	recordHandshake      = 22 // ContentType handshake
	recordMajor          = 3  // of the legacy version, in SSL 3.0 and all of TLS
	messageClientHello   = 1  // HandshakeType client_hello
	extensionServerName  = 0  // RFC 6066, section 3
	serverNameIsHostName = 0  // NameType host_name, the only one ever defined
)

// TLS finds the server name in a ClientHello (RFC 6066, section 3), which may be
// cut into any number of records. With Encrypted ClientHello it is the public
// name of the outer hello, all that the wire shows. The zero value is ready.
//
// The hello is parsed once it is complete: where it lies if it is in one record,
// as usual, and out of a copy otherwise.
type TLS struct {
	record  int                   // where the first record that is not complete starts in the flight
	message int                   // bytes of the handshake message in the records before it
	header  [handshakeHeader]byte // of the message, as far as it is known
}

// Next looks at the flight: everything received so far, from the first byte of
// the connection on. It keeps no reference to it. The name, in the form that
// [ValidName] gives it, comes with [Found] only.
func (s *TLS) Next(flight []byte) (name string, verdict Verdict) {
	flight, short := bounded(flight)
	for {
		rest := flight[s.record:]
		if !handshakeRecord(rest) {
			return "", Absent
		}
		if len(rest) < recordHeader {
			return "", short
		}
		fragment, end := rest[recordHeader:], recordHeader+recordLength(rest)
		if s.message == 0 && len(fragment) > 0 && fragment[0] != messageClientHello || s.record+end > MaxFlight {
			return "", Absent
		}
		if len(rest) < end {
			return "", short
		}
		fragment = fragment[:end-recordHeader]
		if s.message < handshakeHeader {
			copy(s.header[s.message:], fragment)
		}
		s.record, s.message = s.record+end, s.message+len(fragment)
		if s.message < handshakeHeader {
			continue
		}
		switch length := s.length(); {
		case s.record+length-s.message > MaxFlight: // even if one record brings the rest
			return "", Absent
		case len(fragment) == s.message && length <= len(fragment):
			return serverName(fragment[handshakeHeader:length])
		case length <= s.message:
			return serverName(s.join(flight)[handshakeHeader:length])
		}
	}
}

// length is that of the whole message, header included, once the header is known.
func (s *TLS) length() int {
	return handshakeHeader + int(s.header[1])<<16 + int(s.header[2])<<8 + int(s.header[3])
}

// join copies the handshake message out of the complete records.
func (s *TLS) join(flight []byte) []byte {
	message := make([]byte, 0, s.message)
	for at := 0; at < s.record; {
		end := at + recordHeader + recordLength(flight[at:])
		message = append(message, flight[at+recordHeader:end]...)
		at = end
	}
	return message
}

// recordLength is that of the record's fragment. The header must be complete.
func recordLength(record []byte) int {
	return int(record[3])<<8 | int(record[4])
}

// handshakeRecord reports whether the bytes, a part of a record header maybe, can
// start a record of a handshake. Such a record is never empty (RFC 8446, section 5.1).
func handshakeRecord(record []byte) bool {
	switch {
	case len(record) > 0 && record[0] != recordHandshake:
		return false
	case len(record) > 1 && record[1] != recordMajor:
		return false
	case len(record) >= recordHeader && recordLength(record) == 0:
		return false
	}
	return true
}

// serverName finds the name in the body of a ClientHello (RFC 8446, section 4.1.2).
func serverName(hello cryptobyte.String) (string, Verdict) {
	var session, suites, compressions, extensions cryptobyte.String
	if !hello.Skip(2+randomLength) || // legacy version, random
		!hello.ReadUint8LengthPrefixed(&session) ||
		!hello.ReadUint16LengthPrefixed(&suites) ||
		!hello.ReadUint8LengthPrefixed(&compressions) ||
		!hello.ReadUint16LengthPrefixed(&extensions) {
		return "", Absent
	}
	for !extensions.Empty() {
		var kind uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) {
			return "", Absent
		}
		if kind == extensionServerName {
			return hostName(data)
		}
	}
	return "", Absent
}

// hostName finds the host name in a server_name extension.
func hostName(extension cryptobyte.String) (string, Verdict) {
	var list cryptobyte.String
	if !extension.ReadUint16LengthPrefixed(&list) {
		return "", Absent
	}
	for !list.Empty() {
		var kind uint8
		var name cryptobyte.String
		if !list.ReadUint8(&kind) || !list.ReadUint16LengthPrefixed(&name) {
			return "", Absent
		}
		if kind == serverNameIsHostName {
			return named(name)
		}
	}
	return "", Absent
}
