package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Keep-alive finds out that a silent peer is gone long before a flow's idle limit,
// and keeps firewalls in between from forgetting the flow: common ones do so
// after 5 minutes.
const (
	keepAliveIdle     = 2 * time.Minute
	keepAliveInterval = 30 * time.Second
)

// KeepAlive are the times at which silent peers are probed.
func KeepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval}
}

// Dialer opens the connections on which flows leave. Both times must be positive.
// It is safe for concurrent use and must not be copied after its first use,
// because it remembers the addresses of the proxies' names, and keeps the connections that
// several tunnels share, which Close closes.
type Dialer struct {
	// Control prepares every socket before it is connected, those of name look-ups
	// included: it sets the mark that keeps the gateway from capturing itself. See
	// net.Dialer. Nil for nothing.
	Control func(network, address string, c syscall.RawConn) error
	// TLS is how proxies are talked to whose URL says https; nil for the system's roots and
	// the proxy's name. What protocols are offered (ALPN) is the Dialer's.
	TLS *tls.Config
	// Sources are addresses of this host from which proxies are connected to, in turn;
	// without one of the proxy's family the kernel chooses. Each more of them adds as
	// many connections as there are local ports.
	Sources []netip.Addr
	// ConnectTimeout bounds the connect; with a proxy, the look-up of its name and
	// the tries of all its addresses together.
	ConnectTimeout time.Duration
	// HandshakeTimeout bounds what follows on the connection to a proxy: the wait
	// for the credential and the proxy's answer, which includes its own dialling.
	HandshakeTimeout time.Duration

	names        names
	mutex        sync.Mutex
	multiplexers map[*Proxy]*multiplexer
	closed       bool

	turn atomic.Uint32 // of Sources
}

// Direct connects to destination. The caller closes the connection.
func (d *Dialer) Direct(ctx context.Context, destination netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.ConnectTimeout)
	defer cancel()
	return d.dial(ctx, destination, netip.Addr{})
}

// Tunnel connects to the proxy and has it open a tunnel to target. rest is what
// the far side sent in the same segments as the proxy's answer. The caller closes
// the connection, which has no deadline any more. A proxy's refusal is a
// *RefusedError, or ErrCredentialRefused if it was not even asked. When ctx is
// done, Tunnel returns at once.
func (d *Dialer) Tunnel(ctx context.Context, proxy *Proxy, target Target) (conn Conn, rest []byte, err error) {
	if err := proxy.check(target); err != nil {
		return nil, nil, err
	}
	for range 1 + MaxReconnects {
		if proxy.protocol == protocolHTTPS {
			conn, rest, err = d.tunnelTLS(ctx, proxy, target)
		} else if conn, err = d.connect(ctx, proxy); err == nil {
			rest, err = d.shakeOn(ctx, conn, proxy, target)
		}
		if !errors.Is(err, ErrReconnect) {
			break
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("tunnel to %s through %s: %w", joinHostPort(target.Host, target.Port), proxy, err)
	}
	return conn, rest, nil
}

// TunnelVia is Tunnel through the first of several proxies that can be connected to; via is
// the one that opened the tunnel, or that the error is of. direct is where the direct way
// leads, if that is among them; if it is not valid that is the target itself, looked up.
func (d *Dialer) TunnelVia(ctx context.Context, proxies []*Proxy, target Target, direct netip.AddrPort) (conn Conn, rest []byte, via *Proxy, err error) {
	err = ErrAllDown
	for _, via = range proxies {
		if via.Direct() {
			conn, err = d.straight(ctx, target, direct)
		} else {
			conn, rest, err = d.Tunnel(ctx, via, target)
		}
		if err == nil || ctx.Err() != nil || !Elsewhere(err) {
			break
		}
	}
	return conn, rest, via, err
}

// straight connects to direct, or to the target.
func (d *Dialer) straight(ctx context.Context, target Target, direct netip.AddrPort) (conn Conn, err error) {
	if direct.IsValid() {
		return d.Direct(ctx, direct)
	}
	addresses, err := d.Lookup(ctx, target.Host)
	for _, address := range addresses {
		if conn, err = d.Direct(ctx, netip.AddrPortFrom(address, target.Port)); err == nil {
			break
		}
	}
	return conn, err
}

// Known returns the addresses at which to reach the proxy, in the order in which to
// try them (not to be changed), if they are known without a look-up: ok is false where Tunnel would ask
// the name service, talks TLS or uses a unix socket. It is for a caller that connects by itself and must not
// wait.
func (d *Dialer) Known(proxy *Proxy) (addresses []netip.AddrPort, ok bool) {
	if proxy.protocol == protocolHTTPS || proxy.socket != "" {
		return nil, false
	}
	if proxy.literal != nil {
		return proxy.literal, true
	}
	known, ok := d.names.fresh(proxy.host)
	for _, address := range known {
		addresses = append(addresses, netip.AddrPortFrom(address.Unmap(), proxy.port))
	}
	return addresses, ok
}

// Worked takes note that an address of the proxy was connected to after one that
// Known had named before it had failed: it goes first from now on.
func (d *Dialer) Worked(proxy *Proxy, address netip.Addr) {
	d.names.worked(proxy.host, address)
}

// NetworkChanged tells that names may have other addresses now, and that connections which
// tunnels share may lead nowhere. It is safe for concurrent use.
func (d *Dialer) NetworkChanged() {
	d.names.forget()
	d.each((*multiplexer).clear)
}

// connect connects to a proxy, and takes note of how that went. Over TLS it offers some
// protocols to be spoken. The error is a *ConnectError.
func (d *Dialer) connect(ctx context.Context, proxy *Proxy, offered ...string) (Conn, error) {
	limited, cancel := context.WithTimeout(ctx, d.ConnectTimeout)
	defer cancel()
	addresses, err := d.resolve(limited, proxy.host)
	if err != nil {
		return nil, &ConnectError{err}
	}
	start := time.Now()
	conn, err := d.open(limited, proxy, addresses, offered)
	switch {
	case err == nil:
		proxy.Connected(time.Since(start))
		return conn, nil
	case ctx.Err() == nil: // it was not the caller who gave up
		proxy.Failed(err)
	}
	return nil, &ConnectError{err}
}

// open connects to one of the addresses of a proxy, by TLS if it wants that.
func (d *Dialer) open(ctx context.Context, proxy *Proxy, addresses []netip.Addr, offered []string) (Conn, error) {
	if proxy.socket != "" {
		return d.dialSocket(ctx, proxy.socket)
	}
	conn, err := d.dialAny(ctx, proxy, addresses)
	switch {
	case err != nil:
		return nil, err
	case proxy.protocol != protocolHTTPS:
		return conn, nil
	}
	secure, err := d.encrypt(ctx, conn, proxy, offered)
	if err != nil {
		return nil, err
	}
	return secure, nil
}

// dialAny dials the addresses of a proxy, one after the other.
func (d *Dialer) dialAny(ctx context.Context, proxy *Proxy, addresses []netip.Addr) (*net.TCPConn, error) {
	var failure error
	for i, address := range addresses {
		conn, err := d.dialShare(ctx, netip.AddrPortFrom(address, proxy.port), len(addresses)-i)
		if err == nil {
			if i > 0 {
				d.names.worked(proxy.host, address)
			}
			return conn, nil
		}
		if failure == nil {
			failure = err
		} else {
			failure = fmt.Errorf("%w; %w", failure, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failure
}

// dialShare dials within an equal share of the time that is left for several
// addresses, so that one that does not answer leaves time for the others.
func (d *Dialer) dialShare(ctx context.Context, to netip.AddrPort, addresses int) (*net.TCPConn, error) {
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(addresses))
		defer cancel()
	}
	return d.dial(ctx, to, d.Source(to.Addr().Unmap()))
}

// Source returns the address from which to connect to a proxy's next, the zero Addr for
// the kernel's choice. It is for a caller that connects by itself.
func (d *Dialer) Source(to netip.Addr) netip.Addr {
	var family []netip.Addr
	if len(d.Sources) == 0 {
		return netip.Addr{}
	}
	for _, source := range d.Sources {
		if source.Is4() == to.Is4() {
			family = append(family, source)
		}
	}
	if len(family) == 0 {
		return netip.Addr{}
	}
	return family[int(d.turn.Add(1)%uint32(len(family)))]
}

func (d *Dialer) dial(ctx context.Context, to netip.AddrPort, source netip.Addr) (*net.TCPConn, error) {
	dialer := net.Dialer{
		Control:         d.Control,
		KeepAliveConfig: KeepAlive(),
	}
	dialer.SetMultipathTCP(false) // whatever GODEBUG says: an MPTCP socket cannot be spliced as cheaply
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	if source.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, 0))
		dialer.Control = d.leavePort
	}
	// Not DialTCP: without a source address that binds the socket to the zero one.
	conn, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// leavePort is Control with the choice of the port left to connect, when the other three
// parts of the connection are known: a port in use towards anybody else is not taken.
func (d *Dialer) leavePort(network, address string, raw syscall.RawConn) error {
	var failure error
	err := raw.Control(func(fd uintptr) {
		failure = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1))
	})
	if err == nil {
		err = failure
	}
	if err != nil || d.Control == nil {
		return err
	}
	return d.Control(network, address, raw)
}

// resolve returns the addresses of a proxy's host. A look-up takes at most half of
// the time that there is for connecting. A proxy on a unix socket has no host, and none.
func (d *Dialer) resolve(ctx context.Context, host string) ([]netip.Addr, error) {
	if host == "" {
		return nil, nil
	}
	if address, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{address}, nil
	}
	return d.names.addresses(ctx, host, func(ctx context.Context, host string) ([]netip.Addr, error) {
		ctx, cancel := context.WithTimeout(ctx, d.ConnectTimeout/2)
		defer cancel()
		return d.resolver().LookupNetIP(ctx, "ip", host)
	})
}

// resolver is Go's own, because the system's would open sockets that Control does
// not see.
func (d *Dialer) resolver() *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			dialer := net.Dialer{Control: d.Control}
			return dialer.DialContext(ctx, network, address)
		},
	}
}

// shakeOn is shake for a tunnel, on a connection that is closed on failure.
func (d *Dialer) shakeOn(ctx context.Context, conn Conn, proxy *Proxy, target Target) (rest []byte, err error) {
	open := func(lease *Lease) (Handshake, error) { return proxy.Handshake(target, lease) }
	if rest, err = d.shake(ctx, conn, proxy, open); err != nil {
		conn.Close()
	}
	return rest, err
}

// shake drives the handshake that open begins on a connection to the proxy, under a lease.
func (d *Dialer) shake(ctx context.Context, conn Conn, proxy *Proxy, open func(*Lease) (Handshake, error)) (rest []byte, err error) {
	limited, cancel := context.WithTimeout(ctx, d.HandshakeTimeout)
	defer cancel()
	lease, err := proxy.Acquire(limited)
	if err != nil {
		return nil, err
	}
	handshake, err := open(lease)
	if err != nil {
		lease.Settle(err)
		return nil, err
	}
	request, isConnect := handshake.(*connect)
	if isConnect {
		request.binding = binding(conn)
	}
	// A deadline in the past interrupts the handshake. If it came into play at all,
	// conn serves nothing else.
	stop := context.AfterFunc(limited, func() { conn.SetDeadline(time.Unix(1, 0)) })
	rest, err = Drive(conn, handshake)
	interrupted := !stop()
	if isConnect && !interrupted {
		err = request.ended(err)
	}
	// The handshake has settled the lease if the proxy answered at all.
	lease.Settle(err)
	switch {
	case err == nil || !lost(err) && !errors.Is(err, os.ErrDeadlineExceeded):
		proxy.Answered()
	case ctx.Err() == nil:
		proxy.Unanswered()
	}
	switch {
	case !interrupted || err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
		return rest, err
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	return nil, fmt.Errorf("no answer within %s: %w", d.HandshakeTimeout, os.ErrDeadlineExceeded)
}
