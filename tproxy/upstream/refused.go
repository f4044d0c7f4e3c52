package upstream

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// RefusedError is a proxy's final answer that opens no tunnel.
type RefusedError struct {
	Status  int      // 101, or 300 to 999
	Reason  string   // what the proxy called it: printable ASCII, at most 80 bytes; may be empty
	Schemes []string // the ways to authenticate that it offers (Proxy-Authenticate), in its order, none twice

	authenticated bool // a credential was sent
}

// maxSchemes bounds the schemes that are kept; 13 are registered with IANA, of
// which a proxy offers up to four.
const maxSchemes = 8

// maxScheme bounds one of them in bytes; the longest that is registered,
// "SCRAM-SHA-256", has 13.
const maxScheme = 32

// Error says in one line what the proxy answered and what to do about it.
func (e *RefusedError) Error() string {
	answer := strconv.Itoa(e.Status)
	if e.Reason != "" {
		answer += " " + e.Reason
	}
	return fmt.Sprintf("the proxy answered %s: %s", answer, e.advice())
}

func (e *RefusedError) advice() string {
	switch e.Status {
	case 407:
		return e.adviceOnCredential()
	case 400, 405, 501:
		return "it does not take CONNECT requests like this one: is the address that of an HTTP proxy?"
	case 401, 403, 451:
		return "it forbids this destination or port: have it allowed there, or exempt it from the proxy (no_proxy)"
	case 404, 410, 502, 503, 504:
		return "it cannot reach the destination: if others work, look at the destination's name, port and state"
	case 429:
		return "it limits the number of requests: wait, or have the limit raised there"
	}
	if 300 <= e.Status && e.Status < 400 {
		return "it redirects, as log-in pages do: log in there, or look at the proxy's address"
	}
	return "no tunnel was opened: the proxy's own log tells more"
}

func (e *RefusedError) adviceOnCredential() string {
	offers := func(scheme string) bool { return strings.EqualFold(scheme, "Basic") }
	switch {
	case len(e.Schemes) > 0 && !slices.ContainsFunc(e.Schemes, offers):
		return fmt.Sprintf("it wants to authenticate by %s, and only Basic is supported: have Basic enabled there", strings.Join(e.Schemes, ", "))
	case e.authenticated:
		return "it refuses the user name or the password: correct them in http://user:password@host:port (special characters percent-encoded)"
	}
	return "it wants a user name and a password: give them as http://user:password@host:port (special characters percent-encoded)"
}

// readField takes note of a header field if it is a Proxy-Authenticate. It may
// come several times, and each may hold several challenges.
func (e *RefusedError) readField(line []byte) {
	name, value, found := bytes.Cut(line, []byte{':'})
	if !found || !bytes.EqualFold(name, []byte("Proxy-Authenticate")) {
		return
	}
	for len(value) > 0 {
		var element []byte
		element, value = cutElement(value)
		scheme := challengeScheme(element)
		known := func(other string) bool { return strings.EqualFold(other, scheme) }
		if scheme != "" && len(e.Schemes) < maxSchemes && !slices.ContainsFunc(e.Schemes, known) {
			e.Schemes = append(e.Schemes, scheme)
		}
	}
}

// cutElement splits a comma-separated list after its first element. A comma in a
// quoted string separates nothing (RFC 9110 sections 5.6.1 and 5.6.4).
func cutElement(list []byte) (element, rest []byte) {
	quoted := false
	for i := 0; i < len(list); i++ {
		switch {
		case list[i] == '"':
			quoted = !quoted
		case quoted && list[i] == '\\':
			i++
		case !quoted && list[i] == ',':
			return list[:i], list[i+1:]
		}
	}
	return list, nil
}

// challengeScheme returns the scheme if a list element starts a challenge, or ""
// if it is a further parameter of the one before (RFC 9110 section 11.3: both
// lists use the comma; a parameter is a token that an equals sign follows).
func challengeScheme(element []byte) string {
	element = bytes.Trim(element, " \t")
	end := 0
	for end < len(element) && isToken(element[end]) {
		end++
	}
	after := bytes.TrimLeft(element[end:], " \t")
	parameter := len(after) > 0 && after[0] == '='
	glued := len(after) > 0 && len(after) == len(element)-end // to something that is no token
	if parameter || glued || end > maxScheme {
		return ""
	}
	return string(element[:end])
}

// isToken reports whether c may stand in a token (RFC 9110 section 5.6.2).
func isToken(c byte) bool {
	return isAlphanumeric(c) || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}
