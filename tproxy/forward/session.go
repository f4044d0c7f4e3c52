package forward

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// keepAlive is how long a client may take until its next request; squid's
	// client_idle_pconn_timeout.
	keepAlive = 2 * time.Minute
	// headTime is how long a head may take from its first byte; Apache gives 40 s.
	headTime = 30 * time.Second
	// look is how often a running exchange is looked at: is the client still there,
	// does anything move?
	look = 15 * time.Second
)

// Why an exchange was ended before its time.
var (
	errIdle = errors.New("idle limit")
	errGone = errors.New("the client has reset the connection")
)

// Session is one client's connection.
type Session struct {
	server *Server
	who    Client
	client stream
	kept   *hop // for the next request; only if others must not have it

	mutex    sync.Mutex
	waiting  bool        // for a request
	running  bool        // an exchange, which the watchdog looks after
	draining bool        // takes no further request
	next     *hop        // of the running exchange, once it is connected
	cause    error       // why it was aborted
	watchdog *time.Timer // nil before the first exchange
	moved    int64       // bytes, at the watchdog's last look
	still    time.Duration
}

// Serve carries requests until either side ends the connection, and closes it. When ctx
// is done the client is reset.
func (t *Session) Serve(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { t.abort(context.Cause(ctx)) })
	t.serve(ctx)
	stop()
	t.close()
}

// Refuse answers the client's first request, whatever it is, with 403 (Forbidden), and
// closes the connection.
func (t *Session) Refuse(reason error) {
	t.refuse(problem{
		403, "http_request_denied", "this client may not use the gateway as its proxy",
		"Have the gateway's administrator allow its address (--explicit-allow).", reason,
	})
	t.close()
}

// Drain lets the session end with the exchange that is running, at once if there is
// none. It may be called at any time, from any goroutine.
func (t *Session) Drain() {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.draining = true
	if t.waiting {
		t.client.conn.SetReadDeadline(past)
	}
}

func (t *Session) close() {
	if t.kept != nil {
		t.kept.close()
	}
	t.client.release()
	t.client.conn.Close()
}

// serve carries requests until the connection ends.
func (t *Session) serve(ctx context.Context) {
	for {
		head, err := t.head()
		if err != nil {
			t.hangUp(err)
			return
		}
		switch t.exchange(ctx, head) {
		case closed:
			return
		case orderly:
			t.client.conn.SetLinger(-1)
			return
		case lingering:
			linger(t.client.conn)
			return
		}
	}
}

// head waits for that of the next request.
func (t *Session) head() ([]byte, error) {
	if len(t.client.buffered()) == 0 {
		if !t.wait() {
			return nil, io.EOF
		}
		err := t.client.fill()
		t.mutex.Lock()
		t.waiting = false
		t.mutex.Unlock()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = io.EOF // nothing is lost
		}
		if err != nil {
			return nil, err
		}
	}
	// An empty line before a request is ignored (RFC 9112 section 2.2).
	if text := t.client.buffered(); len(text) >= 2 && text[0] == '\r' && text[1] == '\n' {
		t.client.skip(2)
	}
	t.limit(time.Now().Add(headTime))
	head, err := t.client.head()
	t.limit(time.Time{})
	return head, err
}

// wait is the begin of waiting for a request, which must not be while the server drains.
func (t *Session) wait() (allowed bool) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.draining {
		return false
	}
	t.waiting = true
	t.client.conn.SetReadDeadline(time.Now().Add(keepAlive))
	return true
}

// limit sets until when the client may be read, but for a session that is aborted.
func (t *Session) limit(deadline time.Time) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.cause == nil {
		t.client.conn.SetReadDeadline(deadline)
	}
}

// hangUp ends a connection on which no whole head came.
func (t *Session) hangUp(err error) {
	switch {
	case errors.Is(err, io.EOF):
		t.client.conn.SetLinger(-1)
		return
	case errors.Is(err, errHeadTooLong):
		t.refuse(problem{431, "http_request_error", "the request cannot be read", "Send fewer or shorter fields, cookies for example.", err})
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.refuse(problem{408, "http_request_error", "the request did not arrive in time", "Send it again.", nil})
	case errors.Is(err, io.ErrUnexpectedEOF):
		t.refuse(problem{400, "http_request_error", "the request ends within its head", "Send it again.", nil})
	}
}

// refuse answers what could not be read as a request.
func (t *Session) refuse(p problem) {
	t.client.conn.SetWriteDeadline(time.Now().Add(lingerTime))
	t.client.conn.Write(p.page(""))
	t.server.config.Record(Record{Client: t.who, Status: p.status, Err: errors.Join(errors.New(p.what), p.err)})
	linger(t.client.conn)
}

// sayTime is how long a client may take to read words of the gateway's own, which are a few
// hundred bytes: longer than the kernel tries to get through to one that is away for a moment.
const sayTime = 30 * time.Second

// say sends words of the gateway's own.
func (t *Session) say(words []byte) error {
	t.limitWrite(time.Now().Add(sayTime))
	_, err := t.client.conn.Write(words)
	t.limitWrite(time.Time{})
	return err
}

// limitWrite sets until when the client may be written to, but for a session that is aborted.
func (t *Session) limitWrite(deadline time.Time) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.cause == nil {
		t.client.conn.SetWriteDeadline(deadline)
	}
}

func (t *Session) isDraining() bool {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return t.draining
}

// past is a deadline that interrupts whatever waits.
var past = time.Unix(1, 0)

// abort ends the running exchange; the first cause is the one that is told.
func (t *Session) abort(cause error) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.draining = true
	if t.cause == nil {
		t.cause = cause
	}
	t.client.conn.SetDeadline(past)
	if t.next != nil {
		t.next.conn.SetDeadline(past)
	}
}

// aborted returns why the exchange was aborted, or err if it was not.
func (t *Session) aborted(err error) error {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if t.cause != nil {
		return t.cause
	}
	return err
}

// use makes a connection the one that abort interrupts.
func (t *Session) use(h *hop) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.next = h
	if t.cause != nil && h != nil {
		h.conn.SetDeadline(past)
	}
}

// watch starts to look after an exchange, and unwatch ends that.
func (t *Session) watch() {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.still, t.running = 0, true
	if t.watchdog == nil {
		t.watchdog = time.AfterFunc(t.server.interval(), t.look)
	} else {
		t.watchdog.Reset(t.server.interval())
	}
}

func (t *Session) unwatch() {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.next, t.running = nil, false
	t.watchdog.Stop()
}

// look aborts an exchange whose client is gone or in which nothing moves.
func (t *Session) look() {
	if cause := t.trouble(); cause != nil {
		t.abort(cause)
	}
}

func (t *Session) trouble() error {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if !t.running {
		return nil // it has ended meanwhile
	}
	moved, gone := upstream.Look(t.client.conn)
	if t.next != nil {
		next, _ := upstream.Look(t.next.conn)
		moved += next
	}
	if t.still += t.server.interval(); moved != t.moved {
		t.moved, t.still = moved, 0
	}
	switch {
	case gone:
		return errGone
	case t.still >= t.server.config.IdleTimeout:
		return errIdle
	}
	t.watchdog.Reset(t.server.interval())
	return nil
}

// interval is the time between two looks at an exchange.
func (s *Server) interval() time.Duration { return min(look, s.config.IdleTimeout) }

const (
	// lingerTime is how long a client may take to read a last answer, while what it
	// still sends is thrown away; nginx's lingering_timeout is 5 s.
	lingerTime = 2 * time.Second
	// lingerBytes bounds what is thrown away.
	lingerBytes = 1 << 20
)

// linger ends a connection whose client may still be sending: a close with unread
// bytes would be a reset, and that can overtake the answer (RFC 9112 section 9.6).
func linger(conn upstream.Conn) {
	conn.SetLinger(-1)
	conn.CloseWrite()
	conn.SetReadDeadline(time.Now().Add(lingerTime))
	io.CopyN(io.Discard, conn, lingerBytes)
}
