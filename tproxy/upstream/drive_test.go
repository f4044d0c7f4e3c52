package upstream_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

func pipe(t *testing.T) (client, server net.Conn) {
	client, server = net.Pipe()
	client.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func loopback(t *testing.T) (client, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if client, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	client.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// TestDriveLegs covers what CONNECT with Basic does not need: several legs, and
// last words together with the first bytes of the tunnel.
func TestDriveLegs(t *testing.T) {
	client, server := pipe(t)
	heard := make(chan string, 1)
	go func() {
		buffer, all := make([]byte, 100), ""
		for _, answer := range []string{"a", "bearly"} {
			n, _ := server.Read(buffer)
			all += string(buffer[:n])
			io.WriteString(server, answer)
		}
		n, _ := server.Read(buffer)
		heard <- all + string(buffer[:n])
	}()
	rest, err := upstream.Drive(client, new(legs))
	if err != nil || string(rest) != "early" {
		t.Errorf("rest %q, error %v", rest, err)
	}
	if got := <-heard; got != "0|1|2|" {
		t.Errorf("the proxy heard %q", got)
	}
}

// legs answers "a" with a second message and "b" with its last.
type legs struct{}

func (*legs) Hello() []byte { return []byte("0|") }

func (*legs) Feed(in []byte) (out, rest []byte, done bool, err error) {
	if in[0] == 'a' {
		return []byte("1|"), nil, false, nil
	}
	return []byte("2|"), in[1:], true, nil
}

func TestDriveDeadline(t *testing.T) {
	client, server := pipe(t)
	client.SetDeadline(time.Now().Add(20 * time.Millisecond))
	go io.Copy(io.Discard, server)
	var timeout net.Error
	_, _, handshake := begin(t, httpProxy)
	if _, err := upstream.Drive(client, handshake); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("error %v", err)
	}
}
