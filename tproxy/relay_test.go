package tproxy

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"
)

// pair is a TCP connection over loopback, both ends.
func pair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dialled, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	near, far = dialled.(*net.TCPConn), accepted.(*net.TCPConn)
	for _, conn := range []*net.TCPConn{near, far} {
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		t.Cleanup(func() { conn.Close() })
	}
	far.SetLinger(0) // as sockets of a session have it
	far.SetDeadline(time.Time{})
	return near, far
}

// startSession relays between a client and an upstream and returns their ends.
func startSession(t *testing.T, idle, halfClose time.Duration, flight, rest string) (client, upstream *net.TCPConn, result chan error) {
	t.Helper()
	client, clientSide := pair(t)
	upstream, upstreamSide := pair(t)
	s := session{client: clientSide, upstream: upstreamSide, idle: idle, halfClose: halfClose}
	result = make(chan error, 1)
	go func() {
		_, _, err := s.relay([]byte(flight), []byte(rest))
		result <- err
	}()
	return client, upstream, result
}

func TestRelayPassesHalfCloseOn(t *testing.T) {
	client, upstream, result := startSession(t, time.Minute, time.Minute, "peeked ", "early ")
	io.WriteString(client, "question")
	client.CloseWrite()
	if got, err := io.ReadAll(upstream); string(got) != "peeked question" || err != nil {
		t.Errorf("upstream read %q, %v", got, err)
	}
	io.WriteString(upstream, "answer")
	upstream.Close()
	if got, err := io.ReadAll(client); string(got) != "early answer" || err != nil {
		t.Errorf("client read %q, %v", got, err)
	}
	if err := <-result; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func TestRelayCarriesResetsOver(t *testing.T) {
	for _, side := range []string{"client", "upstream"} {
		client, upstream, result := startSession(t, time.Minute, time.Minute, "", "")
		failing, other := client, upstream
		if side == "upstream" {
			failing, other = upstream, client
		}
		failing.SetLinger(0)
		failing.Close()
		if _, err := io.ReadAll(other); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s fails: the other side sees %v and no reset", side, err)
		}
		if err := <-result; err == nil {
			t.Errorf("%s fails: the session ended well", side)
		}
	}
}

func TestRelayEndsWhatStandsStill(t *testing.T) {
	const limit = 100 * time.Millisecond
	client, _, result := startSession(t, limit, time.Minute, "", "")
	// A byte now and then keeps a session alive for longer than its limit.
	start := time.Now()
	for time.Since(start) < 3*limit {
		io.WriteString(client, "x")
		time.Sleep(limit / 4)
	}
	select {
	case err := <-result:
		t.Fatalf("it ended although bytes moved: %v", err)
	default:
	}
	if err := <-result; !errors.Is(err, errIdle) {
		t.Errorf("it ended with %v", err)
	}
	if _, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client sees %v and no reset", err)
	}
}

func TestRelayBoundsHalfClosedSessions(t *testing.T) {
	client, upstream, result := startSession(t, time.Minute, 100*time.Millisecond, "", "")
	upstream.CloseWrite()
	if _, err := io.ReadAll(client); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, errHalfClose) {
		t.Errorf("it ended with %v", err)
	}
}
