// Package upstream is how a flow leaves the host: directly, or through a tunnel
// that a proxy opens. That is an HTTP proxy at its CONNECT (RFC 9110 section
// 9.3.6), to which package auth proves who the gateway is if it asks, or a SOCKS5 proxy
// (RFC 1928), with a user name and a password (RFC 1929) if it asks for them, or a
// SOCKS4a proxy.
//
// What is said to a proxy is a [Handshake], a state machine that does no input or
// output, so that an event loop can drive it as well as [Drive], which does so on
// an ordinary net.Conn. A [Dialer] opens connections and does all of it on the
// caller's goroutine.
//
// # Credentials
//
// Companies lock accounts after a few wrong passwords, and a gateway has hundreds
// of flows that would each send one. So a proxy's credential is sent only under a
// [Lease], from just before the request until the answer is known:
//
//   - untried: one flow sends it and the others wait for the answer. An answer
//     that says nothing about the credential passes the turn to the next.
//   - accepted: everybody sends it. The lease costs one atomic load.
//   - refused (at its first use): nobody sends it until [Proxy.Reset].
//   - suspended (refused after it was accepted): nobody sends it but for single
//     retries, minutes apart. Flows that were under way already when it happened
//     may each be refused.
//
// A refusal is HTTP's 407 to a proof, or the failure of SOCKS5's sub-negotiation. A
// proxy that does not ask for the credential gets to know nothing of it and says
// nothing about it: its flows then go without a lease and wait for nobody.
//
// A proxy of HTTP is asked without a credential once, by the flow that has the turn, and
// says with its 407 what it takes; Basic would show the password to one that wants
// something better. From then on all flows send what it takes without being asked. The
// 407 is answered on the same connection where that is kept, and else on another one: the
// handshake ends with [ErrReconnect].
package upstream

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// Handshake is one flow's negotiation with its proxy. It does no input or output
// of its own, keeps no time, and bounds what it accepts. It serves one connection
// and is not safe for concurrent use.
type Handshake interface {
	// Hello is what to send first.
	Hello() []byte
	// Feed takes the bytes that were just received, however the stream was cut up,
	// and returns what to send now. When done, rest is the end of in, which
	// already belongs to the tunnel. An error ends the connection. After done or
	// an error Feed must not be called again.
	//
	// in may be reused once the call has returned and rest is dealt with; out is
	// valid until the next call.
	Feed(in []byte) (out, rest []byte, done bool, err error)
}

// Proxy is one configured upstream and what is known of its credential. All flows
// share it; it is safe for concurrent use.
type Proxy struct {
	protocol   protocol
	host       string // a DNS name, or an IP literal without brackets
	port       uint16
	socket     string       // the path of a unix socket in place of host and port; empty for none
	credential *credential  // nil: none
	client     *auth.Client // HTTP: what proves the credential; nil without one
	demand     demand       // whether the proxy asks for the credential
	userID     string       // SOCKS4: who the gateway says that it is
	health     *health

	// Made once, because every flow asks for them.
	url     string
	literal []netip.AddrPort // the address, if host is an IP literal
}

// Host returns the proxy's DNS name or IP literal, the latter without brackets; empty for
// one on a unix socket.
func (p *Proxy) Host() string { return p.host }

// Direct reports whether this stands for the way without a proxy.
func (p *Proxy) Direct() bool { return p.protocol == protocolDirect }

// Port returns the proxy's TCP port; 0 for one on a unix socket.
func (p *Proxy) Port() uint16 { return p.port }

// String returns the proxy's URL, its scheme included, without user name and
// password, fit for logs.
func (p *Proxy) String() string { return p.url }

// Join reports whether p is the same proxy with the same credential as other. If
// only the credential is the same it is one account all the same, which both must
// not try at once: p takes over the other's, with what is known of it. It is for
// the time before the first use; either may be nil.
func (p *Proxy) Join(other *Proxy) (same bool) {
	if p == nil || other == nil {
		return p == other
	}
	if p.credential.same(other.credential) {
		p.credential = other.credential
		if p.client != nil {
			p.client = auth.NewClient(&p.credential.account, p.client.Pinned(), p.host)
		}
	}
	return p.url == other.url && p.userID == other.userID && p.credential == other.credential
}

// Handshake returns the negotiation of a tunnel to t. It sends the credential only
// under a lease of this proxy, nil for none, and settles that with the answer; a
// negotiation that ends without one leaves this to whoever acquired the lease. The
// error says that t cannot be asked for: no byte of a hostile name gets into a
// request.
func (p *Proxy) Handshake(t Target, lease *Lease) (Handshake, error) {
	if err := p.check(t); err != nil {
		return nil, err
	}
	switch p.protocol {
	case protocolSOCKS5:
		return newSOCKS5(p, t, lease), nil
	case protocolSOCKS4A:
		return &socks4{target: t, userID: p.userID}, nil
	}
	return newConnect(p, t, lease), nil
}

// check returns why the proxy cannot be asked for a target.
func (p *Proxy) check(t Target) error {
	err := t.check()
	if err == nil && p.protocol == protocolSOCKS4A {
		err = checkSOCKS4(t)
	}
	return err
}

// Target is where a tunnel leads.
type Target struct {
	Host string // a DNS name, or an IP literal without brackets
	Port uint16
}

// check returns why no proxy can be asked for the target. What it lets through is
// letters, digits and the marks of a host name or an address.
func (t Target) check() error {
	if t.Port == 0 {
		return fmt.Errorf("target %.300q: port 0 cannot be reached", t.Host)
	}
	address, err := netip.ParseAddr(t.Host)
	switch {
	case err == nil && address.Zone() != "":
		return fmt.Errorf("target %.300q: the zone of an address means nothing to a proxy", t.Host)
	case err != nil && !validName(t.Host):
		return fmt.Errorf("target %.300q: neither a DNS name nor an address", t.Host)
	}
	return nil
}

// authority is a target that was checked, in the form of a CONNECT request (RFC
// 9112 section 3.2.3).
func (t Target) authority() string {
	if address, err := netip.ParseAddr(t.Host); err == nil {
		return joinHostPort(address.Unmap().String(), t.Port)
	}
	return joinHostPort(t.Host, t.Port)
}

func joinHostPort(host string, port uint16) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// validName reports whether name is a DNS name (RFC 1035 section 2.3.4: 63 bytes a
// label, 253 in all as text), with the underscores that are met in practice, and
// with or without the final dot. A last label that is a number is the sign of an
// IPv4 address gone wrong.
func validName(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if len(name) > 253 {
		return false
	}
	var last string
	for last = range strings.SplitSeq(name, ".") {
		if len(last) < 1 || len(last) > 63 {
			return false
		}
		for i := range len(last) {
			if c := last[i]; !isAlphanumeric(c) && c != '-' && c != '_' {
				return false
			}
		}
	}
	return !isNumber(last)
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c|0x20 && c|0x20 <= 'z' || isDigit(c)
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == ""
}
