package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// stream is a tunnel that is one of the streams of an HTTP/2 connection (RFC 9113 section
// 8.5). Its two directions end by END_STREAM, and an abort is RST_STREAM. It is a Conn but
// for this: once a deadline has passed it is of no use any more.
type stream struct {
	connection net.Conn // of all streams
	toProxy    *io.PipeWriter
	fromProxy  io.ReadCloser
	cancel     context.CancelCauseFunc
	moved      atomic.Int64
	abort      atomic.Bool

	mutex sync.Mutex
	timer *time.Timer // of the deadline; nil for none
	late  bool        // it has passed
}

// errAborted is why a stream was reset from here.
var errAborted = errors.New("the flow was aborted")

// openStream asks for a tunnel on a connection, on which a place is reserved. If the proxy
// does not open it, its answer is returned in place of the stream; the body is closed.
func openStream(ctx context.Context, client *http.ClientConn, connection net.Conn, authority, authorization string) (*stream, *http.Response, error) {
	fromClient, toProxy := io.Pipe()
	// The life of the request is that of the tunnel: ctx bounds the wait for the answer only.
	life, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	header := http.Header{"User-Agent": {""}} // which sends none
	if authorization != "" {
		header.Set("Proxy-Authorization", authorization)
	}
	request := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Host: authority}, Host: authority,
		Header: header, Body: fromClient, ContentLength: -1,
	}).WithContext(life)
	response, err := client.RoundTrip(request)
	if !stop() && err == nil {
		response.Body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		cancel(err)
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, err
	}
	if response.StatusCode/100 != 2 {
		cancel(errAborted)
		response.Body.Close()
		return nil, response, nil
	}
	return &stream{connection: connection, toProxy: toProxy, fromProxy: response.Body, cancel: cancel}, nil, nil
}

// Read reads what the far side of the tunnel sends.
func (s *stream) Read(p []byte) (n int, err error) {
	n, err = s.fromProxy.Read(p)
	s.moved.Add(int64(n))
	return n, s.cause(err)
}

// Write sends to the far side of the tunnel.
func (s *stream) Write(p []byte) (n int, err error) {
	n, err = s.toProxy.Write(p)
	s.moved.Add(int64(n))
	return n, s.cause(err)
}

// cause is what net.Conn calls the error of a deadline.
func (s *stream) cause(err error) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err != nil && err != io.EOF && s.late {
		return os.ErrDeadlineExceeded
	}
	return err
}

// CloseWrite ends what this side sends.
func (s *stream) CloseWrite() error { return s.toProxy.Close() }

// SetLinger with 0 makes Close an abort, with a negative number an orderly end.
func (s *stream) SetLinger(seconds int) error {
	s.abort.Store(seconds == 0)
	return nil
}

// Close gives the stream up. What the far side has not said yet is not waited for.
func (s *stream) Close() error {
	s.SetDeadline(time.Time{})
	if s.abort.Load() {
		s.cancel(errAborted)
	} else {
		s.toProxy.Close()
	}
	err := s.fromProxy.Close()
	s.cancel(nil)
	return err
}

// LocalAddr is that of the connection.
func (s *stream) LocalAddr() net.Addr { return s.connection.LocalAddr() }

// RemoteAddr is that of the connection: the proxy's.
func (s *stream) RemoteAddr() net.Addr { return s.connection.RemoteAddr() }

// SetDeadline has the stream reset at a time; the zero time takes that back.
func (s *stream) SetDeadline(at time.Time) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
	if at.IsZero() {
		return nil
	}
	var timer *time.Timer
	timer = time.AfterFunc(time.Until(at), func() {
		s.mutex.Lock()
		current := s.timer == timer
		s.late = s.late || current
		s.mutex.Unlock()
		if current {
			// While package http waits for more of the body it does not look at the context.
			s.toProxy.CloseWithError(os.ErrDeadlineExceeded)
			s.cancel(os.ErrDeadlineExceeded)
		}
	})
	s.timer = timer
	return nil
}

// SetReadDeadline is SetDeadline: a stream that is not read in time is not written either.
func (s *stream) SetReadDeadline(at time.Time) error { return s.SetDeadline(at) }

// SetWriteDeadline is SetDeadline.
func (s *stream) SetWriteDeadline(at time.Time) error { return s.SetDeadline(at) }
