package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
)

// secure is TLS to a proxy as a Conn. The end of the TCP connection without the peer's
// close_notify is an error (io.ErrUnexpectedEOF): whoever cuts it must not be able to make
// half a download look whole (RFC 8446 section 6.1).
//
// Package tls takes it for an orderly end if it comes between two records.
type secure struct {
	*tls.Conn
	below *below
	abort atomic.Bool
}

// below is the TCP connection under TLS.
type below struct {
	*net.TCPConn
	ended bool // by a FIN; used in reads only
}

// Read takes note of the end.
func (b *below) Read(p []byte) (n int, err error) {
	n, err = b.TCPConn.Read(p)
	b.ended = b.ended || err == io.EOF
	return n, err
}

// Read takes the end for one only if the peer has said so.
func (s *secure) Read(p []byte) (n int, err error) {
	n, err = s.Conn.Read(p)
	if err == io.EOF && s.below.ended {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// SetLinger is that of the TCP connection below.
func (s *secure) SetLinger(seconds int) error {
	s.abort.Store(seconds == 0)
	return s.below.SetLinger(seconds)
}

// Close says goodbye (close_notify) first, unless this is an abort.
func (s *secure) Close() error {
	if s.abort.Load() {
		return s.below.Close()
	}
	return s.Conn.Close()
}

// SyscallConn is that of the TCP connection below.
func (s *secure) SyscallConn() (syscall.RawConn, error) { return s.below.SyscallConn() }

// encrypt starts TLS on a connection to a proxy, which is closed on failure. It offers some
// protocols to be spoken (ALPN, RFC 7301), none for HTTP/1.1.
func (d *Dialer) encrypt(ctx context.Context, conn *net.TCPConn, proxy *Proxy, offered []string) (*secure, error) {
	config := new(tls.Config)
	if d.TLS != nil {
		config = d.TLS.Clone()
	}
	config.NextProtos = offered
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	if config.ServerName == "" {
		config.ServerName = proxy.host
	}
	s := &secure{below: &below{TCPConn: conn}}
	s.Conn = tls.Client(s.below, config)
	if err := s.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, adviseTLS(err, config.ServerName)
	}
	return s, nil
}

// adviseTLS says what to do about a failed TLS handshake.
func adviseTLS(err error, name string) error {
	advice := ""
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		advice = "if that is the company's own authority, give its certificate with --upstream-ca"
	case errors.As(err, new(x509.HostnameError)):
		advice = "give the name that the certificate has with --upstream-server-name"
	case errors.As(err, new(x509.CertificateInvalidError)):
		advice = "have it renewed, or look at this host's clock"
	case errors.As(err, new(tls.RecordHeaderError)):
		advice = "the proxy does not speak TLS on this port: try http:// in place of https://"
	case errors.Is(err, io.EOF):
		advice = "the proxy closed the connection: if it does not speak TLS on this port, try http:// in place of https://"
	default:
		return fmt.Errorf("TLS with %s: %w", name, err)
	}
	return fmt.Errorf("TLS with %s: %w: %s", name, err, advice)
}
