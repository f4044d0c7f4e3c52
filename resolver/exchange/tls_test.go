package exchange_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// certificate returns the configurations of a server named name and of clients that
// trust its authority.
func certificate(t testing.TB, name string) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IsCA:         true, BasicConstraintsValid: true,
	}
	raw, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{raw}, PrivateKey: key}}},
		&tls.Config{RootCAs: pool, ServerName: name}
}

// startTLS makes s speak TLS.
func (s *standIn) startTLS(t testing.TB, config *tls.Config) *standIn {
	s.wrap = func(conn net.Conn) net.Conn { return tls.Server(conn, config) }
	return s.start(t)
}

func TestTLS(t *testing.T) {
	wantGoroutines(t)
	server, client := certificate(t, "dns.test")
	var resumed, versions atomic.Int64
	server.NextProtos = []string{"dot"}
	server.VerifyConnection = func(state tls.ConnectionState) error {
		if state.DidResume {
			resumed.Add(1)
		}
		versions.Store(int64(state.Version))
		return nil
	}
	s := (&standIn{handle: plain}).startTLS(t, server)
	dns := closed(t, exchange.NewTLS("dns.test", s.dial, client, exchange.Config{}))
	for range 3 {
		if err := errors.Join(askAll(dns, t.Context(), 50, number)...); err != nil {
			t.Fatal(err)
		}
		s.hangUp()
	}
	if resumed.Load() == 0 || versions.Load() != tls.VersionTLS13 {
		t.Errorf("%d sessions resumed, version %x", resumed.Load(), versions.Load())
	}
	if len(client.NextProtos) > 0 {
		t.Error("the configuration was changed")
	}
}

func TestTLSServerIsAuthenticated(t *testing.T) {
	wantGoroutines(t)
	server, client := certificate(t, "dns.test")
	_, stranger := certificate(t, "dns.test")
	wrong := client.Clone()
	wrong.ServerName = "other.test"
	old := server.Clone()
	old.MaxVersion = tls.VersionTLS11
	web := server.Clone()
	web.NextProtos = []string{"h2"}
	for _, test := range []struct {
		name           string
		server, client *tls.Config
		says           string
	}{
		{"wrong name", server, wrong, "not other.test"},
		{"unknown authority", server, stranger, "unknown authority"},
		{"old version", old, client, "protocol version"},
		{"another protocol", web, client, "no application protocol"},
	} {
		s := (&standIn{handle: plain}).startTLS(t, test.server)
		dns := exchange.NewTLS("dns.test", s.dial, test.client, exchange.Config{})
		err := ask(dns, t.Context(), "a.test")
		if err == nil || !strings.HasPrefix(err.Error(), "ask dns.test: connect: TLS: ") || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v", test.name, err)
		}
		if s.asked.Load() > 0 {
			t.Errorf("%s: the question was told", test.name)
		}
		dns.Close()
	}
}

// TestHandshakeThatNeverEnds is ended by ConnectTimeout, and by Close.
func TestHandshakeThatNeverEnds(t *testing.T) {
	wantGoroutines(t)
	_, client := certificate(t, "dns.test")
	s := (&standIn{handle: func(*peer, []byte) {}}).start(t)
	dns := exchange.NewTLS("dns.test", s.dial, client, exchange.Config{ConnectTimeout: 100 * time.Millisecond})
	within(t, time.Second, "the error", func() {
		if err := ask(dns, t.Context(), "a.test"); err == nil || !strings.Contains(err.Error(), "connect: TLS: context deadline exceeded") {
			t.Error(err)
		}
	})
	dns.Close()
	dns = exchange.NewTLS("dns.test", s.dial, client, exchange.Config{})
	result := make(chan error)
	before := s.accepted.Load()
	go func() { result <- ask(dns, t.Context(), "a.test") }()
	for s.accepted.Load() == before {
		time.Sleep(time.Millisecond)
	}
	within(t, time.Second, "Close", dns.Close)
	if err := <-result; !errors.Is(err, exchange.ErrClosed) {
		t.Error(err)
	}
}
