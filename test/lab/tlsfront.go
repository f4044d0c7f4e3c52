package lab

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// TLSFront takes TLS off, as stunnel does, before a stand-in on the same host. The zero
// value is ready for Start.
type TLSFront struct {
	// Cut ends each connection after so many bytes to the client, without the goodbye of
	// TLS; 0 for never.
	Cut int64
	// Config is what it wants of clients; nil for nothing.
	Config *tls.Config

	servers servers
	ca, key []byte
}

// TLSName is the name in the certificate.
const TLSName = "proxy.test"

// Start listens on a port of the host and passes on to another one.
func (f *TLSFront) Start(ns *netns.NS, port int, to netip.AddrPort, addresses ...netip.Addr) error {
	certificate, _, err := newCertificate([]string{TLSName}, addresses)
	if err != nil {
		return err
	}
	f.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]})
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		return err
	}
	f.key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	config := f.Config.Clone()
	if config == nil {
		config = new(tls.Config)
	}
	config.Certificates = []tls.Certificate{certificate}
	return f.servers.listen(ns, port, func(client *net.TCPConn) {
		var server net.Conn
		err := ns.Do(func() (err error) {
			server, err = net.Dial("tcp", to.String())
			return err
		})
		if err != nil {
			return
		}
		defer server.Close()
		f.carry(tls.Server(client, config), server.(*net.TCPConn), client)
	})
}

// carry goes both ways, and passes each end on.
func (f *TLSFront) carry(client *tls.Conn, server, below *net.TCPConn) {
	var up sync.WaitGroup
	up.Go(func() {
		io.Copy(server, client)
		server.CloseWrite()
	})
	if f.Cut > 0 {
		io.CopyN(client, server, f.Cut)
		below.Close()
	} else {
		io.Copy(client, server)
		client.CloseWrite()
	}
	up.Wait()
}

// Close ends it.
func (f *TLSFront) Close() { f.servers.close() }

// CA is the authority that signed its certificate, in PEM, once it is started.
func (f *TLSFront) CA() []byte { return f.ca }

// Key is the private key of its certificate, in PEM, for a client that is to have the same.
func (f *TLSFront) Key() []byte { return f.key }
