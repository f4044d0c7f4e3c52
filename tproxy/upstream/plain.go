package upstream

import (
	"context"
	"fmt"
	"net/netip"
)

// PlainHTTP reports whether the proxy takes requests in absolute form (RFC 9112
// section 3.2.2), that is whether it speaks HTTP.
func (p *Proxy) PlainHTTP() bool { return p.protocol == protocolHTTP || p.protocol == protocolHTTPS }

// Anonymous returns the proxy without its credential, for clients that have to bring
// their own.
func (p *Proxy) Anonymous() *Proxy {
	return &Proxy{protocol: p.protocol, host: p.host, port: p.port, socket: p.socket, url: p.url, literal: p.literal, health: p.health}
}

// Connect connects to the proxy, whose protocol is the caller's to speak. The caller
// closes the connection.
func (d *Dialer) Connect(ctx context.Context, proxy *Proxy) (Conn, error) {
	conn, err := d.connect(ctx, proxy)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", proxy, err)
	}
	return conn, nil
}

// Lookup returns the addresses of a host that is reached directly. It asks the name
// servers of this host, within half of ConnectTimeout.
func (d *Dialer) Lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, d.ConnectTimeout/2)
	defer cancel()
	return d.resolver().LookupNetIP(ctx, "ip", host)
}
