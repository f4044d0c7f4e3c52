package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"unicode"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// maxProof bounds what is shown of an answer.
const maxProof = 200 // characters

// clean makes a text from outside fit for a terminal and a line of a table.
func clean(text string) string {
	var shown strings.Builder
	length := 0
	for _, r := range strings.TrimSpace(text) {
		if length++; length > maxProof {
			shown.WriteString("...")
			break
		}
		if !unicode.IsPrint(r) {
			r = '?'
		}
		shown.WriteRune(r)
	}
	return shown.String()
}

// failed is the result of a question that the proxy did not answer with a tunnel.
func (r *run) failed(err error) result {
	refused, answered := errors.AsType[*upstream.RefusedError](err)
	switch {
	case errors.Is(err, upstream.ErrCredentialRefused):
		r.note(&r.denied)
		return result{verdict: Skipped, proof: r.stopped()}
	case answered && refused.Denied:
		r.note(&r.denied)
		return result{verdict: No, proof: r.refusal(), status: refused.Code}
	case answered:
		return r.refused(refused)
	}
	if _, settled := r.Proxy.Standing(); !settled && !errors.As(err, new(*upstream.ConnectError)) {
		r.note(&r.owed)
	}
	return lost(err)
}

// lost is the result of a question without an answer.
func lost(err error) result { return result{verdict: verdictOf(err), proof: reason(err)} }

// refused is the result of a proxy's answer that opens nothing.
func (r *run) refused(refused *upstream.RefusedError) result {
	if !r.Proxy.PlainHTTP() {
		return refusedBySOCKS(refused)
	}
	got := result{No, status(refused.Code), refused.Code}
	switch refused.Code {
	case http.StatusNotFound, http.StatusGone, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		// Filters that say no in this way are met too.
		got.verdict = Unclear
		got.proof += ": allowed, it seems, but the proxy did not reach it"
	case http.StatusProxyAuthRequired:
		got.proof += ": it wants to authenticate"
	}
	return got
}

// refusedBySOCKS is the same by the replies of RFC 1928 section 6.
func refusedBySOCKS(refused *upstream.RefusedError) result {
	got := result{No, fmt.Sprintf("reply %d %s", refused.Code, refused.Reason), refused.Code}
	const unreachableFirst, expired = 3, 6
	if refused.Code >= unreachableFirst && refused.Code <= expired {
		got.verdict = Unclear
		got.proof += ": allowed, it seems, but the proxy did not reach it"
	}
	return got
}

// status is a status of HTTP with its registered meaning, which is shown instead of what
// the proxy writes there.
func status(code int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", code, http.StatusText(code)))
}

// note sets one of the marks that stop everything.
func (r *run) note(mark *bool) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	*mark = true
}

// verdictOf tells whether an error proves something.
func verdictOf(err error) Verdict {
	if late(err) {
		return Unclear
	}
	return No
}

// alerted reports whether an error is that the other side sent an alert of TLS.
func alerted(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return ok && op.Op == "remote error" // as crypto/tls has it
}

// late reports whether an error is that a time was over.
func late(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// reason is what an error comes to, without who was asked what, which the line has
// already.
func reason(err error) string {
	var unknown x509.UnknownAuthorityError
	var record tls.RecordHeaderError
	var name *net.DNSError
	switch {
	case errors.As(err, &unknown):
		return "the certificate, by " + issuer(unknown.Cert) + ", leads to no root that this host trusts"
	case errors.As(err, &record):
		return "what answers is not TLS"
	case errors.As(err, &name):
		return name.Error()
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "the connection was closed without an answer"
	case late(err):
		return "no answer in time"
	}
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return err.Error()
}

// issuer is who signed a certificate, by the best name that is there.
func issuer(certificate *x509.Certificate) string {
	if certificate == nil {
		return "an unknown issuer"
	}
	name := certificate.Issuer
	switch {
	case name.CommonName != "" && len(name.Organization) > 0 && name.Organization[0] != name.CommonName:
		return fmt.Sprintf("%q of %s", clean(name.CommonName), clean(name.Organization[0]))
	case name.CommonName != "":
		return fmt.Sprintf("%q", clean(name.CommonName))
	}
	if name.String() == "" {
		return "an issuer without a name"
	}
	return fmt.Sprintf("%q", clean(name.String()))
}
