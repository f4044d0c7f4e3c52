package lab

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// ConnectProxy is a stand-in company proxy: HTTP CONNECT and requests in absolute form,
// with a password if one is set. It records what it saw, and byte for byte what it
// received outside of tunnels. Set the fields before Start, or within Change; whoever
// starts it closes it.
type ConnectProxy struct {
	User, Password string                // no authentication when User is empty
	Hosts          map[string]netip.Addr // the names that it can resolve
	Ports          []int                 // CONNECT is allowed to these; none means all
	// Answer, if set, may answer a CONNECT in place of the proxy: with raw bytes,
	// after which the connection is closed, or with nothing at all (silent), in
	// which case it stays open.
	Answer func(target string) (raw string, silent bool)
	// NoUpgrade, if set, is the raw answer to requests for another protocol.
	NoUpgrade string
	// Early is sent to the client in the same segment as the 200.
	Early string

	servers servers
	wire

	mutex    sync.Mutex
	targets  []string // accepted CONNECTs, in order
	requests []string // method and target of accepted requests in absolute form, in order
	refused  int      // 407 answers to a wrong password
	demanded int      // 407 answers to no password
}

// Start listens on a port of the namespace, in both families.
func (p *ConnectProxy) Start(ns *netns.NS, port int) error {
	return p.servers.listen(ns, port, func(conn *net.TCPConn) { p.serve(ns, conn) })
}

// Close stops listening, closes all connections and waits until they are served.
func (p *ConnectProxy) Close() { p.servers.close() }

// Targets are the targets of the CONNECT requests that were let through, in order.
func (p *ConnectProxy) Targets() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return slices.Clone(p.targets)
}

// Requests are the methods and targets of the requests in absolute form that were let
// through, in order.
func (p *ConnectProxy) Requests() []string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return slices.Clone(p.requests)
}

// Refused is how many requests with a wrong password were answered with 407.
func (p *ConnectProxy) Refused() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.refused
}

// Demanded is how many requests without a password were answered with 407.
func (p *ConnectProxy) Demanded() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.demanded
}

// Change calls change, which may set the fields, while no request looks at them.
func (p *ConnectProxy) Change(change func()) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	change()
}

func (p *ConnectProxy) serve(ns *netns.NS, client *net.TCPConn) {
	reader := bufio.NewReader(p.tap(client))
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		if !p.authorised(request) {
			fmt.Fprint(client, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"lab\"\r\nContent-Length: 0\r\n\r\n")
			io.Copy(io.Discard, request.Body)
			continue
		}
		if request.Method == http.MethodConnect {
			p.connect(ns, client, reader, request)
			return
		}
		if !p.plain(ns, client, reader, request) {
			return
		}
	}
}

// connect serves a CONNECT.
func (p *ConnectProxy) connect(ns *netns.NS, client *net.TCPConn, reader *bufio.Reader, request *http.Request) {
	p.mutex.Lock()
	answer, early, ports := p.Answer, p.Early, p.Ports
	p.mutex.Unlock()
	if answer != nil {
		raw, silent := answer(request.Host)
		if silent {
			io.Copy(io.Discard, client)
			return
		}
		if raw != "" {
			io.WriteString(client, raw)
			return
		}
	}
	origin, status := p.dial(ns, request.Host, ports)
	if origin == nil {
		fmt.Fprintf(client, "HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n", status)
		return
	}
	defer origin.Close()
	p.mutex.Lock()
	p.targets = append(p.targets, request.Host)
	p.mutex.Unlock()
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"+early); err != nil {
		return
	}
	tunnel(client, reader, origin)
}

// plain serves a request in absolute form, on a connection of its own to the origin,
// and reports whether the client may send another.
func (p *ConnectProxy) plain(ns *netns.NS, client *net.TCPConn, reader *bufio.Reader, request *http.Request) (again bool) {
	target := request.URL.Host
	if request.URL.Port() == "" {
		target = net.JoinHostPort(request.URL.Hostname(), "80")
	}
	origin, status := p.dial(ns, target, nil)
	if origin == nil {
		fmt.Fprintf(client, "HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n", status)
		return true
	}
	defer origin.Close()
	p.mutex.Lock()
	p.requests = append(p.requests, request.Method+" "+request.RequestURI)
	upgrade, refusal := request.Header.Get("Upgrade") != "", p.NoUpgrade
	p.mutex.Unlock()
	if upgrade && refusal != "" {
		_, err := io.WriteString(client, refusal)
		return err == nil
	}
	request.Header.Del("Proxy-Authorization")
	if !upgrade {
		request.Header.Set("Connection", "close")
	}
	sent := make(chan error, 1)
	go func() {
		err := request.Write(origin)
		if err != nil {
			origin.CloseWrite() // it need not wait for the rest of a request that was broken off
		}
		sent <- err
	}()
	answers := bufio.NewReader(origin)
	for {
		response, err := http.ReadResponse(answers, request)
		if err != nil {
			return false
		}
		response.Header.Del("Connection")
		if response.StatusCode == http.StatusSwitchingProtocols {
			response.Header.Set("Connection", "Upgrade")
		}
		response.Close = false
		if err := response.Write(client); err != nil {
			return false
		}
		if response.StatusCode == http.StatusSwitchingProtocols {
			tunnelRead(client, reader, origin, answers)
			return false
		}
		if response.StatusCode >= 200 {
			return <-sent == nil
		}
	}
}

// authorised checks the password and counts the refusals.
func (p *ConnectProxy) authorised(request *http.Request) bool {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.User == "" {
		return true
	}
	given := request.Header.Get("Proxy-Authorization")
	if given == "Basic "+base64.StdEncoding.EncodeToString([]byte(p.User+":"+p.Password)) {
		return true
	}
	if given == "" {
		p.demanded++
	} else {
		p.refused++
	}
	return false
}

// dial opens the way to a target, or says with which status it is refused.
func (p *ConnectProxy) dial(ns *netns.NS, target string, ports []int) (origin *net.TCPConn, status string) {
	host, portText, err := net.SplitHostPort(target)
	if err != nil {
		return nil, "400 Bad Request"
	}
	port, err := net.LookupPort("tcp", portText)
	if err != nil || len(ports) > 0 && !slices.Contains(ports, port) {
		return nil, "403 Forbidden"
	}
	address, err := netip.ParseAddr(host)
	if err != nil {
		known := false
		if address, known = p.Hosts[host]; !known {
			return nil, "503 Name Unknown"
		}
	}
	err = ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(address, uint16(port)).String(), 5*time.Second)
		if err == nil {
			origin = conn.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return nil, "502 Bad Gateway"
	}
	return origin, ""
}

// tunnel copies both ways and passes half-close on. A reset of either side resets
// the other.
func tunnel(client *net.TCPConn, early io.Reader, origin *net.TCPConn) {
	tunnelRead(client, early, origin, origin)
}

// tunnelRead is a tunnel of which either side may have been read before.
func tunnelRead(client *net.TCPConn, early io.Reader, origin *net.TCPConn, answers io.Reader) {
	var up sync.WaitGroup
	up.Go(func() { carry(origin, client, early) })
	carry(client, origin, answers)
	up.Wait()
}

func carry(to, from *net.TCPConn, reader io.Reader) {
	if _, err := io.Copy(to, reader); err != nil {
		to.SetLinger(0)
		from.SetLinger(0)
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}
