package lab

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// socksAssociate is the command of RFC 1928 section 7.
const socksAssociate = 3

// associate relays datagrams between a client and whoever it asks for, until the client's
// connection ends (RFC 1928 section 7).
func (p *SOCKSProxy) associate(ns *netns.NS, client *net.TCPConn) {
	inside, err := listenPacket(ns)
	if err != nil {
		client.Write([]byte{5, socksFailure, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	outside, err := listenPacket(ns)
	if err != nil {
		inside.Close()
		client.Write([]byte{5, socksFailure, 0, 1, 0, 0, 0, 0, 0, 0})
		return
	}
	p.mutex.Lock()
	p.associations++
	p.mutex.Unlock()
	port := inside.LocalAddr().(*net.UDPAddr).Port
	// All zeros mean the address of the proxy itself.
	client.Write([]byte{5, socksGranted, 0, 1, 0, 0, 0, 0, byte(port >> 8), byte(port)})

	a := &association{proxy: p, inside: inside, outside: outside, client: client.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()}
	var running sync.WaitGroup
	running.Go(a.out)
	running.Go(a.back)
	io.Copy(io.Discard, client)
	inside.Close()
	outside.Close()
	running.Wait()
	p.mutex.Lock()
	p.associations--
	p.mutex.Unlock()
}

func listenPacket(ns *netns.NS) (conn *net.UDPConn, err error) {
	err = ns.Do(func() error {
		packets, err := new(net.ListenConfig).ListenPacket(context.Background(), "udp", "[::]:0")
		if err == nil {
			conn = packets.(*net.UDPConn)
			conn.SetReadBuffer(1 << 20)
		}
		return err
	})
	return conn, err
}

// association is one client's: its datagrams come to one socket and leave from another.
type association struct {
	proxy           *SOCKSProxy
	client          netip.Addr
	inside, outside *net.UDPConn

	mutex sync.Mutex
	from  netip.AddrPort // the client's port, which its first datagram tells
}

// out sends on what the client sends.
func (a *association) out() {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := a.inside.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		to, payload, ok := a.proxy.target(buffer[:n])
		if !ok || from.Addr().Unmap() != a.client {
			continue
		}
		a.mutex.Lock()
		a.from = from
		a.mutex.Unlock()
		a.outside.WriteToUDPAddrPort(payload, to)
	}
}

// back sends to the client what comes back.
func (a *association) back() {
	const header = 3 + 1 + 16 + 2 // bytes
	buffer := make([]byte, header+1<<16)
	for {
		n, from, err := a.outside.ReadFromUDPAddrPort(buffer[header:])
		if err != nil {
			return
		}
		address := from.Addr().Unmap().AsSlice()
		start := header - 2 - len(address) - 4
		kind := byte(4)
		if len(address) == 4 {
			kind = 1
		}
		copy(buffer[start:], append(append([]byte{0, 0, 0, kind}, address...), byte(from.Port()>>8), byte(from.Port())))
		a.mutex.Lock()
		to := a.from
		a.mutex.Unlock()
		a.inside.WriteToUDPAddrPort(buffer[start:header+n], to)
	}
}

// target reads the header of a datagram, and takes note of it.
func (p *SOCKSProxy) target(datagram []byte) (to netip.AddrPort, payload []byte, ok bool) {
	if len(datagram) < 5 || datagram[2] != 0 {
		return to, nil, false
	}
	size, rest := map[byte]int{1: 4, 3: int(datagram[4]), 4: 16}[datagram[3]], datagram[4:]
	if datagram[3] == 3 {
		rest = rest[1:]
	}
	if size == 0 || len(rest) < size+2 {
		return to, nil, false
	}
	host := string(rest[:size])
	var address netip.Addr
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if datagram[3] == 3 {
		address, ok = p.Hosts[host]
	} else {
		address, ok = netip.AddrFromSlice(rest[:size])
		host = address.String()
	}
	if ok && !slices.Contains(p.reached, host) {
		p.reached = append(p.reached, host)
	}
	return netip.AddrPortFrom(address, uint16(rest[size])<<8|uint16(rest[size+1])), rest[size+2:], ok
}

// Associations is how many there are.
func (p *SOCKSProxy) Associations() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.associations
}

// Reached are the hosts to which datagrams were relayed: names as they were asked for.
func (p *SOCKSProxy) Reached() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return slices.Clone(p.reached)
}
