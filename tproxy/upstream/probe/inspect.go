package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
)

// timestamps is the extension by which certificates of public issuers prove that they
// were logged (RFC 6962 section 3.3). Browsers take none without, so that all have it;
// those that a proxy makes up do not.
var timestamps = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}

// inspect shakes hands with the host through a tunnel, and looks at who signed its
// certificate: one that leads to no root of this host, or that a root signed which only
// this company knows, was made by a proxy that opens TLS.
func (r *run) inspect(ctx context.Context) result {
	raw, err := r.dial(ctx, r.first())
	if err != nil {
		return r.failed(err)
	}
	defer raw.Close()
	ctx, cancel := context.WithTimeout(ctx, speakLimit)
	defer cancel()
	// It is verified below, so that one that fails is seen as well.
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: r.Host})
	if err := conn.HandshakeContext(ctx); err != nil {
		return result{verdict: Unclear, proof: "no TLS through the tunnel: " + reason(err)}
	}
	state := conn.ConnectionState()
	leaf := state.PeerCertificates[0]
	by := issuer(leaf)
	r.report.Issuer = by
	options := x509.VerifyOptions{DNSName: r.Host, Roots: r.Roots, Intermediates: x509.NewCertPool()}
	for _, certificate := range state.PeerCertificates[1:] {
		options.Intermediates.AddCert(certificate)
	}
	_, err = leaf.Verify(options)
	_, unknown := err.(x509.UnknownAuthorityError)
	switch {
	case unknown:
		return result{verdict: No, proof: "certificate by " + by + " is not from a public root: the proxy inspects TLS"}
	case err != nil:
		return result{verdict: Unclear, proof: "certificate by " + by + ": " + err.Error()}
	case !logged(leaf, state):
		return result{verdict: Unclear, proof: "certificate by " + by + ", which this host trusts, but not logged as public ones are: inspected by the company's own CA?"}
	}
	return result{verdict: Yes, proof: "certificate by " + by}
}

// logged reports whether a certificate comes with proofs that it was logged.
func logged(leaf *x509.Certificate, state tls.ConnectionState) bool {
	for _, extension := range leaf.Extensions {
		if extension.Id.Equal(timestamps) {
			return true
		}
	}
	return len(state.SignedCertificateTimestamps) > 0
}
