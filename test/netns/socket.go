package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
)

// Dial connects from inside the namespace. The address is a literal with a
// port: names would be resolved by goroutines outside of it.
func (ns *NS) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial %s: %w", address, err)
	}
	var conn net.Conn
	err := ns.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace on a TCP address, a literal with a port;
// [::]:80 serves both families.
func (ns *NS) Listen(network, address string) (net.Listener, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	var config net.ListenConfig
	config.SetMultipathTCP(false) // Go listens with MPTCP otherwise
	var listener net.Listener
	err := ns.Do(func() (err error) {
		listener, err = config.Listen(context.Background(), network, address)
		return err
	})
	return listener, err
}
