package lab

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// Transports of DNS, as a Nameserver tells them apart.
const (
	TransportUDP   = "udp"
	TransportTCP   = "tcp"
	TransportTLS   = "tls"   // RFC 7858
	TransportHTTPS = "https" // RFC 8484, HTTP/2 only
)

// Nameserver is a stand-in DNS server with a small table. It answers on port 53
// over UDP and TCP, and with a certificate on 853 and 443 as well, and remembers
// what it was asked. Set the fields before Start, or Tricks within Change; whoever
// starts it closes it, and may start it again.
type Nameserver struct {
	// Records is the table, in the form of zone files with whole names:
	// "www.example.org 60 A 192.0.2.1". An owner whose first label is * answers for
	// all names below the rest that have no record of their own. Whatever is not in
	// the table does not exist (NXDOMAIN).
	Records []string
	// Tricks are the names that are answered in a special way.
	Tricks map[string]Trick
	// Certified are the names in the certificate; without any, only port 53 is served.
	Certified []string

	table  map[string][]dns.RR // by owner in lower case
	plain  []*dns.Server
	secure *http.Server
	ends   sync.WaitGroup
	ca     []byte

	mutex sync.Mutex
	asked []Question
}

// Trick is a special way to answer.
type Trick struct {
	Silent bool          // not at all
	Delay  time.Duration // later
	Forge  bool          // after false answers: with another id, and to another question
	Rcode  int           // with this code and nothing else, unless it is 0
}

// Question is what a Nameserver was asked.
type Question struct {
	Name      string // in lower case, without the dot at the end
	Type      string // as in zone files
	Transport string
	Source    netip.AddrPort
}

// Start serves in a namespace, in both families.
func (n *Nameserver) Start(ns *netns.NS) error {
	n.table = make(map[string][]dns.RR)
	for _, line := range n.Records {
		record, err := dns.NewRR(line)
		if err != nil {
			return err
		}
		owner := strings.ToLower(record.Header().Name)
		n.table[owner] = append(n.table[owner], record)
	}
	err := n.listen(ns)
	if err != nil {
		n.Close()
	}
	return err
}

// listen opens the ports and serves them.
func (n *Nameserver) listen(ns *netns.NS) error {
	// An address that is the host's by a route alone (netns.NS.Local) is no source for
	// datagrams of IPv6 without it.
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		failure := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1)
		})
		return errors.Join(failure, err)
	}}
	var packets net.PacketConn
	err := ns.Do(func() (err error) {
		packets, err = config.ListenPacket(context.Background(), "udp", "[::]:53")
		return err
	})
	if err != nil {
		return err
	}
	n.serve(&dns.Server{PacketConn: packets}, TransportUDP)
	stream, err := ns.Listen("tcp", "[::]:53")
	if err != nil {
		return err
	}
	n.serve(&dns.Server{Listener: stream}, TransportTCP)
	if len(n.Certified) == 0 {
		return nil
	}
	certificate, _, err := newCertificate(n.Certified, nil)
	if err != nil {
		return err
	}
	n.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})
	settings := &tls.Config{Certificates: []tls.Certificate{certificate}}
	if stream, err = ns.Listen("tcp", "[::]:853"); err != nil {
		return err
	}
	n.serve(&dns.Server{Listener: tls.NewListener(stream, settings)}, TransportTLS)
	if stream, err = ns.Listen("tcp", "[::]:443"); err != nil {
		return err
	}
	n.secure = &http.Server{
		Handler:   http.HandlerFunc(n.serveHTTP),
		TLSConfig: settings.Clone(),
		ErrorLog:  log.New(io.Discard, "", 0), // a client that does not trust the certificate is no news
	}
	secure := n.secure
	n.ends.Go(func() { secure.ServeTLS(stream, "", "") })
	return nil
}

// serve runs a server until Close, and returns once it runs.
func (n *Nameserver) serve(server *dns.Server, transport string) {
	started := make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	server.MaxTCPQueries = -1
	server.Handler = dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		source, _ := netip.ParseAddrPort(w.RemoteAddr().String())
		answers, trick := n.answer(query, transport, source)
		send := func() {
			for _, answer := range answers {
				w.WriteMsg(answer)
			}
		}
		if trick.Delay == 0 {
			send()
		} else { // the connection's other questions are not to wait
			time.AfterFunc(trick.Delay, send)
		}
	})
	n.plain = append(n.plain, server)
	n.ends.Go(func() { server.ActivateAndServe() })
	<-started
}

// serveHTTP answers a POST of RFC 8484.
func (n *Nameserver) serveHTTP(w http.ResponseWriter, r *http.Request) {
	query, err := readPost(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	source, _ := netip.ParseAddrPort(r.RemoteAddr)
	answers, trick := n.answer(query, TransportHTTPS, source)
	if len(answers) == 0 {
		<-r.Context().Done()
		return
	}
	select {
	case <-time.After(trick.Delay):
	case <-r.Context().Done():
		return
	}
	// There is room for one answer only: the right one, at the end.
	body, err := answers[len(answers)-1].Pack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/dns-message")
	w.Write(body)
}

// readPost takes the question out of a request, and wants the request to be as RFC
// 8484 section 4.1 and the server's own path have it.
func readPost(r *http.Request) (*dns.Msg, error) {
	kind := r.Header.Get("Content-Type")
	if r.ProtoMajor != 2 || r.Method != http.MethodPost || r.URL.Path != "/dns-query" || kind != "application/dns-message" {
		return nil, fmt.Errorf("%s %s %s of %q is not what is served here", r.Proto, r.Method, r.URL.Path, kind)
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, dns.MaxMsgSize))
	if err != nil {
		return nil, err
	}
	query := new(dns.Msg)
	return query, query.Unpack(body)
}

// Close stops listening, closes all connections and waits until they are served.
func (n *Nameserver) Close() {
	for _, server := range n.plain {
		server.Shutdown()
	}
	if n.secure != nil {
		n.secure.Close()
	}
	n.ends.Wait()
	n.plain, n.secure = nil, nil
}

// CA is the authority that signed the certificate, in PEM, once the server is started.
func (n *Nameserver) CA() []byte { return n.ca }

// Asked are the questions so far, in order.
func (n *Nameserver) Asked() []Question {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	return slices.Clone(n.asked)
}

// AskedFor are the questions for one name so far, in order.
func (n *Nameserver) AskedFor(name string) []Question {
	return slices.DeleteFunc(n.Asked(), func(q Question) bool { return q.Name != name })
}

// Change calls change, which may set Tricks, while no question looks at them.
func (n *Nameserver) Change(change func()) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	change()
}
