package auth

import (
	"crypto"
	"crypto/md5"
	"crypto/x509"
	"encoding/binary"
)

// Binding says on which TLS connection a proof was made, so that who is in the middle of
// another cannot use it: the MD5 of gss_channel_bindings_struct ([MS-NLMP] section
// 2.2.2.1, RFC 4121 section 4.1.1.2) with tls-server-end-point (RFC 5929 section 4).
// certificate is the one that the proxy has shown.
func Binding(certificate *x509.Certificate) []byte {
	hash := crypto.SHA256 // in place of MD5 and SHA-1 as well
	switch certificate.SignatureAlgorithm {
	case x509.SHA384WithRSA, x509.ECDSAWithSHA384, x509.SHA384WithRSAPSS:
		hash = crypto.SHA384
	case x509.SHA512WithRSA, x509.ECDSAWithSHA512, x509.SHA512WithRSAPSS:
		hash = crypto.SHA512
	}
	digest := hash.New()
	digest.Write(certificate.Raw)
	data := digest.Sum([]byte("tls-server-end-point:"))
	// Neither side's address counts: four zeros stand for them.
	text := binary.LittleEndian.AppendUint32(make([]byte, 16), uint32(len(data)))
	sum := md5.Sum(append(text, data...))
	return sum[:]
}
