package forward

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// impatient is a configuration under which an exchange may stand still for a moment only.
func impatient(c *Config) { c.IdleTimeout = 200 * time.Millisecond }

// TestSilenceAfterASlowDial: the next hop is given up even if it took longer than one look
// of the watchdog to reach it.
func TestSilenceAfterASlowDial(t *testing.T) {
	p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) { p.drain(conn) })
	w := newWorld(t, p, "", func(c *Config) {
		impatient(c)
		route := c.Route
		c.Route = func(client Client, host string, port uint16) (Way, error) {
			time.Sleep(300 * time.Millisecond)
			return route(client, host, port)
		}
	})
	client := w.client(t, Captured)
	response, _ := exchangeText(t, client, bufio.NewReader(client), fmt.Sprintf(get, 1, "a.test"))
	if response.StatusCode != 504 {
		t.Errorf("%s", response.Status)
	}
}

// TestUploadBehindItsAnswer: a next hop that answers before it has the whole body gets the
// rest of it all the same, unless it has said no or closes.
func TestUploadBehindItsAnswer(t *testing.T) {
	const size = 4 << 20
	for _, c := range []struct {
		name, answer string
		whole        bool
	}{
		{"wanted", okay, true},
		{"refused", "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno", false},
		{"cut", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got atomic.Int64
			p := newPeer(t, func(_ *peer, conn *net.TCPConn, _ int) {
				buffer := make([]byte, 64<<10)
				for {
					n, err := conn.Read(buffer)
					if n > 0 && got.Load() == 0 {
						io.WriteString(conn, c.answer)
					}
					if got.Add(int64(n)); err != nil {
						return
					}
				}
			})
			w := newWorld(t, p, "", nil)
			client := w.client(t, Captured)
			fmt.Fprintf(client, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n", size)
			answered := make(chan struct{})
			go func() {
				defer close(answered)
				readAnswer(t, bufio.NewReader(client))
			}()
			data := make([]byte, 64<<10)
			for left := size; left > 0; left -= len(data) {
				if left == size/2 {
					<-answered // it comes while the client still sends
					time.Sleep(50 * time.Millisecond)
				}
				if _, err := client.Write(data); err != nil {
					break
				}
			}
			r := w.record(t, 0)
			if whole := r.Sent == size; whole != c.whole || c.name == "cut" != (r.Err != nil) {
				t.Errorf("sent %d: %v", r.Sent, r.Err)
			}
			for deadline := time.Now().Add(5 * time.Second); c.whole && got.Load() < size; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the next hop got %d bytes", got.Load())
				}
			}
		})
	}
}

// TestOtherProtocols: what is asked for is what was judged, however it is written.
func TestOtherProtocols(t *testing.T) {
	for _, c := range []struct{ fields, want string }{
		{"Upgrade: websocket\r\n", "Connection: Upgrade\r\nUpgrade: websocket\r\n"},
		{"Upgrade: WebSocket, h2c\r\n", "Connection: Upgrade\r\nUpgrade: WebSocket\r\n"},
		{"Upgrade: H2C\r\n", ""},
		{"Upgrade: h2c\r\nUpgrade: a/1 , b\r\n", "Connection: Upgrade\r\nUpgrade: a/1, b\r\n"},
		{"Upgrade: ,\r\n", ""},
	} {
		head := "GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"
		p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
			if p.read(conn, len(head)+len(c.want)+2) {
				io.WriteString(conn, okay)
			}
			p.drain(conn)
		})
		w := newWorld(t, p, "", func(config *Config) {
			config.Dialer = &upstream.Dialer{ConnectTimeout: time.Second, HandshakeTimeout: time.Millisecond}
		})
		client := w.client(t, Captured)
		exchangeText(t, client, bufio.NewReader(client), "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\n"+c.fields+"\r\n")
		if got := p.saw(); len(got) < len(head)+len(c.want)+2 || got[:len(head)+len(c.want)+2] != head+c.want+"\r\n" {
			t.Errorf("%q: the next hop got %q", c.fields, got)
		}
	}
}
