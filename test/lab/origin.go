package lab

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// Ports of an Origin beside 80, 443 and 22.
const (
	PortDigest = 9001 // reads to the end, then answers with the SHA-256 of what it read: needs half-close
	PortSource = 9002 // sends as many bytes as the line that it reads says, then the end
	PortEcho   = 9003 // echoes until the end
	PortSized  = 9004 // reads as many bytes as the line before them says, then answers with their SHA-256
)

// Banner is what the origin's port 22 says before the client has said anything.
const Banner = "SSH-2.0-lab\r\n"

// Origin is a stand-in server of the outside network. It answers HTTP on 80, HTTPS
// on 443, speaks first on 22, and moves bytes on the ports above. Label tells
// origins apart: it is in every HTTP answer.
type Origin struct {
	Label string
	// Ports replaces the usual ports by some of them; for tests that occupy others.
	Ports []int

	servers servers
	roots   *x509.CertPool

	mutex sync.Mutex
	seen  []netip.AddrPort // the sources of all connections
}

// Start serves in a namespace, with a certificate for the given names and addresses.
func (o *Origin) Start(ns *netns.NS, names []string, addresses []netip.Addr) error {
	certificate, roots, err := newCertificate(names, addresses)
	if err != nil {
		return err
	}
	o.roots = roots
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	for port, serve := range map[int]func(*net.TCPConn){
		80:         func(conn *net.TCPConn) { o.answerHTTP(conn, "http") },
		443:        func(conn *net.TCPConn) { o.answerHTTP(tls.Server(conn, config), "https") },
		22:         func(conn *net.TCPConn) { io.WriteString(conn, Banner); io.Copy(conn, conn) },
		PortDigest: answerDigest,
		PortSource: answerSource,
		PortSized:  answerSized,
		PortEcho:   func(conn *net.TCPConn) { io.Copy(conn, conn) },
	} {
		if len(o.Ports) > 0 && !slices.Contains(o.Ports, port) {
			continue
		}
		err := o.servers.listen(ns, port, func(conn *net.TCPConn) {
			o.record(conn)
			serve(conn)
		})
		if err != nil {
			o.Close()
			return err
		}
	}
	return nil
}

// Close stops listening and closes all connections.
func (o *Origin) Close() { o.servers.close() }

// Roots are the authorities that signed the origin's certificate.
func (o *Origin) Roots() *x509.CertPool { return o.roots }

// Sources are the addresses that connections came from, in order.
func (o *Origin) Sources() []netip.AddrPort {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return slices.Clone(o.seen)
}

func (o *Origin) record(conn *net.TCPConn) {
	source := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	o.mutex.Lock()
	defer o.mutex.Unlock()
	o.seen = append(o.seen, netip.AddrPortFrom(source.Addr().Unmap(), source.Port()))
}

// answerHTTP answers requests until the client closes, or asks for another protocol,
// which is an echo.
func (o *Origin) answerHTTP(conn net.Conn, scheme string) {
	reader := bufio.NewReader(conn)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		if protocol := request.Header.Get("Upgrade"); protocol != "" {
			fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
			io.Copy(conn, reader)
			return
		}
		if request.Header.Get("Expect") != "" {
			io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n")
		}
		io.Copy(io.Discard, request.Body)
		body := fmt.Sprintf("%s %s://%s%s\n", o.Label, scheme, request.Host, request.URL.Path)
		if _, err := fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
			return
		}
	}
}

func answerDigest(conn *net.TCPConn) {
	digest := sha256.New()
	if _, err := io.Copy(digest, conn); err == nil {
		fmt.Fprintln(conn, hex.EncodeToString(digest.Sum(nil)))
	}
}

func answerSized(conn *net.TCPConn) {
	reader := bufio.NewReader(conn)
	var bytes int64
	if _, err := fmt.Fscanln(reader, &bytes); err != nil {
		return
	}
	digest := sha256.New()
	if _, err := io.CopyN(digest, reader, bytes); err == nil {
		fmt.Fprintln(conn, hex.EncodeToString(digest.Sum(nil)))
	}
}

func answerSource(conn *net.TCPConn) {
	var bytes int64
	if _, err := fmt.Fscanln(conn, &bytes); err == nil {
		io.Copy(conn, io.LimitReader(Noise(), bytes))
	}
}

// Noise is an endless stream of bytes that are the same in every call.
func Noise() io.Reader { return mathrand.NewChaCha8([32]byte{}) }

// newCertificate makes a certificate that is its own authority.
func newCertificate(names []string, addresses []netip.Addr) (tls.Certificate, *x509.CertPool, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		DNSNames:              names,
	}
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots, nil
}
