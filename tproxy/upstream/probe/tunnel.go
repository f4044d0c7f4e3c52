package probe

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// maxHead bounds what is read of an answer of HTTP.
const maxHead = 16 << 10 // bytes

// dial opens a tunnel. What the far side sent together with the proxy's answer is read
// first.
func (r *run) dial(ctx context.Context, to upstream.Target) (net.Conn, error) {
	conn, rest, err := r.Dialer.Tunnel(ctx, r.Proxy, to)
	if err != nil {
		return nil, err
	}
	if len(rest) == 0 {
		return conn, nil
	}
	return &prefixed{conn, io.MultiReader(strings.NewReader(string(rest)), conn)}, nil
}

// prefixed is a connection of which something was read before.
type prefixed struct {
	net.Conn
	reader io.Reader
}

func (c *prefixed) Read(p []byte) (int, error) { return c.reader.Read(p) }

// tunnel asks for a tunnel to a host, of which name is the name, and has the far side speak where its port tells how: there
// are proxies that answer 200 before they have looked.
func (r *run) tunnel(ctx context.Context, to upstream.Target, name string) result {
	conn, err := r.dial(ctx, to)
	if err != nil {
		return r.failed(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, speakLimit)
	defer cancel()
	defer interrupt(ctx, conn)()
	var said string
	switch to.Port {
	case portSSH:
		said, err = hearSSH(conn)
	case portHTTP:
		said, err = hearHTTP(conn, name)
	case portHTTPS, portDNSOverTLS:
		said, err = hearTLS(ctx, conn, name)
	default:
		return result{verdict: Yes, proof: "opened"}
	}
	if err != nil {
		return result{verdict: Unclear, proof: "opened, but at the far side: " + reason(err)}
	}
	return result{verdict: Yes, proof: said}
}

// hearSSH waits for the identification, which a server sends first (RFC 4253 section
// 4.2).
func hearSSH(conn net.Conn) (string, error) {
	const longest = 255 // bytes, by that section
	line, err := bufio.NewReader(io.LimitReader(conn, longest)).ReadString('\n')
	switch {
	case strings.HasPrefix(line, "SSH-"):
		return strings.TrimSpace(line), nil
	case err == nil:
		return "", fmt.Errorf("%.40q is not SSH", line)
	}
	return "", err
}

// hearHTTP sends a request, and wants an answer of HTTP, whatever it says.
func hearHTTP(conn net.Conn, host string) (string, error) {
	request := &http.Request{Method: http.MethodHead, URL: &url.URL{Scheme: "http", Host: host, Path: "/"}, Close: true, Header: anonymous()}
	if err := request.Write(conn); err != nil {
		return "", err
	}
	response, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxHead)), request)
	if err != nil {
		return "", err
	}
	response.Body.Close()
	return "the far side answers HTTP: " + status(response.StatusCode), nil
}

// anonymous is a header that does not say what software asks.
func anonymous() http.Header { return http.Header{"User-Agent": nil} }

// hearTLS shakes hands, whoever it is with. A refusal to do so is TLS as well.
func hearTLS(ctx context.Context, conn net.Conn, host string) (string, error) {
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: host}) // nothing follows; who it is, inspect asks
	if err := client.HandshakeContext(ctx); alerted(err) {
		return "the far side speaks TLS: " + reason(err), nil
	} else if err != nil {
		return "", err
	}
	return "the far side speaks " + tls.VersionName(client.ConnectionState().Version), nil
}

// absolute asks for a page without a tunnel.
func (r *run) absolute(ctx context.Context) result {
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	lease, err := r.Proxy.Acquire(ctx)
	if err != nil {
		return r.failed(err)
	}
	response, err := r.get(ctx, conn, lease.Authorization())
	if err != nil {
		lease.Settle(err)
		return r.failed(err)
	}
	var challenges [][]byte
	for _, value := range response.Header["Proxy-Authenticate"] {
		challenges = append(challenges, []byte(value))
	}
	if err := lease.Judge(response.StatusCode, nil, challenges); err != nil {
		return r.failed(err)
	}
	answer := status(response.StatusCode)
	if code := response.StatusCode; code >= http.StatusBadRequest && code != http.StatusNotFound {
		return r.refused(&upstream.RefusedError{Code: code})
	}
	if elsewhere, err := response.Location(); err == nil && !within(elsewhere.Hostname(), r.Host) {
		return result{Unclear, answer + " to " + clean(elsewhere.Hostname()) + ": a log-in page?", response.StatusCode}
	}
	return result{verdict: Yes, proof: answer}
}

// within reports whether one host is another or below it.
func within(host, of string) bool {
	host, of = strings.ToLower(host), strings.ToLower(of)
	return host == of || strings.HasSuffix(host, "."+of)
}

// get sends the request in absolute form and reads the head of the answer.
func (r *run) get(ctx context.Context, conn net.Conn, authorization string) (*http.Response, error) {
	defer interrupt(ctx, conn)()
	request := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: r.Host, Path: "/"}, Close: true,
		Header: anonymous(),
	}
	if authorization != "" {
		request.Header.Set("Proxy-Authorization", authorization)
	}
	if err := request.WriteProxy(conn); err != nil {
		return nil, err
	}
	reader := bufio.NewReader(io.LimitReader(conn, maxHead))
	const most = 5 // interim answers (RFC 9110 section 15.2), as in net/http
	for range most {
		response, err := http.ReadResponse(reader, request)
		if err != nil {
			return nil, err
		}
		if response.StatusCode >= http.StatusOK {
			response.Body.Close()
			return response, nil
		}
	}
	return nil, fmt.Errorf("more than %d interim (1xx) answers", most)
}

// associate asks a SOCKS5 proxy that wants no password to relay datagrams (RFC 1928
// sections 4 and 7).
func (r *run) associate(ctx context.Context) result {
	if r.demands {
		return result{verdict: Skipped, proof: "not asked, as the proxy wants a password"}
	}
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return lost(err)
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	const greeting, request = "\x05\x01\x00", "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00" // for datagrams from any address and port
	var chosen, reply [2]byte
	err = exchange(conn, greeting, chosen[:])
	if err == nil && chosen != [2]byte{5, 0} {
		return result{No, "it wants a password now", int(chosen[1])}
	}
	if err == nil {
		err = exchange(conn, request, reply[:])
	}
	switch {
	case err != nil:
		return lost(err)
	case reply[0] != 5:
		return result{verdict: No, proof: "the answer is not SOCKS5"}
	case reply[1] != 0:
		return result{No, fmt.Sprintf("refused with reply %d", reply[1]), int(reply[1])}
	}
	return result{verdict: Yes, proof: "granted"}
}

// exchange sends a question and waits for the whole answer.
func exchange(conn net.Conn, question string, answer []byte) error {
	if _, err := io.WriteString(conn, question); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, answer)
	return err
}

// rest leaves a tunnel alone for a while, with TLS on it, because servers soon close
// connections on which nothing was ever said, and then wants an answer.
func (r *run) rest(ctx context.Context) result {
	raw, err := r.dial(ctx, r.first())
	if err != nil {
		return r.failed(err)
	}
	defer raw.Close()
	defer interrupt(ctx, raw)()
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: r.Host}) // nothing secret is said
	if err := conn.HandshakeContext(ctx); err != nil {
		return result{verdict: Unclear, proof: "opened, but at the far side: " + reason(err)}
	}
	start := time.Now()
	conn.SetReadDeadline(start.Add(r.Config.Idle))
	// What servers say unasked does not count: session tickets, the settings of HTTP/2.
	if _, err := io.Copy(io.Discard, io.LimitReader(conn, maxHead)); !late(err) {
		return result{verdict: No, proof: fmt.Sprintf("closed after %s at rest, by the proxy or by the host", time.Since(start).Round(100*time.Millisecond))}
	}
	conn.SetDeadline(time.Now().Add(speakLimit))
	if _, err := hearHTTP(conn, r.Host); err != nil {
		return result{verdict: Unclear, proof: fmt.Sprintf("open after %s at rest, but the host does not answer HTTP: %s", r.Config.Idle, reason(err))}
	}
	return result{verdict: Yes, proof: fmt.Sprintf("longer than %s: the host answers still", r.Config.Idle)}
}
