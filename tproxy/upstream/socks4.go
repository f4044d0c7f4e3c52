package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// The octets of SOCKS4 ("SOCKS: A protocol for TCP proxy across firewalls", Ying-Da Lee,
// 1992) and of its extension 4A ("SOCKS 4A: A Simple Extension to SOCKS 4 Protocol"), with
// which the proxy is asked for a name. No RFC has them.
const (
	socks4Version      = 4
	socks4ReplyVersion = 0

	socks4Granted     = 90
	socks4Rejected    = 91
	socks4NoIdentd    = 92
	socks4OtherIdentd = 93
)

// socks4Reply is the length of the answer: version, code, and a port and an address that
// mean nothing to a tunnel.
const socks4Reply = 2 + portSize + 4 // bytes

// maxUserID bounds the user id. The protocol does not; it is what SOCKS5 can send.
const maxUserID = maxSOCKS5String

// What makes an answer unusable.
var (
	errNotSOCKS4   = errors.New("the answer is not SOCKS4: is the address that of a SOCKS4a proxy?")
	errSOCKS5Alone = errors.New("the proxy answers by SOCKS5: use socks5:// in place of socks4a://")
)

// socks4 is the Handshake of SOCKS4a: one request, and one answer of eight octets. Like
// those of SOCKS5 that is judged as soon as the octet that matters is there.
//
// The user id is no credential. Nobody can prove anything by it, so that no proxy locks an
// account for it, and it is sent without a lease.
type socks4 struct {
	target Target
	userID string
	held   int // octets of the answer that were read
}

// checkSOCKS4 returns why a target, which is one for other proxies, cannot be asked for.
func checkSOCKS4(t Target) error {
	address, err := netip.ParseAddr(t.Host)
	switch address = address.Unmap(); {
	case err != nil:
		return nil // a name
	case address.Is6():
		return fmt.Errorf("target %s: SOCKS4 knows names and IPv4 addresses only: use a socks5:// or http:// upstream for IPv6", t.Host)
	case address.AsSlice()[0] == 0:
		// 0.0.0.x is how SOCKS4a says that a name follows.
		return fmt.Errorf("target %s: SOCKS4 cannot ask for an address of 0.0.0.0/8, which leads nowhere (RFC 6890)", t.Host)
	}
	return nil
}

// Hello returns the request: the port, the address, the user id and a zero; for a name an
// address that there is not, and the name and a zero at the end.
func (s *socks4) Hello() []byte {
	const commandConnect, frame = 1, 2 + portSize + 4 + 1 + 1
	request := make([]byte, 0, frame+len(s.userID)+len(s.target.Host))
	request = append(request, socks4Version, commandConnect, byte(s.target.Port>>8), byte(s.target.Port))
	address, err := netip.ParseAddr(s.target.Host)
	if err == nil {
		request = append(request, address.Unmap().AsSlice()...)
		request = append(request, s.userID...)
		return append(request, 0)
	}
	request = append(request, 0, 0, 0, 1)
	request = append(request, s.userID...)
	request = append(request, 0)
	request = append(request, s.target.Host...)
	return append(request, 0)
}

// Feed reads the answer.
func (s *socks4) Feed(in []byte) (out, rest []byte, done bool, err error) {
	for i, octet := range in {
		switch s.held {
		case 0:
			err = checkReplyVersion(octet)
		case 1:
			err = judgeSOCKS4(octet)
		case socks4Reply - 1:
			return nil, in[i+1:], true, nil
		}
		if err != nil {
			return nil, nil, false, err
		}
		s.held++
	}
	return nil, nil, false, nil
}

func checkReplyVersion(version byte) error {
	switch version {
	case socks4ReplyVersion:
		return nil
	case socks5Version:
		return errSOCKS5Alone
	}
	return errNotSOCKS4
}

// judgeSOCKS4 is what the code of an answer means.
func judgeSOCKS4(code byte) error {
	refused := &RefusedError{Code: int(code)}
	switch code {
	case socks4Granted:
		return nil
	case socks4Rejected:
		refused.Reason = "Request rejected or failed"
		refused.advice = "it does not say why: it forbids this destination, or cannot reach it; the proxy's own log tells more"
	case socks4NoIdentd:
		refused.Reason = "Cannot connect to identd on the client"
		refused.advice = "it wants to ask this host who its user is (RFC 1413): have that switched off there, or run an identd here"
	case socks4OtherIdentd:
		refused.Reason = "Client program and identd report different user-ids"
		refused.advice = "correct the user id in socks4a://user@host:port, or what the identd of this host says"
	default:
		return fmt.Errorf("the answer has the unknown code %d: is the address that of a SOCKS4a proxy?", code)
	}
	return refused
}

// parseUserID decodes what stands before the @ of a SOCKS4 proxy's URL.
func parseUserID(userinfo string) (userID string, err error) {
	userID, password, err := decodeUserinfo(userinfo)
	switch {
	case err != nil:
		return "", err
	case password != "":
		return "", errors.New("a SOCKS4 proxy takes no password: leave it out (socks4a://user@host:port), or use socks5:// if it speaks that")
	case strings.Contains(userID, "\x00"):
		return "", errors.New("a zero ends the user id of SOCKS4, and cannot be part of it: remove it (%00)")
	case len(userID) > maxUserID:
		return "", fmt.Errorf("the user id is longer than %d bytes: use a shorter one", maxUserID)
	}
	return userID, nil
}
