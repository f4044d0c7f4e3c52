package exchange

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

const (
	// mediaType is that of a DNS message (RFC 8484 section 6).
	mediaType = "application/dns-message"

	// maxHeader bounds the header of an answer. Those of public servers have less
	// than 1 KiB.
	maxHeader = 16 << 10 // bytes
)

// NewHTTPS returns a server that is asked over HTTPS (RFC 8484) by POST: over
// HTTP/2 if it speaks that, else, one question at a time on each connection, over
// HTTP/1.1, as what proxies that look into TLS speak. endpoint is an https URL;
// dial returns the connection without TLS. The name that the certificate must have
// is that of the endpoint unless tlsConfig.ServerName says another. Neither
// endpoint nor tlsConfig is changed, tlsConfig may be nil.
//
// The server's name is the endpoint without its path, which identifies the
// customer at some services.
func NewHTTPS(endpoint *url.URL, dial Dial, tlsConfig *tls.Config, config Config) Server {
	tlsConfig = clientTLS(tlsConfig, "h2", "http/1.1")
	tlsConfig.ServerName = cmp.Or(tlsConfig.ServerName, endpoint.Hostname())
	opener := &httpsOpener{
		url:       *endpoint,
		authority: net.JoinHostPort(endpoint.Hostname(), cmp.Or(endpoint.Port(), "443")),
		dial:      dial,
		tls:       tlsConfig,
		// RFC 8484 section 5.1: a User-Agent would tell more than a DNS query does.
		header: http.Header{"Accept": {mediaType}, "Content-Type": {mediaType}, "User-Agent": nil},
	}
	opener.url.Scheme, opener.url.User, opener.url.Fragment = "https", nil, ""
	return newPool("https://"+endpoint.Host, opener.open, config)
}

// httpsOpener opens the connections of one pool.
type httpsOpener struct {
	url       url.URL
	authority string      // host and port
	header    http.Header // of all requests; not changed
	dial      Dial
	tls       *tls.Config
}

func (o *httpsOpener) open(ctx context.Context) (link, error) {
	l := &httpsLink{opener: o, cancels: make(map[uint16]context.CancelFunc), ended: make(chan struct{})}
	transport := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			raw, conn, err := dialTLS(ctx, o.dial, o.tls)
			if err != nil {
				return nil, err
			}
			l.raw, l.serial = raw, conn.ConnectionState().NegotiatedProtocol != "h2"
			return conn, nil
		},
		Protocols:              new(http.Protocols),
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
		HTTP2:                  &http.HTTP2Config{WriteByteTimeout: frameLimit},
	}
	transport.Protocols.SetHTTP1(true)
	transport.Protocols.SetHTTP2(true)
	conn, err := transport.NewClientConn(ctx, "https", o.authority)
	if err != nil {
		if l.raw != nil {
			l.raw.Close()
		}
		return nil, err
	}
	l.conn = conn
	return l, nil
}

// httpsLink is the link of HTTP requests. Each has a goroutine.
type httpsLink struct {
	opener *httpsOpener
	conn   *http.ClientConn
	raw    net.Conn // under the TLS
	serial bool     // HTTP/1.1

	requests sync.WaitGroup
	cancels  map[uint16]context.CancelFunc // of requests; guarded by the pool
	once     sync.Once
	ended    chan struct{} // closed when the connection is
}

func (l *httpsLink) room() bool { return l.conn.Available() > 0 }

func (l *httpsLink) send(c *connection, id uint16, query []byte) {
	// The context ends by giveUp at the latest, after the pool's time-out.
	ctx, cancel := context.WithCancel(context.Background())
	l.cancels[id] = cancel
	query = bytes.Clone(query)
	query[0], query[1] = 0, 0 // RFC 8484 section 4.1, for the sake of caches
	reserved := l.conn.Reserve()
	l.requests.Go(func() {
		defer cancel()
		answer, err := []byte(nil), reserved
		if err == nil {
			answer, err = l.ask(ctx, query)
		}
		c.told(id, answer, err)
	})
}

// giveUp ends a request.
func (l *httpsLink) giveUp(id uint16) {
	if cancel := l.cancels[id]; cancel != nil {
		cancel()
		delete(l.cancels, id)
	}
}

// partial: an answer that stops in the middle does not hold up others.
func (l *httpsLink) partial() (int, time.Time, bool) { return 0, time.Time{}, false }

func (l *httpsLink) check(time.Time) error { return nil }

func (l *httpsLink) close() { l.raw.Close() }

func (l *httpsLink) serve(c *connection) error {
	defer l.conn.Close()
	defer l.raw.Close()
	c.pool.mutex.Lock()
	c.pool.serial = l.serial
	c.pool.mutex.Unlock()
	// The hook is called under the pool's mutex as well, by Reserve.
	l.conn.SetStateHook(func(conn *http.ClientConn) {
		if conn.Err() != nil {
			l.once.Do(func() { close(l.ended) })
		}
		c.pool.wake()
	})
	<-l.ended
	return l.conn.Err()
}

func (l *httpsLink) wait() { l.requests.Wait() }

// answerError is an HTTP answer that is none to the question. The connection is in
// order.
type answerError struct{ error }

func answerErrorf(format string, arguments ...any) error {
	return answerError{fmt.Errorf(format, arguments...)}
}

// ask sends one request and reads the answer to it.
func (l *httpsLink) ask(ctx context.Context, query []byte) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "", bytes.NewReader(query))
	if err != nil {
		l.conn.Release()
		return nil, err
	}
	request.URL, request.Host, request.Header = &l.opener.url, l.opener.url.Host, l.opener.header
	response, err := l.conn.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return readHTTP(response, query)
}

// readHTTP returns the DNS message in a response if it is an answer to query.
func readHTTP(response *http.Response, query []byte) ([]byte, error) {
	if response.StatusCode != http.StatusOK {
		return nil, answerErrorf("HTTP status %d", response.StatusCode)
	}
	declared := response.Header.Get("Content-Type")
	if media, _, err := mime.ParseMediaType(declared); err != nil || media != mediaType {
		return nil, answerErrorf("the content type is %.80q, not %s", declared, mediaType)
	}
	if response.ContentLength > maxMessage {
		return nil, answerErrorf("the answer has %d bytes, more than a DNS message", response.ContentLength)
	}
	answer, err := io.ReadAll(io.LimitReader(response.Body, maxMessage+1))
	switch {
	case err != nil:
		return nil, err
	case len(answer) > maxMessage:
		return nil, answerErrorf("the answer has more than %d bytes", maxMessage)
	case len(answer) < headerSize:
		return nil, answerError{errMalformed}
	}
	end, err := checkQuery(query)
	if err != nil {
		return nil, err
	}
	if bareError(answer, query) {
		answer = withQuestion(answer, query, end)
	}
	if answer[0] != query[0] || answer[1] != query[1] || !answers(answer, query, end) {
		return nil, answerError{errMismatch}
	}
	if last, err := walk(answer, end, nil); err != nil || last != len(answer) {
		return nil, answerError{errMalformed}
	}
	// RFC 8484 section 5.1: the time in a cache on the way counts.
	if seconds, err := strconv.ParseUint(response.Header.Get("Age"), 10, 32); err == nil && seconds > 0 {
		age(answer, end, uint32(seconds))
	}
	return answer, nil
}

var errMismatch = errors.New("the answer is one to another question")
