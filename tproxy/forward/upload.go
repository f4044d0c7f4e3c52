package forward

import (
	"errors"
	"time"
)

// upload is a request's body on its way while the answer may already come.
type upload struct {
	ended chan struct{}
	sent  int64 // to be read once ended is closed, as err
	err   error
}

// startUpload sends what waits in the connection's sink and then the body.
func startUpload(x *exchange, body framing) *upload {
	u := &upload{ended: make(chan struct{})}
	go u.run(x.Session, x.hop, body)
	return u
}

func (u *upload) run(t *Session, h *hop, body framing) {
	if u.err = h.sink.flush(); u.err == nil {
		u.sent, u.err = body.transfer(&h.sink, &t.client, true)
	}
	h.sink.release()
	close(u.ended)
	// The next hop may have stopped to listen and answer all the same. But without a
	// rest of the body from the client nothing it says is worth waiting for.
	if u.err != nil && errors.As(u.err, new(sourceError)) {
		h.conn.SetReadDeadline(past)
	}
}

// grace is what an upload may take to end once the answer is there: the answer may
// overtake the word of the last write.
const grace = 5 * time.Millisecond

// done reports whether the body is sent; a request without one has none to send.
func (u *upload) done() bool {
	if u == nil {
		return true
	}
	select {
	case <-u.ended:
		return u.err == nil
	default:
	}
	select {
	case <-u.ended:
		return u.err == nil
	case <-time.After(grace):
		return false
	}
}

// errCut says that a request was done with before the whole of it was there.
var errCut = errors.New("the next hop has closed the connection before it had the whole body")

// awaitUpload waits for the end of an upload that the next hop may still want: its answer is
// a good one, and it has not said that it closes the connection. What does not move is ended
// by the watchdog. The error is for the record: such an upload was cut off.
func (x *exchange) awaitUpload() error {
	if x.body == nil || x.response.status >= 400 {
		return nil
	}
	if !x.response.close {
		<-x.body.ended
	}
	if !x.body.done() {
		return x.aborted(errCut)
	}
	return nil
}

// finishUpload ends the upload if it has not ended by itself, and reports whether the
// whole body was sent.
func (x *exchange) finishUpload() bool {
	u := x.body
	if u == nil {
		return true
	}
	select {
	case <-u.ended:
	default:
		x.limit(past)
		x.hop.conn.SetWriteDeadline(past)
		<-u.ended
		x.limit(time.Time{})
		x.hop.conn.SetWriteDeadline(time.Time{})
	}
	x.record.Sent = u.sent
	return u.err == nil
}

// broken returns why the client's part of the upload failed, nil if it did not.
func (u *upload) broken() error {
	if u == nil {
		return nil
	}
	select {
	case <-u.ended:
		if errors.As(u.err, new(sourceError)) {
			return u.err
		}
	default:
	}
	return nil
}
