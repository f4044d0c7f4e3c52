package probe

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
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
	var response *http.Response
	var err error
	for range 1 + upstream.MaxReconnects {
		if response, err = r.page(ctx); !errors.Is(err, upstream.ErrReconnect) {
			break
		}
	}
	if err != nil {
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

// page asks for it on a connection of its own, and again for each question of the proxy
// about who asks. The body of the answer is closed.
func (r *run) page(ctx context.Context) (*http.Response, error) {
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	lease, err := r.Proxy.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	var login upstream.Requests
	login.Begin(r.Proxy, lease, conn)
	reader := bufio.NewReader(io.LimitReader(conn, 4*maxHead))
	for {
		response, err := r.get(conn, reader, &login)
		if err != nil {
			lease.Settle(err)
			return nil, err
		}
		var challenges [][]byte
		for _, value := range response.Header["Proxy-Authenticate"] {
			challenges = append(challenges, []byte(value))
		}
		again, err := login.Judge(response.StatusCode, nil, challenges)
		if err != nil || !again {
			response.Body.Close()
			return response, err
		}
		_, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if err != nil || response.Close {
			return nil, upstream.ErrReconnect
		}
	}
}

// get sends the request in absolute form and reads the head of the answer.
func (r *run) get(conn net.Conn, reader *bufio.Reader, login *upstream.Requests) (*http.Response, error) {
	request := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: r.Host, Path: "/"},
		Header: anonymous(),
	}
	if proof := login.Authorization(request.Method, []byte(request.URL.String())); proof != "" {
		request.Header.Set("Proxy-Authorization", proof)
	}
	if err := request.WriteProxy(conn); err != nil {
		return nil, err
	}
	const most = 5 // interim answers (RFC 9110 section 15.2), as in net/http
	for range most {
		response, err := http.ReadResponse(reader, request)
		if err != nil || response.StatusCode >= http.StatusOK {
			return response, err
		}
	}
	return nil, fmt.Errorf("more than %d interim (1xx) answers", most)
}

// associate asks a SOCKS5 proxy to relay datagrams (RFC 1928 sections 4 and 7).
func (r *run) associate(ctx context.Context) result {
	association, err := r.Dialer.Associate(ctx, r.Proxy)
	if err != nil {
		return r.failed(err)
	}
	association.Conn.Close()
	return result{verdict: Yes, proof: "granted"}
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
