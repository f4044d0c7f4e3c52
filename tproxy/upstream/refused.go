package upstream

import (
	"errors"
	"strconv"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// RefusedError is a proxy's final answer that opens no tunnel. The proxy itself is
// up and understood what it was asked.
type RefusedError struct {
	// Code is what the proxy answered: the status of HTTP, 101 or 300 to 999, or
	// the octet of SOCKS5, 1 to 255, that says no to the methods of authentication,
	// the password or the request.
	Code    int
	Reason  string   // what HTTP's proxy, or SOCKS5's RFC, calls it: printable ASCII, at most 80 bytes; may be empty
	Schemes []string // HTTP: the ways to authenticate that it offers (Proxy-Authenticate), in its order, none twice
	Denied  bool     // it refuses the credential, which was sent

	advice string // what it means and what to do about it
}

// Error says in one line what the proxy answered and what to do about it.
func (e *RefusedError) Error() string {
	answer := strconv.Itoa(e.Code)
	if e.Reason != "" {
		answer += " " + e.Reason
	}
	return "the proxy answered " + answer + ": " + e.advice
}

// Denied reports whether err is, or wraps, the answer of a proxy that refuses the
// credential that it was sent, in whichever protocol, or that of a key distribution centre
// that gives no ticket for it.
func Denied(err error) bool {
	refused, ok := errors.AsType[*RefusedError](err)
	return ok && refused.Denied || errors.Is(err, auth.ErrRefused)
}
