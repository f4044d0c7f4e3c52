package upstream

import (
	"net"
	"net/netip"
	"time"
)

// Know makes the dialer believe that it has looked up host.
func (d *Dialer) Know(host string, addresses ...netip.Addr) {
	entry := d.names.entry(host)
	entry.addresses = addresses
	entry.until = time.Now().Add(time.Hour)
}

// Resolver is what looks up the proxies' names.
func (d *Dialer) Resolver() *net.Resolver { return d.resolver() }

// Associating is the Handshake of an association, with what it has come to.
type Associating struct{ *socks5 }

// NewAssociating begins the handshake of Associate.
func NewAssociating(p *Proxy, ipv6 bool, lease *Lease) Associating {
	return Associating{newAssociate(p, ipv6, lease)}
}

// Relay is where the proxy relays, once the handshake is done.
func (a Associating) Relay(peer netip.Addr) (netip.AddrPort, error) { return a.relay(peer) }
