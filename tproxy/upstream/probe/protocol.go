package probe

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// scheme is that of the proxy's URL.
func (r *run) scheme() string {
	scheme, _, _ := strings.Cut(r.Proxy.String(), "://")
	return strings.ToUpper(scheme)
}

// first is the target that is asked for first.
func (r *run) first() upstream.Target { return upstream.Target{Host: r.Host, Port: portHTTPS} }

// reach connects to the proxy.
func (r *run) reach(ctx context.Context) result {
	start := time.Now()
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return result{verdict: No, proof: reason(err)}
	}
	defer conn.Close()
	return result{verdict: Yes, proof: fmt.Sprintf("%s in %s", conn.RemoteAddr(), brief(time.Since(start)))}
}

// brief is a time with as many digits as anybody reads.
func brief(d time.Duration) time.Duration {
	if d < time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(100 * time.Microsecond)
}

// recorder keeps what is read, as much as a Handshake takes.
type recorder struct {
	net.Conn
	read []byte
}

func (c *recorder) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read = append(c.read, p[:n]...)
	return n, err
}

// speaks has the proxy asked for a tunnel without the credential, which shows its
// protocol and whom it lets in.
func (r *run) speaks(ctx context.Context) result {
	asked, cancel := context.WithTimeout(ctx, askLimit-identifyLimit)
	defer cancel()
	conn, err := r.Dialer.Connect(asked, r.Proxy)
	if err != nil {
		return result{verdict: No, proof: reason(err)}
	}
	defer conn.Close()
	defer interrupt(asked, conn)()
	handshake, err := r.Proxy.Anonymous().Handshake(r.first(), nil)
	if err != nil {
		return result{verdict: No, proof: reason(err)}
	}
	recorded := &recorder{Conn: conn}
	_, err = upstream.Drive(recorded, handshake)
	refused, answered := errors.AsType[*upstream.RefusedError](err)
	switch {
	case err == nil:
		r.open = true
	case answered && r.Proxy.PlainHTTP():
		r.demands = refused.Code == http.StatusProxyAuthRequired
		r.report.Schemes = append(r.report.Schemes, refused.Schemes...)
	case answered:
		const noMethod = 0xff // RFC 1928 section 3
		r.demands = refused.Code == noMethod
	default:
		return result{verdict: No, proof: r.identify(ctx, recorded.read, err)}
	}
	return result{verdict: Yes, proof: r.banner(recorded.read, refused)}
}

// interrupt has a connection's reads and writes fail when ctx is done, until the
// function that it returns is called.
func interrupt(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
}

// banner is what a proxy says about itself.
func (r *run) banner(head []byte, refused *upstream.RefusedError) string {
	if !r.Proxy.PlainHTTP() {
		if r.demands {
			return r.wanted()
		}
		return "it asks for no password"
	}
	said := []string{"CONNECT without a password: 2xx"}
	if refused != nil {
		said[0] = "CONNECT without a password: " + strconv.Itoa(refused.Code)
	}
	reader := textproto.NewReader(bufio.NewReader(bytes.NewReader(head)))
	if _, err := reader.ReadLine(); err != nil {
		return said[0]
	}
	fields, _ := reader.ReadMIMEHeader() // as far as it goes
	for _, name := range []string{"Server", "Via", "Proxy-Agent"} {
		if value := fields.Get(name); value != "" {
			const most = 60 // characters of each
			value = clean(value)
			said = append(said, name+": "+value[:min(len(value), most)])
		}
	}
	return strings.Join(said, "; ")
}

// identify says what is at the proxy's address when it is not what its URL says: by
// what it has sent, and by asking in the other protocols.
func (r *run) identify(ctx context.Context, read []byte, failure error) string {
	ctx, cancel := context.WithTimeout(ctx, identifyLimit)
	defer cancel()
	var found [3]string
	var asking sync.WaitGroup
	asks := []func(context.Context) string{r.isHTTP, r.isSOCKS5, r.isTLS}
	if r.scheme() == "HTTPS" {
		asks = nil // within TLS there is nothing else to be expected
	}
	for i, ask := range asks {
		asking.Go(func() { found[i] = ask(ctx) })
	}
	asking.Wait()
	for _, found := range found {
		if found != "" {
			return "it does not, but " + found
		}
	}
	if len(read) > 0 {
		const most = 40 // bytes
		return fmt.Sprintf("it says %q", read[:min(len(read), most)])
	}
	return reason(failure)
}

// hear sends a question to the proxy's address and returns the first bytes of the
// answer, at least least of them, or nil.
func (r *run) hear(ctx context.Context, question string, least int) []byte {
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return nil
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	if _, err := io.WriteString(conn, question); err != nil {
		return nil
	}
	answer := make([]byte, least)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return nil
	}
	return answer
}

func (r *run) isHTTP(ctx context.Context) string {
	const protocol = "HTTP/1."
	if r.Proxy.PlainHTTP() || string(r.hear(ctx, "OPTIONS * HTTP/1.1\r\nHost: "+r.Host+"\r\nConnection: close\r\n\r\n", len(protocol))) != protocol {
		return ""
	}
	return "HTTP is answered there: try the same with http:// in front"
}

// isSOCKS5 offers to go without authentication and with a password (RFC 1928 section 3),
// which is not sent.
func (r *run) isSOCKS5(ctx context.Context) string {
	answer := r.hear(ctx, "\x05\x02\x00\x02", 2)
	if !r.Proxy.PlainHTTP() || len(answer) != 2 || answer[0] != 5 {
		return ""
	}
	return "SOCKS5 is answered there: try the same with socks5:// in front"
}

func (r *run) isTLS(ctx context.Context) string {
	conn, err := r.Dialer.Connect(ctx, r.Proxy)
	if err != nil {
		return ""
	}
	defer conn.Close()
	defer interrupt(ctx, conn)()
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true}) // nothing is told to whoever it is
	err = client.HandshakeContext(ctx)
	if err != nil && !alerted(err) {
		return ""
	}
	return "TLS is answered there: try the same with https:// in front"
}

// authenticate asks for a tunnel with the credential. It is alone in doing so.
func (r *run) authenticate(ctx context.Context) result {
	lease, settled := r.Proxy.Standing()
	given := !settled || lease != nil
	if r.demands && !given {
		return result{verdict: No, proof: r.wanted() + ", and none was given"}
	}
	if !given {
		return result{verdict: Yes, proof: "no credential is asked for"}
	}
	conn, _, err := r.Dialer.Tunnel(ctx, r.Proxy, r.first())
	if err == nil {
		conn.Close()
	}
	lease, settled = r.Proxy.Standing()
	_, answered := errors.AsType[*upstream.RefusedError](err)
	switch {
	case settled && lease == nil:
		return result{verdict: Yes, proof: "the credential is not asked for"}
	case settled && r.open:
		return result{verdict: Yes, proof: "it lets in without the credential as well"}
	case settled:
		return result{verdict: Yes, proof: r.wanted() + ", and accepts those given"}
	case answered && !upstream.Denied(err) && r.demands:
		// The same without the credential was answered 407.
		return result{verdict: Yes, proof: r.wanted() + ", and accepts those given"}
	case answered && !upstream.Denied(err):
		return result{verdict: Yes, proof: "the credential was not asked for so far"}
	}
	return r.failed(err)
}

// wanted says by what the proxy wants to be convinced.
func (r *run) wanted() string {
	if len(r.report.Schemes) > 0 {
		return "it wants user name and password (" + strings.Join(r.report.Schemes, ", ") + ")"
	}
	return "it wants user name and password"
}

// refusal says that those that were sent are wrong.
func (r *run) refusal() string {
	return r.wanted() + ", and refuses those given: correct them before anything else is tried"
}
