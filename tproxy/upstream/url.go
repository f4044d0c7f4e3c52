package upstream

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// protocol is what a proxy speaks; it stands as the scheme in the proxy's URL.
type protocol string

const (
	protocolHTTP    protocol = "http"
	protocolHTTPS   protocol = "https" // the same over TLS
	protocolSOCKS5  protocol = "socks5"
	protocolSOCKS4A protocol = "socks4a"
	protocolDirect  protocol = "direct" // no proxy at all
)

// defaultPort is taken when a proxy's URL has none. For HTTP it is Squid's, which
// has become that of HTTP proxies in general, and neither the port of the scheme
// (80), on which web servers listen and no forward proxies, nor curl's 1080. That
// is SOCKS's (RFC 1928 section 3). For HTTP over TLS there is none but that of the scheme,
// which curl takes as well.
func (p protocol) defaultPort() uint16 {
	switch p {
	case protocolSOCKS5, protocolSOCKS4A:
		return 1080
	case protocolHTTPS:
		return 443
	}
	return 3128
}

// usage is how to write a URL of the protocol.
func (p protocol) usage() string { return "use " + string(p) + "://host:port" }

// usageIPv6 is the same for an IPv6 address.
func (p protocol) usageIPv6() string {
	return fmt.Sprintf("use %s://[2001:db8::1]:%d", p, p.defaultPort())
}

// protocolOf returns what a scheme stands for. socks5h is a name from curl, where
// it means that names are left to the proxy; here they always are.
func protocolOf(scheme string) (protocol, error) {
	switch strings.ToLower(scheme) {
	case "", "http":
		return protocolHTTP, nil
	case "https":
		return protocolHTTPS, nil
	case "socks5", "socks5h":
		return protocolSOCKS5, nil
	case "socks4a":
		return protocolSOCKS4A, nil
	case "socks4":
		return "", errors.New("a SOCKS4 proxy cannot be asked for names: use socks4a://host:port if it knows that extension, as most do")
	case "direct":
		return protocolDirect, nil
	}
	return "", fmt.Errorf("scheme %q is not supported: use http://host:port, https://host:port, socks5://host:port, socks4a://host:port or direct://", scheme)
}

// maxURL bounds a proxy's URL in bytes; a user name, a password and a host of the
// greatest useful length fit many times.
const maxURL = 4096

// Parse reads a proxy's URL: http://[user:password@]host[:port], or the same
// without the scheme, as curl takes it, for an HTTP proxy; the scheme https for one that is
// talked to by TLS; the scheme socks5, or socks5h with the same meaning, for a SOCKS5 proxy;
// socks4a for a SOCKS4a proxy, which takes a user name but no password.
// Without a port it is 3128, 443 or 1080. http+unix:///run/proxy.sock is an HTTP proxy that
// listens on a unix socket of this host, and socks5+unix and socks4a+unix the others;
// percent-encoded like the rest, and with user name and password before the path. direct:// stands for the way without a proxy.
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

// ParseList reads the URLs of proxies, separated by commas. A credential that several of
// them share is one account, which is tried by one of them at a time (Join).
func ParseList(raw string) ([]*Proxy, error) {
	// A comma may stand in a password.
	if proxy, err := Parse(raw); err == nil || !strings.Contains(raw, ",") {
		return []*Proxy{proxy}, err
	}
	var proxies []*Proxy
	for part := range strings.SplitSeq(raw, ",") {
		proxy, err := Parse(strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		for _, other := range proxies {
			if proxy.Join(other) {
				return nil, fmt.Errorf("%s: it is there twice: leave one out", redact(part))
			}
		}
		proxies = append(proxies, proxy)
	}
	return proxies, nil
}

// parse is Parse. Its errors must not quote anything that could be part of a
// password: of a URL that is written wrongly nobody can tell which part is which.
func parse(raw string) (*Proxy, error) {
	scheme, rest := cutScheme(raw)
	scheme, onSocket, err := cutSocket(scheme, rest)
	if err != nil {
		return nil, err
	}
	protocol, err := protocolOf(scheme)
	if err != nil {
		return nil, err
	}
	proxy := &Proxy{protocol: protocol, health: newHealth()}
	var account *auth.Account
	if protocol == protocolDirect {
		if strings.Trim(rest, "/") != "" {
			return nil, errors.New("the direct way has no host: use direct:// alone")
		}
		proxy.url = "direct://"
		return proxy, nil
	}
	// The last @ is the one before the host, as no host has one; an @ before it is
	// an unencoded one in the password.
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		if protocol == protocolSOCKS4A {
			proxy.userID, err = parseUserID(rest[:at])
		} else {
			account, err = parseUserinfo(rest[:at])
		}
		if err != nil {
			return nil, err
		}
		rest = rest[at+1:]
	}
	if onSocket {
		err = proxy.locateSocket(rest)
	} else {
		err = proxy.locate(rest)
	}
	if err == nil && account != nil {
		err = proxy.Login(account, auth.Auto)
	}
	if err != nil {
		return nil, err
	}
	return proxy, nil
}

// locate reads what stands behind the user name and the password.
func (p *Proxy) locate(rest string) (err error) {
	hostport, path := rest, ""
	if end := strings.IndexAny(rest, "/?#"); end >= 0 {
		hostport, path = rest[:end], rest[end:]
	}
	if path != "" && path != "/" {
		return errors.New("the URL of a proxy ends after its port: " + p.protocol.usage() + ", and percent-encode special characters of a password (/ as %2F, # as %23, ? as %3F)")
	}
	if p.host, p.port, err = p.protocol.parseHostPort(hostport); err != nil {
		return err
	}
	// The zone of an IPv6 literal is written as RFC 6874 has it.
	p.url = string(p.protocol) + "://" + joinHostPort(strings.Replace(p.host, "%", "%25", 1), p.port)
	if address, err := netip.ParseAddr(p.host); err == nil {
		p.literal = []netip.AddrPort{netip.AddrPortFrom(address.Unmap(), p.port)}
	}
	return nil
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

// decodeUserinfo decodes what stands before the @.
func decodeUserinfo(userinfo string) (user, password string, err error) {
	for i := range len(userinfo) {
		if c := userinfo[i]; !isAlphanumeric(c) && !strings.ContainsRune("-._~!$&'()*+,;=:%", rune(c)) {
			return "", "", errors.New("percent-encode special characters of the user name and the password: " +
				"/ as %2F, @ as %40, # as %23, ? as %3F, % as %25, a space as %20")
		}
	}
	name, secret, _ := strings.Cut(userinfo, ":")
	// Their errors would quote the text.
	user, errUser := url.PathUnescape(name)
	password, errPassword := url.PathUnescape(secret)
	if errUser != nil || errPassword != nil {
		return "", "", errors.New("a % in the user name or the password is not followed by two hexadecimal digits: write % as %25")
	}
	return user, password, nil
}

// parseUserinfo reads what stands before the @. It returns nil if it is empty.
func parseUserinfo(userinfo string) (*auth.Account, error) {
	user, password, err := decodeUserinfo(userinfo)
	if err != nil || user == "" && password == "" {
		return nil, err
	}
	return auth.NewAccount(user, password, nil), nil
}

// checkCredential returns why the protocol cannot send a user name and a password.
func (p protocol) checkCredential(user, password string) error {
	switch {
	case p == protocolSOCKS4A:
		return errors.New("a SOCKS4a proxy takes no account, but a user id alone: give that in socks4a://user@host:port")
	case p == protocolSOCKS5 && user == "":
		return errors.New("a SOCKS5 proxy takes no password without a user name (RFC 1929 section 2): use socks5://user:password@host:port")
	case p == protocolSOCKS5 && max(len(user), len(password)) > maxSOCKS5String:
		return fmt.Errorf("the user name or the password is longer than the %d bytes that SOCKS5 can send (RFC 1929 section 2): use another account", maxSOCKS5String)
	case p == protocolSOCKS5:
		return nil
	case strings.Contains(user, ":"):
		return errors.New("a user name with a colon cannot be sent by Basic authentication (RFC 7617 section 2): use another account")
	case hasControl(user) || hasControl(password):
		return errors.New("control characters in the user name or the password cannot be sent (RFC 7617 section 2, RFC 7616 section 3.4): remove them (%00 to %1F, %7F)")
	}
	return nil
}

func hasControl(text string) bool {
	return strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// parseHostPort reads the last part of the URL. It may quote the host but not a
// port that is no number: in user:password without an @ that is the password.
func (p protocol) parseHostPort(hostport string) (host string, port uint16, err error) {
	var after string
	if literal, found := strings.CutPrefix(hostport, "["); found {
		if literal, after, found = strings.Cut(literal, "]"); !found {
			return "", 0, errors.New("the bracket of the IPv6 address is not closed: " + p.usageIPv6())
		}
		// RFC 6874 writes the zone's % as %25; curl takes both.
		address, err := netip.ParseAddr(strings.Replace(literal, "%25", "%", 1))
		if err != nil || !address.Is6() || hasControl(literal) {
			return "", 0, errors.New("what stands in brackets is not an IPv6 address: " + p.usageIPv6())
		}
		host = address.String()
	} else {
		colon := strings.IndexByte(hostport, ':')
		if colon < 0 {
			colon = len(hostport)
		}
		host, after = hostport[:colon], hostport[colon:]
		if strings.Count(after, ":") > 1 {
			return "", 0, errors.New("more than one colon: " + p.usage() + ", and put an IPv6 address in brackets: " + p.usageIPv6())
		}
		if host == "" {
			return "", 0, errors.New("no host: " + p.usage())
		}
		if _, err := netip.ParseAddr(host); err != nil && !validName(host) {
			return "", 0, errors.New("the host is neither a DNS name nor an IP address: " + p.usage() + ", a name that is not ASCII in its xn-- form")
		}
	}
	if after == "" || after == ":" {
		return host, p.defaultPort(), nil
	}
	number, err := strconv.ParseUint(strings.TrimPrefix(after, ":"), 10, 16)
	if after[0] != ':' || err != nil || number == 0 {
		return "", 0, errors.New("the port is not a number from 1 to 65535: " + p.usage())
	}
	return host, uint16(number), nil
}

// hidden stands for what must not be shown.
const hidden = "***"

// redact returns a URL, however it is written, as it may be shown: scheme, host
// and port, and nothing that could be a user name or a password.
func redact(raw string) string {
	scheme, rest := cutScheme(raw)
	hasPath := strings.HasSuffix(strings.ToLower(scheme), onSocket)
	if scheme != "" {
		scheme += "://"
	}
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		scheme += hidden + "@"
		rest = rest[at+1:]
	}
	if hasPath && strings.HasPrefix(rest, "/") {
		return shorten(scheme + rest)
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
	return shorten(scheme + rest)
}

// shorten makes what is left of a URL fit for a log.
func shorten(shown string) string {
	const most = 300 // bytes; a host name has 253
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
