package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// onSocket ends the scheme of a proxy that listens on a unix socket of this host, as in
// http+unix:///run/proxy.sock.
const onSocket = "+unix"

// maxSocketPath is the longest path that a unix socket's address holds: 108 bytes with the
// zero at the end (unix(7)).
const maxSocketPath = 107 // bytes

// A socket whose queue of connections is full refuses at once, where TCP would send its SYN
// again: it is tried again after pauses that grow from the first to the last of these. The
// first is of the order of what a busy proxy takes to accept.
const (
	firstQueuePause = time.Millisecond
	lastQueuePause  = 50 * time.Millisecond
)

// local is a connection to a proxy on a unix socket as a Conn.
//
// There is no reset on such a socket. An abort is an end of both directions at once, which
// the proxy sees at its next write, and what the proxy aborts looks like an end, unless it
// has left something unread (ECONNRESET).
type local struct{ *net.UnixConn }

// SetLinger does nothing: see local.
func (local) SetLinger(int) error { return nil }

// cutSocket splits what the scheme of a URL says about a unix socket off it. The rest of the
// URL is for the form that some programs take, unix:/run/proxy.sock.
func cutSocket(scheme, rest string) (protocol string, found bool, err error) {
	if scheme = strings.ToLower(scheme); scheme == "" && strings.HasPrefix(rest, "unix:/") {
		scheme = "unix"
	}
	protocol, found = strings.CutSuffix(scheme, onSocket)
	switch protocol {
	case "http", "socks5", "socks5h", "socks4a":
		return protocol, found, nil
	case "unix":
		found = true
	}
	if found {
		return "", true, errors.New("of a proxy on a unix socket the URL says what it speaks as well: use http+unix:///run/proxy.sock, or socks5+unix or socks4a+unix in its place")
	}
	return scheme, false, nil
}

// locateSocket is locate for a unix socket.
func (p *Proxy) locateSocket(rest string) (err error) {
	if p.socket, err = parseSocket(rest); err != nil {
		return err
	}
	escaped := (&url.URL{Path: p.socket}).EscapedPath()
	p.url = string(p.protocol) + onSocket + "://" + strings.NewReplacer(",", "%2C", "@", "%40").Replace(escaped)
	return nil
}

// parseSocket reads the path of a unix socket, as it stands in a URL. A comma would be the
// end of it in a list of proxies.
func parseSocket(path string) (string, error) {
	const use = "use http+unix:///run/proxy.sock"
	for i := range len(path) {
		if c := path[i]; !isAlphanumeric(c) && !strings.ContainsRune("/-._~!$&'()*+;=:%", rune(c)) {
			return "", errors.New("percent-encode special characters of the socket's path: a comma as %2C, @ as %40, % as %25, a space as %20")
		}
	}
	decoded, err := url.PathUnescape(path)
	switch {
	case err != nil:
		return "", errors.New("a % in the socket's path is not followed by two hexadecimal digits: write % as %25")
	case !strings.HasPrefix(decoded, "/"):
		return "", errors.New("the socket's path does not begin with a slash: " + use)
	case strings.HasSuffix(decoded, "/"):
		return "", errors.New("the socket's path ends with a slash: " + use)
	case hasControl(decoded):
		return "", errors.New("control characters in the socket's path: remove them (%00 to %1F, %7F)")
	case len(decoded) > maxSocketPath:
		return "", fmt.Errorf("the socket's path is longer than %d bytes, which is all that the kernel takes (unix(7)): use a shorter one", maxSocketPath)
	}
	return decoded, nil
}

// dialSocket connects to a proxy on a unix socket. It needs no mark and no source address,
// for no packet is sent.
func (d *Dialer) dialSocket(ctx context.Context, path string) (Conn, error) {
	for pause := firstQueuePause; ; pause = min(2*pause, lastQueuePause) {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		switch {
		case err == nil:
			return local{conn.(*net.UnixConn)}, nil
		case !errors.Is(err, syscall.EAGAIN):
			return nil, adviseSocket(err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: it does not accept the connections that wait (%w)", err, ctx.Err())
		}
	}
}

// adviseSocket says what to do about a unix socket that cannot be connected to.
func adviseSocket(err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%w: is the proxy running, and is that the socket's path?", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nobody listens there: is the proxy running?", err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: let this program's user write to the socket, and search the directories above it", err)
	}
	return err
}
