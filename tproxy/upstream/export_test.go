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
