package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
)

// The octets of SOCKS5 (RFC 1928 sections 3 to 6).
const (
	socks5Version = 5

	methodNone     = 0x00
	methodPassword = 0x02 // user name and password (RFC 1929)
	methodRefused  = 0xff // none of those that were offered

	commandConnect   = 1
	commandAssociate = 3 // for datagrams: see associate.go

	addressIPv4 = 1
	addressName = 3 // its length in an octet, and no zero at the end
	addressIPv6 = 4

	replySucceeded = 0
)

// passwordVersion is that of the sub-negotiation (RFC 1929 section 2).
const passwordVersion = 1

// maxSOCKS5String is the longest name, user name or password that SOCKS5 can send:
// their lengths are octets. Of a target's name validName allows less.
const maxSOCKS5String = 255 // bytes

// portSize is the length of a port, which follows every address.
const portSize = 2 // bytes

// What makes an answer unusable.
var errNotSOCKS5 = errors.New("the answer is not SOCKS5: is the address that of a SOCKS5 proxy?")

// socks5 is the Handshake of SOCKS5: the methods of authentication, then if the
// proxy wants it the sub-negotiation of the password, then the request.
//
// Each message waits for the answer to the one before, where there is only one
// method to choose from as well: that the methods are settled first is what RFC
// 1928 section 3 demands, and there are proxies that drop, or answer with an
// error, what comes early. It costs a round trip.
//
// Answers are a few octets of known length, so that nothing a proxy says makes
// anything grow. Each is judged as soon as the octet that matters is there:
// proxies that refuse may close before the end of their answer.
type socks5 struct {
	command byte
	target  Target
	demand  *demand
	lease   *Lease // nil: no credential is offered

	stage stage
	head  [5]byte // the beginning of an answer, up to the length of a name
	held  int     // of head
	skip  int     // what is left of the proxy's own address
	bound []byte  // that address, behind head, and its port; kept for commandAssociate alone
	out   []byte
}

// stage is which answer a SOCKS5 handshake waits for.
type stage uint8

const (
	choosing   stage = iota // the method
	confirming              // the verdict on the password
	requesting              // the reply to the request
	skipping                // the rest of it: the address from which the proxy connects, of which a tunnel makes no use
)

func newSOCKS5(p *Proxy, t Target, lease *Lease) *socks5 {
	return &socks5{command: commandConnect, target: t, demand: &p.demand, lease: lease}
}

// Hello returns the methods that the proxy may choose from. The one that sends the
// password is offered only where there is one that may be sent.
func (s *socks5) Hello() []byte {
	if s.lease.stale() {
		s.lease = nil // it was refused meanwhile
	}
	if s.lease == nil {
		return []byte{socks5Version, 1, methodNone}
	}
	return []byte{socks5Version, 2, methodNone, methodPassword}
}

// Feed reads the answers. An answer that is there before its question is taken all
// the same: how the stream is cut up must not make a difference.
func (s *socks5) Feed(in []byte) (out, rest []byte, done bool, err error) {
	s.out = s.out[:0]
	for len(in) > 0 {
		if s.stage == skipping {
			n := min(s.skip, len(in))
			if s.command == commandAssociate {
				s.bound = append(s.bound, in[:n]...)
			}
			in = in[n:]
			if s.skip -= n; s.skip == 0 {
				return s.out, in, true, nil
			}
			continue
		}
		s.head[s.held] = in[0]
		s.held++
		in = in[1:]
		if err := s.read(); err != nil {
			s.lease.Settle(err)
			return nil, nil, false, err
		}
	}
	return s.out, nil, false, nil
}

// read looks at an answer, perhaps not whole, each time that it has grown by an
// octet.
func (s *socks5) read() error {
	switch {
	case s.stage != confirming && s.head[0] != socks5Version:
		return errNotSOCKS5
	case s.held == 1:
		return nil
	}
	switch s.stage {
	case choosing:
		return s.choose(s.head[1])
	case confirming:
		// Curl takes any version here, as some proxies repeat the 5. A password that
		// was sent must be judged by what was said about it.
		return s.confirm(s.head[1])
	}
	return s.reply()
}

// choose goes on with the method that the proxy has chosen.
func (s *socks5) choose(method byte) error {
	switch {
	case method == methodNone:
		if s.lease != nil {
			// It did not look at the credential: whoever waits for that may go.
			s.demand.doubt()
			s.lease.settle(notJudged)
		}
		s.request()
		return nil
	case method == methodPassword && s.lease != nil:
		s.demand.confirm()
		s.password()
		return nil
	case method == methodRefused:
		return s.noMethod()
	}
	return fmt.Errorf("the proxy chose to authenticate by method %d, which was not offered: is the address that of a SOCKS5 proxy?", method)
}

// noMethod is the error of a proxy that takes none of the methods.
func (s *socks5) noMethod() error {
	advice := "it wants to authenticate: give a user name and a password as socks5://user:password@host:port (special characters percent-encoded)"
	switch {
	case s.lease != nil:
		advice = "it takes neither a user name and a password nor connections without them: have one of the two enabled there (the password was not sent)"
	case s.demand.none():
		s.demand.confirm()
		advice = "it wants the user name and the password, for which it did not ask before: the next flow sends them"
	}
	return &RefusedError{Code: methodRefused, Reason: "No acceptable methods", advice: advice}
}

// password sends the credential (RFC 1929 section 2).
func (s *socks5) password() {
	s.stage, s.held = confirming, 0
	account := s.lease.credential.account.Load()
	s.out = append(s.out, passwordVersion, byte(len(account.User)))
	s.out = append(s.out, account.User...)
	s.out = append(s.out, byte(len(account.Password)))
	s.out = append(s.out, account.Password...)
}

// confirm goes on with the verdict on the credential. It is known here, whatever
// becomes of the request.
func (s *socks5) confirm(status byte) error {
	if status != 0 {
		return &RefusedError{
			Code: int(status), Reason: "Authentication failure", Denied: true,
			advice: "it refuses the user name or the password: correct them in socks5://user:password@host:port (special characters percent-encoded)",
		}
	}
	s.lease.Settle(nil)
	s.request()
	return nil
}

// request asks for the tunnel or the association (RFC 1928 section 4). Names are left to the proxy.
func (s *socks5) request() {
	const frame = 3 + 2 + 16 + portSize // bytes around a name, or with an address
	s.stage, s.held = requesting, 0
	s.out = slices.Grow(s.out, frame+len(s.target.Host))
	s.out = append(s.out, socks5Version, s.command, 0)
	address, err := netip.ParseAddr(s.target.Host)
	switch address = address.Unmap(); {
	case err != nil:
		s.out = append(s.out, addressName, byte(len(s.target.Host)))
		s.out = append(s.out, s.target.Host...)
	case address.Is4():
		s.out = append(s.out, addressIPv4)
		s.out = append(s.out, address.AsSlice()...)
	default:
		s.out = append(s.out, addressIPv6)
		s.out = append(s.out, address.AsSlice()...)
	}
	s.out = append(s.out, byte(s.target.Port>>8), byte(s.target.Port))
}

// reply reads the answer to the request (RFC 1928 section 6) as far as it is there:
// version, reply, reserved, type of address, and for a name its length.
func (s *socks5) reply() error {
	const least, withLength = 4, 5
	if code := s.head[1]; code != replySucceeded {
		refused := refusedReply(code)
		if s.command == commandAssociate {
			refused.adviseAssociate()
		}
		return refused
	}
	if s.held < least {
		return nil
	}
	switch s.head[3] {
	case addressIPv4:
		s.skip = 4 + portSize
	case addressIPv6:
		s.skip = 16 + portSize
	case addressName:
		if s.held < withLength {
			return nil
		}
		s.skip = int(s.head[4]) + portSize
	default:
		return fmt.Errorf("the answer has an address of the unknown type %d: is the address that of a SOCKS5 proxy?", s.head[3])
	}
	s.stage = skipping
	return nil
}

// refusedReply is the error of a reply that opens no tunnel, by the RFC's names.
func refusedReply(code byte) *RefusedError {
	const forbids = "it forbids this destination or port: have it allowed there, or exempt it from the proxy (no_proxy)"
	const unreached = "it cannot reach the destination: if others work, look at the destination's name, port and state"
	const lacks = "it does not do what every SOCKS5 proxy must: is the address that of a SOCKS5 proxy?"
	refused := &RefusedError{Code: int(code)}
	switch code {
	case 1:
		refused.Reason, refused.advice = "General SOCKS server failure", "it does not say why: the proxy's own log tells more"
	case 2:
		refused.Reason, refused.advice = "Connection not allowed by ruleset", forbids
	case 3:
		refused.Reason, refused.advice = "Network unreachable", unreached
	case 4:
		refused.Reason, refused.advice = "Host unreachable", unreached
	case 5:
		refused.Reason, refused.advice = "Connection refused", "the destination refused the proxy's connection: look at the destination's port and state"
	case 6:
		refused.Reason, refused.advice = "TTL expired", unreached
	case 7:
		refused.Reason, refused.advice = "Command not supported", lacks
	case 8:
		refused.Reason, refused.advice = "Address type not supported", "it takes no such address: if this one is IPv6, the proxy may know IPv4 or names only"
	default:
		refused.advice = "no tunnel was opened: the proxy's own log tells more"
	}
	return refused
}

// demand is whether a proxy asks for the credential. As long as nothing else
// is known the credential is offered, which is done under a lease and by one flow
// at a time until it is accepted. A proxy that chooses to go without would have
// every flow wait for that, so it is not offered any more; should the proxy want it
// later, one flow of SOCKS5 fails, or one of HTTP asks again, and from then on it is
// always offered.
type demand struct{ state atomic.Uint32 }

const (
	demandUnknown   uint32 = iota
	demandNone             // the proxy chose to go without
	demandConfirmed        // it asked once
)

func (d *demand) none() bool { return d.state.Load() == demandNone }
func (d *demand) doubt()     { d.state.CompareAndSwap(demandUnknown, demandNone) }
func (d *demand) confirm()   { d.state.Store(demandConfirmed) }
func (d *demand) forget()    { d.state.Store(demandUnknown) }
