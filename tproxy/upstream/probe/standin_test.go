package probe_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// serve runs a server of single connections on loopback for the test.
func serve(t *testing.T, one func(net.Conn)) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections sync.WaitGroup
	ended := make(chan struct{})
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() {
				defer conn.Close()
				defer context.AfterFunc(t.Context(), func() { conn.Close() })()
				one(conn)
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		connections.Wait()
		close(ended)
	})
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// httpProxy is a stand-in HTTP proxy, which is the far side of its tunnels as well.
type httpProxy struct {
	password string // of user; empty for no authentication
	first    func(target string) (status int)
	answer   func(target string) (status int) // after authentication; nil for 200 to everything
	plain    string                           // the answer to a request in absolute form; empty for 200
	deaf     bool                             // tunnels end as soon as they are opened
	drop     bool                             // whoever sends a credential gets no answer
	server   string                           // its name for itself
	far      *tls.Config                      // of its far sides
	rest     time.Duration                    // after which a tunnel is closed in which nothing is said; 0 for never

	with, without, denied atomic.Int64 // requests with a credential and without one, and refused credentials
}

func (p *httpProxy) serve(conn net.Conn) {
	reader := bufio.NewReader(conn)
	request, err := http.ReadRequest(reader)
	if err != nil {
		return
	}
	target := request.Host
	given := request.Header.Get("Proxy-Authorization")
	if given == "" {
		p.without.Add(1)
	} else {
		p.with.Add(1)
		if p.drop {
			return
		}
	}
	say := func(code int) {
		fmt.Fprintf(conn, "HTTP/1.1 %d what it says\r\nServer: %s\r\nVia: 1.1 proxy.test (stand-in)\r\n", code, p.server)
		if code == http.StatusProxyAuthRequired {
			io.WriteString(conn, "Proxy-Authenticate: Negotiate\r\nProxy-Authenticate: Basic realm=\"company\"\r\n")
		}
		io.WriteString(conn, "\r\n")
	}
	if p.first != nil {
		if code := p.first(target); code != http.StatusOK {
			say(code)
			return
		}
	}
	if p.password != "" && given != "Basic "+base64.StdEncoding.EncodeToString([]byte("user:"+p.password)) {
		if given != "" {
			p.denied.Add(1)
		}
		say(http.StatusProxyAuthRequired)
		return
	}
	if request.Method != http.MethodConnect {
		if p.plain != "" {
			io.WriteString(conn, p.plain)
			return
		}
		say(http.StatusOK)
		return
	}
	code := http.StatusOK
	if p.answer != nil {
		code = p.answer(target)
	}
	say(code)
	if code == http.StatusOK && !p.deaf {
		farSide(conn, reader, target, p.far, p.rest)
	}
}

// farSide is whoever is at the end of a tunnel, by the port.
func farSide(conn net.Conn, reader io.Reader, target string, config *tls.Config, rest time.Duration) {
	_, text, _ := net.SplitHostPort(target)
	port, _ := strconv.Atoi(text)
	switch port {
	case 22:
		io.WriteString(conn, "SSH-2.0-standin \x1b[31mred\u202e\r\n")
	case 53:
		io.Copy(io.Discard, reader)
	case 80:
		if _, err := http.ReadRequest(bufio.NewReader(reader)); err == nil {
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	case 443, 853:
		server := tls.Server(conn, config)
		if server.Handshake() != nil {
			return
		}
		if rest > 0 {
			server.SetReadDeadline(time.Now().Add(rest))
		}
		if _, err := http.ReadRequest(bufio.NewReader(server)); err == nil {
			io.WriteString(server, "HTTP/1.1 204 No Content\r\n\r\n")
		}
	}
}

// certify makes a root and a certificate of the name by it. logged: with proofs that it
// is in public logs.
func certify(t *testing.T, name, by string, logged bool) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: by}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), DNSNames: []string{name},
	}
	if logged {
		leaf.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}, Value: []byte{4, 0}}}
	}
	raw, err := x509.CreateCertificate(rand.Reader, leaf, root, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	rawRoot, err := x509.CreateCertificate(rand.Reader, root, root, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(rawRoot)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{raw}, PrivateKey: key}}}, roots
}

// host is the public host of the tests, who only the stand-ins' tunnels lead to.
const host = "host.test"

// ask probes what is at an address, as the URL that the format makes of it.
func ask(t *testing.T, format string, at netip.AddrPort, change func(*probe.Config)) *probe.Report {
	t.Helper()
	proxy, err := upstream.Parse(fmt.Sprintf(format, at))
	if err != nil {
		t.Fatal(err)
	}
	config := probe.Config{
		Dialer: &upstream.Dialer{ConnectTimeout: probe.ConnectLimit, HandshakeTimeout: 10 * time.Second},
		Proxy:  proxy,
		Host:   host, Address: netip.MustParseAddr("192.0.2.7"), IPv6: netip.MustParseAddr("2001:db8::7"),
		NameServer: "dns.test", NameServerAddress: netip.MustParseAddr("192.0.2.53"),
		Ports: []uint16{80, 22, 53, 853},
		Resolvers: []probe.Resolver{
			{Check: probe.SystemDNS, Asked: "directly", Ask: func(_ context.Context, _ func(context.Context) (net.Conn, error), query []byte) ([]byte, error) {
				return answerTo(query, dnsmessage.RCodeNameError)
			}},
			{Check: probe.TCPDNS, Asked: "through the proxy", Target: upstream.Target{Host: "192.0.2.53", Port: 53}, Ask: eager},
		},
	}
	if change != nil {
		change(&config)
	}
	start := time.Now()
	report := probe.Run(t.Context(), config)
	if took := time.Since(start); took > probe.TimeLimit+config.Idle+time.Second {
		t.Errorf("it took %s", took)
	}
	for _, f := range report.Findings {
		t.Logf("%-8s %-34s %s", f.Verdict, f.Asked, f.Proof)
		for _, c := range f.Proof {
			if c < ' ' || c == 0x7f {
				t.Errorf("%s: the proof %q has control characters", f.Check, f.Proof)
			}
		}
	}
	return report
}

// eager tries to open a tunnel three times, as a resolver does that gives up late.
func eager(ctx context.Context, dial func(context.Context) (net.Conn, error), query []byte) ([]byte, error) {
	for range 3 {
		conn, err := dial(ctx)
		if err == nil {
			conn.Close()
			return answerTo(query, dnsmessage.RCodeSuccess, [4]byte{192, 0, 2, 7})
		}
	}
	return nil, errors.New("no connection could be opened")
}

// answerTo is the answer to a query.
func answerTo(query []byte, code dnsmessage.RCode, addresses ...[4]byte) ([]byte, error) {
	var message dnsmessage.Message
	if err := message.Unpack(query); err != nil {
		return nil, err
	}
	message.Response, message.RCode = true, code
	for _, address := range addresses {
		message.Answers = append(message.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: message.Questions[0].Name, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.AResource{A: address},
		})
	}
	return message.Pack()
}
