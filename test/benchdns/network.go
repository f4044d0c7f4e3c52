package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// network is a lab with a DNS server at upstreamAddress, and a proxy whose tunnels
// lead to the same server, with a delay.
type network struct {
	*lab.Lab
	packets net.PacketConn
	proxy   net.Listener
	tunnels peak
	running sync.WaitGroup
}

// peak counts what is open, and how much of it was open at once.
type peak struct {
	mutex        sync.Mutex
	open, record int
}

func (p *peak) add(change int) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.open += change
	p.record = max(p.record, p.open)
}

// reset forgets all but what is open.
func (p *peak) reset() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.record = p.open
}

func (p *peak) most() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.record
}

var (
	upstreamAddress = netip.AddrPortFrom(lab.Neighbour4, 53)
	proxyAddress    = netip.AddrPortFrom(lab.Proxy4, lab.ProxyPort)
	resolverAddress = netip.AddrPortFrom(lab.Gateway4, 53)
	// capturedAddress is where nobody is: the gateway answers in its place.
	capturedAddress = netip.AddrPortFrom(lab.Origin4, 53)
)

func newNetwork() (*network, error) {
	l, err := lab.Routed()
	if err != nil {
		return nil, err
	}
	n := &network{Lab: l}
	for _, host := range []*netns.NS{l.Gateway, l.Proxy} {
		err = errors.Join(err,
			// A pacing congestion control would be measured instead of the resolvers.
			host.Sysctl("net.ipv4.tcp_congestion_control", "reno"),
			// Closed connections must not use up the ports of the next round, nor open ones those of listeners.
			host.Sysctl("net.ipv4.ip_local_port_range", "16384 65535"),
			host.Sysctl("net.ipv4.tcp_max_tw_buckets", "500"))
	}
	// dnsmasq uses port 53 as an ordinary user.
	err = errors.Join(err, l.Gateway.Sysctl("net.ipv4.ip_unprivileged_port_start", "53"))
	err = errors.Join(err, l.Neighbour.Do(func() (err error) {
		n.packets, err = net.ListenPacket("udp4", upstreamAddress.String())
		return err
	}))
	if err == nil {
		n.proxy, err = l.Proxy.Listen("tcp", proxyAddress.String())
	}
	if err != nil {
		return nil, errors.Join(err, n.close())
	}
	n.running.Go(func() { answerPackets(n.packets) })
	n.running.Go(n.acceptTunnels)
	return n, nil
}

// close ends the servers and gives the hosts up.
func (n *network) close() error {
	if n.packets != nil {
		n.packets.Close()
	}
	if n.proxy != nil {
		n.proxy.Close()
	}
	n.running.Wait()
	return n.Lab.Close()
}

// answerPackets is the DNS server over UDP, until the socket is closed.
func answerPackets(conn net.PacketConn) {
	buffer := make([]byte, 4096)
	for {
		length, client, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		if message := answer(nil, buffer[:length]); message != nil {
			conn.WriteTo(message, client)
		}
	}
}

// acceptTunnels is the proxy, until its listener is closed. Its tunnels end with the
// program that opened them.
func (n *network) acceptTunnels() {
	for {
		conn, err := n.proxy.Accept()
		if err != nil {
			return
		}
		n.running.Go(func() {
			defer conn.Close()
			n.tunnels.add(1)
			defer n.tunnels.add(-1)
			serveTunnel(conn)
		})
	}
}

// frame is an answer that may leave at due.
type frame struct {
	due     time.Time
	message []byte
}

// serveTunnel answers CONNECT and then each query of the tunnel (RFC 7766), all of
// them tunnelDelay after they came: the way from the proxy to the server and back.
func serveTunnel(conn net.Conn) {
	if err := readHead(conn); err != nil {
		return
	}
	time.Sleep(tunnelDelay)
	if _, err := io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	frames := make(chan frame, uncachedInFlight)
	var writing sync.WaitGroup
	defer writing.Wait()
	defer close(frames)
	writing.Go(func() { writeFrames(conn, frames) })
	reader, buffer := bufio.NewReaderSize(conn, 64<<10), make([]byte, 4096)
	for {
		query, err := readFrame(reader, buffer)
		if err != nil {
			return
		}
		message := answer(make([]byte, 2, 256), query)
		if message == nil {
			return
		}
		binary.BigEndian.PutUint16(message, uint16(len(message)-2))
		frames <- frame{time.Now().Add(tunnelDelay), message}
	}
}

// writeFrames writes frames when they are due, those that are due together at once.
func writeFrames(conn net.Conn, frames <-chan frame) {
	var batch []byte
	for next, more := <-frames; more; {
		time.Sleep(time.Until(next.due))
		batch = append(batch[:0], next.message...)
		now, waiting := time.Now(), false
		for !waiting {
			select {
			case next, more = <-frames:
				if waiting = !more || next.due.After(now); !waiting {
					batch = append(batch, next.message...)
				}
			default:
				if _, err := conn.Write(batch); err != nil {
					return
				}
				batch = batch[:0]
				next, more = <-frames
				waiting = true
			}
		}
		if len(batch) > 0 {
			if _, err := conn.Write(batch); err != nil {
				return
			}
		}
	}
}

// readFrame reads a message behind its length (RFC 1035 section 4.2.2).
func readFrame(reader io.Reader, buffer []byte) ([]byte, error) {
	if _, err := io.ReadFull(reader, buffer[:2]); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint16(buffer))
	if length > len(buffer) {
		return nil, fmt.Errorf("a message of %d bytes", length)
	}
	_, err := io.ReadFull(reader, buffer[:length])
	return buffer[:length], err
}

// answer appends to dst an address for whatever name is asked for, or returns nil if
// it is no query. It leaves out OPT, which RFC 6891 section 7 allows.
func answer(dst, query []byte) []byte {
	const header = 12
	end := header
	for end < len(query) && query[end] != 0 {
		end += 1 + int(query[end])
	}
	end += 5 // the root, the type, the class
	if end > len(query) || query[2]&0x80 != 0 {
		return nil
	}
	start := len(dst)
	dst = append(dst, query[:end]...)
	dst[start+2] |= 0x80                                // an answer
	dst[start+3] = 0x80                                 // recursion available, no error
	copy(dst[start+4:], []byte{0, 1, 0, 1, 0, 0, 0, 0}) // one question, one answer
	return append(dst,
		0xc0, header, 0, 1, 0, 1, // the name asked for, A, IN
		0, 0, 0x0e, 0x10, // an hour
		0, 4, 203, 0, 113, byte(end))
}
