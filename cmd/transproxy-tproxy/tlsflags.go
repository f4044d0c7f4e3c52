package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/bypass"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// tlsSettings is how upstreams are talked to whose URL says https.
type tlsSettings struct {
	roots             *x509.CertPool // nil for those of the system
	rootsFile         string         // where those besides came from
	serverName        string         // empty for the host of the URL
	certificate, keys string         // files of this gateway's own certificate; empty for none
}

// sessionsKept is for how many proxies a session is kept that makes the next handshake
// shorter (RFC 8446 section 2.2): more than anybody has.
const sessionsKept = 64

// tlsOptions are the flags about them.
func tlsOptions() []option {
	return []option{
		{
			groupUpstream, "upstream-ca", "FILE", "", "certificates (PEM) to trust besides the system's, for upstreams by https://",
			func(s *settings, v string) (err error) {
				s.tls.rootsFile = v
				s.tls.roots, err = readRoots(v)
				return err
			},
		},
		{
			groupUpstream, "upstream-server-name", "NAME", "", "the name that their certificate has to have (default: the host of the URL)",
			func(s *settings, v string) error {
				if names, err := bypass.Parse(v); err != nil || len(names.Suffixes()) != 1 {
					return fmt.Errorf("%q is not a name: write it like proxy.example.org", v)
				}
				s.tls.serverName = v
				return nil
			},
		},
		{
			groupUpstream, "upstream-cert", "FILE", "", "the certificate (PEM) that this gateway shows them",
			func(s *settings, v string) error { s.tls.certificate = v; return nil },
		},
		{
			groupUpstream, "upstream-key", "FILE", "", "its private key (PEM; default: in the same file)",
			func(s *settings, v string) error { s.tls.keys = v; return nil },
		},
	}
}

// readRoots returns the authorities of the system and those of a file.
func readRoots(file string) (*x509.CertPool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%w: name a file with certificates", err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no certificate: it has to be in PEM form (-----BEGIN CERTIFICATE-----)", file)
	}
	return roots, nil
}

// config is what the dialer is told.
func (t tlsSettings) config() (*tls.Config, error) {
	config := &tls.Config{
		RootCAs: t.roots, ServerName: t.serverName,
		ClientSessionCache: tls.NewLRUClientSessionCache(sessionsKept),
	}
	if t.certificate == "" {
		return config, nil
	}
	keys := t.keys
	if keys == "" {
		keys = t.certificate
	}
	certificate, err := tls.LoadX509KeyPair(t.certificate, keys)
	if err != nil {
		return nil, fmt.Errorf("--upstream-cert %s: %w: it has to be a certificate and its key in PEM form", t.certificate, err)
	}
	config.Certificates = []tls.Certificate{certificate}
	return config, nil
}

// validateTLS finds what contradicts the rest of the settings.
func (s *settings) validateTLS() error {
	t := s.tls
	given := t.roots != nil || t.serverName != "" || t.certificate != ""
	switch {
	case t.keys != "" && t.certificate == "":
		return errors.New("--upstream-key: there is no certificate to it: give --upstream-cert")
	case given && !slices.ContainsFunc(s.upstreams(), isHTTPS):
		return errors.New("--upstream-ca, --upstream-server-name and --upstream-cert are for upstreams by TLS: write https://host:port, or leave them out")
	}
	_, err := t.config()
	return err
}

func isHTTPS(proxy *upstream.Proxy) bool { return strings.HasPrefix(proxy.String(), "https://") }
