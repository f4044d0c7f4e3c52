package upstream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Association is a SOCKS5 proxy's grant to relay datagrams (UDP ASSOCIATE, RFC 1928
// section 7).
type Association struct {
	// Conn is where it was granted. It says nothing more: the association lasts as
	// long as this connection does. The caller closes it.
	Conn *net.TCPConn
	// Relay is where datagrams are sent to and come from, each with a header
	// ([AppendDatagramHeader], [ParseDatagram]). They must leave from the address of
	// this host that Conn has: the proxy relays nobody else's.
	Relay netip.AddrPort
	// Proxy is who granted it.
	Proxy *Proxy
}

// Associates reports whether the proxy's protocol can carry datagrams: SOCKS5 alone
// can, and not on a unix socket, which has no address to send them to. Whether the proxy
// does only Associate tells.
func (p *Proxy) Associates() bool { return p.protocol == protocolSOCKS5 && p.socket == "" }

// Associate connects to the proxy and has it relay datagrams. The caller closes the
// association's connection, which has no deadline any more. A proxy's refusal is a
// *RefusedError, whose code is [CommandNotSupported] if it carries no datagrams at all,
// or ErrCredentialRefused if it was not even asked. When ctx is done, Associate returns
// at once.
func (d *Dialer) Associate(ctx context.Context, proxy *Proxy) (*Association, error) {
	association, err := d.associate(ctx, proxy)
	if err != nil {
		return nil, fmt.Errorf("UDP through %s: %w", proxy, err)
	}
	return association, nil
}

// AssociateVia is Associate with the first of several proxies that grants an association.
// Those that cannot carry datagrams are passed over. The error is the last one's, or
// ErrAllDown if there is none that could be asked.
func (d *Dialer) AssociateVia(ctx context.Context, proxies []*Proxy) (association *Association, err error) {
	err = ErrAllDown
	for _, proxy := range proxies {
		if !proxy.Associates() {
			continue
		}
		if association, err = d.Associate(ctx, proxy); err == nil || ctx.Err() != nil {
			break
		}
	}
	return association, err
}

func (d *Dialer) associate(ctx context.Context, proxy *Proxy) (*Association, error) {
	if !proxy.Associates() {
		return nil, errors.New("only a SOCKS5 proxy over TCP carries it: give one with --upstream socks5://host:port")
	}
	opened, err := d.connect(ctx, proxy)
	if err != nil {
		return nil, err
	}
	conn, ok := opened.(*net.TCPConn)
	if !ok {
		opened.Close()
		return nil, errors.New("its connection has no address to which datagrams could be sent: reach it over TCP")
	}
	peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	var handshake *socks5
	_, err = d.shake(ctx, conn, proxy, func(lease *Lease) (Handshake, error) {
		handshake = newAssociate(proxy, peer.Is6(), lease)
		return handshake, nil
	})
	var relay netip.AddrPort
	if err == nil {
		relay, err = handshake.relay(peer)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Association{Conn: conn, Relay: relay, Proxy: proxy}, nil
}

// CommandNotSupported is the Code of a *RefusedError from a proxy that does not know
// the command (RFC 1928 section 6).
const CommandNotSupported = 7

// newAssociate is the Handshake of an association. The address of the request, of the
// family in which the proxy is reached, is all zeros, which says that the one that the
// datagrams will have is not known (RFC 1928 section 7): translation on the way may
// change it.
func newAssociate(p *Proxy, ipv6 bool, lease *Lease) *socks5 {
	target := Target{Host: netip.IPv4Unspecified().String()}
	if ipv6 {
		target.Host = netip.IPv6Unspecified().String()
	}
	return &socks5{command: commandAssociate, target: target, demand: &p.demand, lease: lease}
}

// relay returns where the proxy has said that it relays, once the handshake is done. A
// proxy that says none means its own address, peer. It is held to an address that may be
// its own: it must not have this host send to itself, to its neighbours' services, or to
// groups.
func (s *socks5) relay(peer netip.Addr) (netip.AddrPort, error) {
	address := peer
	octets, port := s.bound[:len(s.bound)-portSize], binary.BigEndian.Uint16(s.bound[len(s.bound)-portSize:])
	if s.head[3] == addressName {
		given, err := netip.ParseAddr(string(octets))
		if err != nil || given.Zone() != "" {
			return netip.AddrPort{}, fmt.Errorf("the proxy relays at the name %.80q, not at an address: set its own address there", octets)
		}
		address = given
	} else if given, _ := netip.AddrFromSlice(octets); !given.Unmap().IsUnspecified() {
		address = given
	}
	address = address.Unmap()
	own := address.WithZone("") == peer.WithZone("")
	if own {
		address = peer // with its zone
	}
	relay := netip.AddrPortFrom(address, port)
	switch {
	case port == 0 || address.IsUnspecified() || address.IsMulticast() || address == netip.AddrFrom4([4]byte{255, 255, 255, 255}),
		address.IsLoopback() && !peer.IsLoopback(),
		address.IsLinkLocalUnicast() && !own:
		return netip.AddrPort{}, fmt.Errorf("the proxy relays at %s, where no datagram can be sent: have it give its own address", relay)
	}
	return relay, nil
}

// adviseAssociate replaces what the error of a reply advises by what it means for
// datagrams.
func (e *RefusedError) adviseAssociate() {
	switch e.Code {
	case CommandNotSupported:
		e.advice = "it carries no UDP: have UDP ASSOCIATE enabled there"
	case 2:
		e.advice = "it forbids UDP: have UDP ASSOCIATE allowed there"
	default:
		e.advice = "UDP is not relayed: the proxy's own log tells more"
	}
}

// MaxDatagramHeader is the length of the longest header of a datagram, in bytes: that
// with the longest name.
const MaxDatagramHeader = datagramPrefix + 1 + maxSOCKS5String + portSize

// datagramPrefix is what precedes a header's address: two reserved octets, the number of
// the fragment, and the address' type (RFC 1928 section 7).
const datagramPrefix = 4 // bytes

// What makes a relayed datagram unusable.
var (
	// ErrFragment is about one of several pieces of a datagram. No use of them is known;
	// whoever does not put them together drops them (RFC 1928 section 7).
	ErrFragment = errors.New("a fragment of a relayed datagram")
	// ErrDatagram is about one whose header is not whole or of no known kind.
	ErrDatagram = errors.New("a relayed datagram without a whole header")
)

// AppendDatagramHeader appends the header of a datagram to an address. It allocates
// nothing if to has room.
func AppendDatagramHeader(to []byte, destination netip.AddrPort) []byte {
	address := destination.Addr().Unmap()
	if address.Is4() {
		octets := address.As4()
		to = append(append(to, 0, 0, 0, addressIPv4), octets[:]...)
	} else {
		octets := address.As16()
		to = append(append(to, 0, 0, 0, addressIPv6), octets[:]...)
	}
	return binary.BigEndian.AppendUint16(to, destination.Port())
}

// AppendDatagramTarget appends the header of a datagram to a name, which the proxy looks
// up, or to an address in writing. The error says that target cannot be asked for.
func AppendDatagramTarget(to []byte, target Target) ([]byte, error) {
	if err := target.check(); err != nil {
		return to, err
	}
	if address, err := netip.ParseAddr(target.Host); err == nil {
		return AppendDatagramHeader(to, netip.AddrPortFrom(address, target.Port)), nil
	}
	to = append(to, 0, 0, 0, addressName, byte(len(target.Host)))
	to = append(to, target.Host...)
	return binary.BigEndian.AppendUint16(to, target.Port), nil
}

// Datagram is what a proxy has relayed, as its header tells. It refers to the bytes that
// were parsed.
type Datagram struct {
	From    netip.AddrPort // the sender; only the port is set if the proxy says a name
	Name    []byte         // as the proxy says it, which may be anything; else nil
	Payload []byte
}

// ParseDatagram reads a relayed datagram. It allocates nothing. The error is ErrFragment
// or ErrDatagram. The reserved octets are not looked at, as with other replies.
func ParseDatagram(bytes []byte) (Datagram, error) {
	if len(bytes) < datagramPrefix {
		return Datagram{}, ErrDatagram
	}
	if bytes[2] != 0 {
		return Datagram{}, ErrFragment
	}
	kind, rest := bytes[3], bytes[datagramPrefix:]
	size := 0
	switch kind {
	case addressIPv4:
		size = 4
	case addressIPv6:
		size = 16
	case addressName:
		if len(rest) == 0 {
			return Datagram{}, ErrDatagram
		}
		size, rest = int(rest[0]), rest[1:]
	default:
		return Datagram{}, ErrDatagram
	}
	if len(rest) < size+portSize {
		return Datagram{}, ErrDatagram
	}
	d := Datagram{Payload: rest[size+portSize:]}
	var address netip.Addr
	if kind == addressName {
		d.Name = rest[:size]
	} else {
		address, _ = netip.AddrFromSlice(rest[:size])
	}
	d.From = netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(rest[size:]))
	return d, nil
}
