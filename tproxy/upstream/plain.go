package upstream

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
)

// PlainHTTP reports whether the proxy takes requests in absolute form (RFC 9112
// section 3.2.2), that is whether it speaks HTTP.
func (p *Proxy) PlainHTTP() bool { return p.protocol == protocolHTTP || p.protocol == protocolHTTPS }

// Anonymous returns the proxy without its credential, for clients that have to bring
// their own.
func (p *Proxy) Anonymous() *Proxy {
	return &Proxy{protocol: p.protocol, host: p.host, port: p.port, url: p.url, literal: p.literal, health: p.health}
}

// Authorization returns the value of the Proxy-Authorization field that a request
// under the lease is sent with, empty for no lease.
func (l *Lease) Authorization() string {
	if l == nil {
		return ""
	}
	return l.credential.basic
}

// Judge settles the lease with the status of a proxy's final answer to a request in
// absolute form, and returns what is wrong with it if that is the proxy's own 407 (Proxy
// Authentication Required), whose Proxy-Authenticate values are challenges; else nil.
// The answer is the origin's if the proxy let the request through, which an error
// does not show. A 407 without a challenge is one that an origin sent: a proxy's has one
// (RFC 9110 section 11.7.1), and squid takes that of an origin out.
func (l *Lease) Judge(status int, reason []byte, challenges [][]byte) error {
	refused := &RefusedError{Code: status, Reason: sanitize(reason)}
	switch {
	case status == http.StatusProxyAuthRequired && len(challenges) > 0:
		refused.Denied = l != nil
		for _, value := range challenges {
			refused.addChallenges(value)
		}
		refused.advice = adviceOnStatus(refused, l != nil)
		l.Settle(refused)
		return refused
	case status < 400 || status == http.StatusNotFound:
		l.Settle(nil)
	default:
		l.Settle(refused)
	}
	return nil
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
