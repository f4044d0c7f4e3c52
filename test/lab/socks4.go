package lab

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// SOCKS4Proxy is a stand-in SOCKS4a proxy, which records what it was asked for. Set the
// fields before Start; whoever starts it closes it.
type SOCKS4Proxy struct {
	UserID string                // others are refused
	Hosts  map[string]netip.Addr // the names that it can resolve

	servers servers

	mutex   sync.Mutex
	targets []string // of accepted requests, in order
	refused int
}

// What the stand-in says.
const (
	socks4Granted   = 90
	socks4Rejected  = 91
	socks4OtherUser = 93
)

// Start listens on a port of the namespace, in both families.
func (p *SOCKS4Proxy) Start(ns *netns.NS, port int) error {
	return p.servers.listen(ns, port, func(conn *net.TCPConn) { p.serve(ns, conn) })
}

// Close stops listening, closes all connections and waits until they are served.
func (p *SOCKS4Proxy) Close() { p.servers.close() }

// Targets are the targets of the requests that were let through, in order: names as
// they were asked for, and host:port.
func (p *SOCKS4Proxy) Targets() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return slices.Clone(p.targets)
}

// Refused is how many requests were refused.
func (p *SOCKS4Proxy) Refused() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.refused
}

func (p *SOCKS4Proxy) serve(ns *netns.NS, client *net.TCPConn) {
	target, origin, code := p.connect(ns, client)
	p.mutex.Lock()
	if origin == nil {
		p.refused++
	} else {
		p.targets = append(p.targets, target)
	}
	p.mutex.Unlock()
	client.Write([]byte{0, code, 0, 0, 0, 0, 0, 0})
	if origin != nil {
		defer origin.Close()
		tunnel(client, client, origin)
	}
}

// connect takes a request and opens the way to its target, or says with which code it is
// refused.
func (p *SOCKS4Proxy) connect(ns *netns.NS, client *net.TCPConn) (target string, origin *net.TCPConn, code byte) {
	request, err := read(client, 8)
	if err != nil || request[0] != 4 || request[1] != 1 {
		return "", nil, socks4Rejected
	}
	port := uint16(request[2])<<8 | uint16(request[3])
	address := netip.AddrFrom4([4]byte(request[4:]))
	host := address.String()
	if userID, err := readToZero(client); err != nil || userID != p.UserID {
		return "", nil, socks4OtherUser
	}
	if request[4]|request[5]|request[6] == 0 && request[7] != 0 {
		host, err = readToZero(client)
		known := false
		if address, known = p.Hosts[host]; err != nil || !known {
			return "", nil, socks4Rejected
		}
	}
	err = ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(address, port).String(), 5*time.Second)
		if err == nil {
			origin = conn.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return "", nil, socks4Rejected
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), origin, socks4Granted
}

// readToZero reads a text and the zero after it, and nothing beyond.
func readToZero(from *net.TCPConn) (string, error) {
	var text []byte
	for {
		next, err := read(from, 1)
		if err != nil || next[0] == 0 {
			return string(text), err
		}
		text = append(text, next...)
	}
}
