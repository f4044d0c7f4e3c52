package lab

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// SOCKSPort is where a stand-in SOCKS5 proxy listens (RFC 1928 section 3).
const SOCKSPort = 1080

// SOCKSProxy is a stand-in SOCKS5 proxy: CONNECT and UDP ASSOCIATE of RFC 1928, with the
// user name and password of RFC 1929 if some are set. It records what it saw. Set the fields
// before Start, or within Change; whoever starts it closes it.
type SOCKSProxy struct {
	User, Password string                // no authentication when User is empty
	Hosts          map[string]netip.Addr // the names that it can resolve
	Ports          []int                 // CONNECT is allowed to these; none means all
	// Early is sent to the client in the same segment as the reply.
	Early string
	// Associate grants UDP ASSOCIATE; without it the proxy does not know the command.
	Associate bool

	servers servers

	mutex    sync.Mutex
	targets  []string // of accepted requests, in order
	offered  int      // greetings that offer a password
	accepted int      // right passwords
	refused  int      // wrong passwords
	demanded int      // greetings without the password that is wanted

	associations int      // that there are
	reached      []string // hosts to which datagrams were relayed, each once
}

// What the stand-in says (RFC 1928 sections 3 and 6, RFC 1929 section 2).
const (
	socksNoPassword    = 0
	socksPassword      = 2
	socksNoMethod      = 0xff
	socksGranted       = 0
	socksFailure       = 1
	socksForbidden     = 2
	socksUnreachable   = 4
	socksRefused       = 5
	socksWrongCommand  = 7
	socksWrongAddress  = 8
	socksWrongPassword = 1
)

// Start listens on a port of the namespace, in both families.
func (p *SOCKSProxy) Start(ns *netns.NS, port int) error {
	return p.servers.listen(ns, port, func(conn *net.TCPConn) { p.serve(ns, conn) })
}

// Close stops listening, closes all connections and waits until they are served.
func (p *SOCKSProxy) Close() { p.servers.close() }

// Change calls change, which may set the fields, while no request looks at them.
func (p *SOCKSProxy) Change(change func()) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	change()
}

// Targets are the targets of the requests that were let through, in order: names as
// they were asked for, and host:port.
func (p *SOCKSProxy) Targets() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return slices.Clone(p.targets)
}

// Offered is how many connections offered to send a password.
func (p *SOCKSProxy) Offered() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.offered
}

// Accepted is how many connections sent the right password.
func (p *SOCKSProxy) Accepted() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.accepted
}

// Refused is how many connections sent a wrong password.
func (p *SOCKSProxy) Refused() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.refused
}

// Demanded is how many connections did not offer the password that is wanted.
func (p *SOCKSProxy) Demanded() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.demanded
}

func (p *SOCKSProxy) serve(ns *netns.NS, client *net.TCPConn) {
	if !p.authenticate(client) {
		return
	}
	p.mutex.Lock()
	early, ports, associate := p.Early, p.Ports, p.Associate
	p.mutex.Unlock()
	request, err := read(client, 4)
	if err != nil {
		return
	}
	if request[1] == socksAssociate && associate && (request[3] == 1 || request[3] == 4) {
		if _, err := read(client, map[byte]int{1: 4, 4: 16}[request[3]]+2); err == nil {
			p.associate(ns, client)
		}
		return
	}
	target, origin, code := p.connect(ns, client, request, ports)
	// The bound address is a name, of which there is no other proxy that says one.
	reply := append([]byte{5, code, 0, 3, 9}, "proxy.lab\x00\x00"...)
	if origin == nil {
		client.Write(reply)
		return
	}
	defer origin.Close()
	p.mutex.Lock()
	p.targets = append(p.targets, target)
	p.mutex.Unlock()
	if _, err := client.Write(append(reply, early...)); err != nil {
		return
	}
	tunnel(client, client, origin)
}

// authenticate takes the greeting and, if one is wanted, the password.
func (p *SOCKSProxy) authenticate(client io.ReadWriter) bool {
	greeting, err := read(client, 2)
	if err != nil || greeting[0] != 5 {
		return false
	}
	methods, err := read(client, int(greeting[1]))
	if err != nil {
		return false
	}
	method := p.choose(methods)
	if _, err := client.Write([]byte{5, method}); err != nil || method != socksPassword {
		return method == socksNoPassword
	}
	version, err := read(client, 1)
	if err != nil || version[0] != 1 {
		return false
	}
	user, err := readString(client)
	if err != nil {
		return false
	}
	password, err := readString(client)
	if err != nil {
		return false
	}
	right := p.judge(user, password)
	status := byte(0)
	if !right {
		status = socksWrongPassword
	}
	_, err = client.Write([]byte{1, status})
	return right && err == nil
}

// choose picks one of the methods that a client offers.
func (p *SOCKSProxy) choose(methods []byte) (method byte) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	offers := bytes.IndexByte(methods, socksPassword) >= 0
	if offers {
		p.offered++
	}
	switch {
	case p.User == "" && bytes.IndexByte(methods, socksNoPassword) >= 0:
		return socksNoPassword
	case p.User != "" && offers:
		return socksPassword
	case p.User != "":
		p.demanded++
	}
	return socksNoMethod
}

func (p *SOCKSProxy) judge(user, password string) (right bool) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if right = user == p.User && password == p.Password; right {
		p.accepted++
	} else {
		p.refused++
	}
	return right
}

// connect takes the rest of a request and opens the way to its target, or says with which
// reply it is refused.
func (p *SOCKSProxy) connect(ns *netns.NS, client io.Reader, request []byte, ports []int) (target string, origin *net.TCPConn, code byte) {
	if request[0] != 5 || request[1] != 1 {
		return "", nil, socksWrongCommand
	}
	var host string
	var err error
	switch request[3] {
	case 1, 4:
		size := 4
		if request[3] == 4 {
			size = 16
		}
		bytes, failure := read(client, size)
		address, _ := netip.AddrFromSlice(bytes)
		host, err = address.String(), failure
	case 3:
		host, err = readString(client)
	default:
		return "", nil, socksWrongAddress
	}
	if err != nil {
		return "", nil, socksWrongAddress
	}
	octets, err := read(client, 2)
	if err != nil {
		return "", nil, socksWrongAddress
	}
	port := int(octets[0])<<8 | int(octets[1])
	if len(ports) > 0 && !slices.Contains(ports, port) {
		return "", nil, socksForbidden
	}
	address, err := netip.ParseAddr(host)
	if request[3] == 3 {
		// A name is looked up, even where it is an address in writing.
		known := false
		if address, known = p.Hosts[host]; !known {
			return "", nil, socksUnreachable
		}
	} else if err != nil {
		return "", nil, socksWrongAddress
	}
	err = ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(address, uint16(port)).String(), 5*time.Second)
		if err == nil {
			origin = conn.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return "", nil, socksRefused
	}
	return net.JoinHostPort(host, strconv.Itoa(port)), origin, socksGranted
}

// read reads so many bytes.
func read(from io.Reader, size int) ([]byte, error) {
	bytes := make([]byte, size)
	_, err := io.ReadFull(from, bytes)
	return bytes, err
}

// readString reads a text with its length before it.
func readString(from io.Reader) (string, error) {
	size, err := read(from, 1)
	if err != nil {
		return "", err
	}
	text, err := read(from, int(size[0]))
	return string(text), err
}
