package relay_test

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// TestRetry goes to a second hop, with all that the client has said, when the first
// cannot be connected to or fails in its handshake.
func TestRetry(t *testing.T) {
	gone := listenPeer(t)
	gone.Close()
	for _, test := range []struct {
		name  string
		first func(p peer) netip.AddrPort
		fail  func(t *testing.T, p peer)
		how   relay.End
		err   error
	}{
		{"refused", func(peer) netip.AddrPort { return gone.address }, nil, relay.ConnectFailed, unix.ECONNREFUSED},
		{"closed", func(p peer) netip.AddrPort { return p.address }, func(t *testing.T, p peer) {
			conn := p.next(t)
			expect(t, conn, question)
			conn.Close()
		}, relay.HandshakeFailed, io.ErrUnexpectedEOF},
		{"reset", func(p peer) netip.AddrPort { return p.address }, func(t *testing.T, p peer) {
			conn := p.next(t)
			expect(t, conn, question)
			reset(t, conn)
		}, relay.HandshakeFailed, unix.ECONNRESET},
		{"silent", func(p peer) netip.AddrPort { return p.address }, func(t *testing.T, p peer) {
			expect(t, p.next(t), question)
		}, relay.HandshakeFailed, os.ErrDeadlineExceeded},
	} {
		t.Run(test.name, func(t *testing.T) {
			first, second := listenPeer(t), listenPeer(t)
			type failure struct {
				how relay.End
				err error
			}
			failures := make(chan failure, 2)
			g := start(t, 1, relay.Config{HandshakeTimeout: 300 * time.Millisecond}, func() *stub {
				s := first.through()
				s.hop.Addrs = []netip.AddrPort{test.first(first)}
				s.peek = func(flight []byte, _ bool) bool { return len(flight) < len("hello") }
				s.retry = func(how relay.End, err error) (relay.Hop, bool) {
					failures <- failure{how, err}
					return second.through().hop, true
				}
				return s
			})
			conn := g.dial(t)
			send(t, conn, "hello")
			if test.fail != nil {
				test.fail(t, first)
			}
			up := second.next(t)
			grant(t, up, granted+"welcome")
			expect(t, up, "hello")
			expect(t, conn, "welcome")
			conn.CloseWrite()
			up.CloseWrite()
			if outcome := g.outcome(t); outcome.End != relay.Orderly || outcome.Address != second.address || outcome.Sent != 5 {
				t.Errorf("%+v", outcome)
			}
			if got := <-failures; got.how != test.how || !errors.Is(got.err, test.err) {
				t.Errorf("retried after %v, %v", got.how, got.err)
			}
		})
	}
}

// TestRetryElsewhere has the session take the flow off the engine after a failure, and give
// up after another.
func TestRetryElsewhere(t *testing.T) {
	gone := listenPeer(t)
	gone.Close()
	detached := make(chan int, 1)
	tries := 0
	g := start(t, 1, relay.Config{}, func() *stub {
		s := gone.to()
		s.retry = func(relay.End, error) (relay.Hop, bool) {
			switch tries++; tries {
			case 1:
				return relay.Hop{Detach: func(client int, _ []byte) { detached <- client }}, true
			case 2:
				return gone.to().hop, true
			}
			return relay.Hop{}, false
		}
		return s
	})
	conn := g.dial(t)
	client := <-detached
	unix.Close(client)
	expectReset(t, conn)
	g.expectRefused(t)
	if outcome := g.outcome(t); outcome.End != relay.ConnectFailed || !errors.Is(outcome.Err, unix.ECONNREFUSED) || tries != 3 {
		t.Errorf("%+v after %d", outcome, tries)
	}
}
