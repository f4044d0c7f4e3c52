package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// defaultPort is taken when a proxy's URL has none: Squid's, which has become that
// of HTTP proxies in general. It is neither the port of the scheme (80), on which
// web servers listen and no forward proxies, nor curl's 1080, which is SOCKS's.
const defaultPort = 3128

// maxURL bounds a proxy's URL in bytes; a user name, a password and a host of the
// greatest useful length fit many times.
const maxURL = 4096

// Parse reads a proxy's URL: http://[user:password@]host[:port], or the same
// without the scheme, as curl takes it. Without a port it is 3128.
//
// User name and password are percent-decoded, and what RFC 3986 section 3.2.1 does
// not allow there unencoded is refused, because a raw / # ? or @ in a password
// would be read as the end of it. A user name without a password is sent with an
// empty one. An IPv6 address stands in brackets, with a zone if need be:
// [fe80::1%25eth0].
//
// An error names the value without its user name and password, the fault and the
// remedy, in one line.
func Parse(raw string) (*Proxy, error) {
	if len(raw) > maxURL {
		return nil, fmt.Errorf("%s: the URL of a proxy has at most %d bytes", redact(raw), maxURL)
	}
	proxy, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", redact(raw), err)
	}
	return proxy, nil
}

// parse is Parse. Its errors must not quote anything that could be part of a
// password: of a URL that is written wrongly nobody can tell which part is which.
func parse(raw string) (*Proxy, error) {
	scheme, rest := cutScheme(raw)
	if scheme != "" && !strings.EqualFold(scheme, "http") {
		return nil, fmt.Errorf("scheme %q is not supported: use http://host:port", scheme)
	}
	proxy := new(Proxy)
	var err error
	// The last @ is the one before the host, as no host has one; an @ before it is
	// an unencoded one in the password.
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		if proxy.credential, err = parseUserinfo(rest[:at]); err != nil {
			return nil, err
		}
		rest = rest[at+1:]
	}
	hostport, path := rest, ""
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		hostport, path = rest[:end], rest[end:]
	}
	if path != "" && path != "/" {
		return nil, errors.New("the URL of a proxy ends after its port: use http://host:port, and percent-encode special characters of a password (/ as %2F, # as %23, ? as %3F)")
	}
	if proxy.host, proxy.port, err = parseHostPort(hostport); err != nil {
		return nil, err
	}
	// The zone of an IPv6 literal is written as RFC 6874 has it.
	proxy.url = "http://" + joinHostPort(strings.Replace(proxy.host, "%", "%25", 1), proxy.port)
	if address, err := netip.ParseAddr(proxy.host); err == nil {
		proxy.literal = []netip.AddrPort{netip.AddrPortFrom(address.Unmap(), proxy.port)}
	}
	return proxy, nil
}

// cutScheme splits a URL at "://"; scheme is empty if there is none.
func cutScheme(raw string) (scheme, rest string) {
	before, after, found := strings.Cut(raw, "://")
	if !found || before == "" {
		return "", raw
	}
	for i := range len(before) {
		if c := before[i]; !isAlphanumeric(c) && !strings.ContainsRune("+-.", rune(c)) {
			return "", raw
		}
	}
	return before, after
}

// parseUserinfo decodes what stands before the @. It returns nil if it is empty.
func parseUserinfo(userinfo string) (*credential, error) {
	for i := range len(userinfo) {
		if c := userinfo[i]; !isAlphanumeric(c) && !strings.ContainsRune("-._~!$&'()*+,;=:%", rune(c)) {
			return nil, errors.New("percent-encode special characters of the user name and the password: " +
				"/ as %2F, @ as %40, # as %23, ? as %3F, % as %25, a space as %20")
		}
	}
	name, secret, _ := strings.Cut(userinfo, ":")
	// Their errors would quote the text.
	user, errUser := url.PathUnescape(name)
	password, errPassword := url.PathUnescape(secret)
	switch {
	case errUser != nil || errPassword != nil:
		return nil, errors.New("a % in the user name or the password is not followed by two hexadecimal digits: write % as %25")
	case strings.Contains(user, ":"):
		return nil, errors.New("a user name with a colon cannot be sent by Basic authentication (RFC 7617 section 2): use another account")
	case hasControl(user) || hasControl(password):
		return nil, errors.New("control characters in the user name or the password cannot be sent by Basic authentication (RFC 7617 section 2): remove them (%00 to %1F, %7F)")
	case user == "" && password == "":
		return nil, nil
	}
	return &credential{authorization: basic(user, password)}, nil
}

func hasControl(text string) bool {
	return strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// parseHostPort reads the last part of the URL. It may quote the host but not a
// port that is no number: in user:password without an @ that is the password.
func parseHostPort(hostport string) (host string, port uint16, err error) {
	var after string
	if literal, found := strings.CutPrefix(hostport, "["); found {
		if literal, after, found = strings.Cut(literal, "]"); !found {
			return "", 0, errors.New("the bracket of the IPv6 address is not closed: use http://[2001:db8::1]:3128")
		}
		// RFC 6874 writes the zone's % as %25; curl takes both.
		address, err := netip.ParseAddr(strings.Replace(literal, "%25", "%", 1))
		if err != nil || !address.Is6() || hasControl(literal) {
			return "", 0, errors.New("what stands in brackets is not an IPv6 address: use http://[2001:db8::1]:3128")
		}
		host = address.String()
	} else {
		colon := strings.IndexByte(hostport, ':')
		if colon < 0 {
			colon = len(hostport)
		}
		host, after = hostport[:colon], hostport[colon:]
		if strings.Count(after, ":") > 1 {
			return "", 0, errors.New("more than one colon: use http://host:port, and put an IPv6 address in brackets: http://[2001:db8::1]:3128")
		}
		if host == "" {
			return "", 0, errors.New("no host: use http://host:port")
		}
		if _, err := netip.ParseAddr(host); err != nil && !validName(host) {
			return "", 0, errors.New("the host is neither a DNS name nor an IP address: use http://host:port, a name that is not ASCII in its xn-- form")
		}
	}
	if after == "" || after == ":" {
		return host, defaultPort, nil
	}
	number, err := strconv.ParseUint(strings.TrimPrefix(after, ":"), 10, 16)
	if after[0] != ':' || err != nil || number == 0 {
		return "", 0, errors.New("the port is not a number from 1 to 65535: use http://host:port")
	}
	return host, uint16(number), nil
}

// hidden stands for what must not be shown.
const hidden = "***"

// redact returns a URL, however it is written, as it may be shown: scheme, host
// and port, and nothing that could be a user name or a password.
func redact(raw string) string {
	scheme, rest := cutScheme(raw)
	if scheme != "" {
		scheme += "://"
	}
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		scheme += hidden + "@"
		rest = rest[at+1:]
	}
	// Without an @, user:password looks like host:port: what follows the host is
	// shown only if it is a number. The colons of an IPv6 address are in brackets.
	host := 0
	if strings.HasPrefix(rest, "[") {
		host = strings.IndexByte(rest, ']') + 1
	}
	if end := strings.IndexAny(rest[host:], ":/?#"); end >= 0 {
		end += host + 1
		if after := strings.TrimSuffix(rest[end:], "/"); after != "" && !isNumber(after) {
			rest = rest[:end] + hidden
		}
	}
	const most = 300 // bytes; a host name has 253
	shown := scheme + rest
	if len(shown) > most {
		shown = shown[:most] + "..."
	}
	for i := range len(shown) {
		if c := shown[i]; c <= ' ' || c > '~' {
			return strconv.QuoteToASCII(shown)
		}
	}
	if shown == "" {
		return `""`
	}
	return shown
}
