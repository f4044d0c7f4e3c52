package forward

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

// TestBoundConnections: NTLM and Negotiate make a client known for as long as its
// connection lasts. Whoever else were given that connection would be taken for it.
func TestBoundConnections(t *testing.T) {
	const (
		asks = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: %s\r\nContent-Length: 0\r\n\r\n"
		sent = "GET /own HTTP/1.1\r\nHost: a.test\r\nAuthorization: %s\r\n\r\n"
	)
	for _, c := range []struct {
		name, request, answer string
		shared                bool
	}{
		{"none", fmt.Sprintf(get, 1, "a.test"), okay, true},
		{"Basic", fmt.Sprintf(sent, "Basic dTpw"), okay, true},
		{"Basic is asked for", fmt.Sprintf(get, 1, "a.test"), fmt.Sprintf(asks, `Basic realm="NTLM"`), true},
		{"NTLM", fmt.Sprintf(sent, "NTLM TlRMTVNTUAAB"), okay, false},
		{"Negotiate", fmt.Sprintf(sent, "negotiate YII="), okay, false},
		{"NTLM is asked for", fmt.Sprintf(get, 1, "a.test"), fmt.Sprintf(asks, "NTLM"), false},
		{"Negotiate goes on", fmt.Sprintf(get, 1, "a.test"), fmt.Sprintf(asks, "Negotiate oYG2"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := answering(t, func(conn net.Conn, _ int, _ *http.Request) bool {
				_, err := io.WriteString(conn, c.answer)
				return err == nil
			})
			w := newWorld(t, p, "", nil)
			client, other := w.client(t, Captured), w.client(t, Captured)
			reader := bufio.NewReader(client)
			exchangeText(t, client, reader, c.request)
			w.record(t, 0)
			exchangeText(t, other, bufio.NewReader(other), fmt.Sprintf(get, 2, "a.test"))
			w.record(t, 1)
			exchangeText(t, client, reader, fmt.Sprintf(get, 3, "a.test"))
			w.record(t, 2)
			want := 1
			if !c.shared {
				want = 2
			}
			if n := p.connections(); n != want {
				t.Errorf("%d connections, want %d: %s", n, want, p.saw())
			}
			if !w.record(t, 2).Reused {
				t.Errorf("the client itself has lost its connection: %s", p.saw())
			}
		})
	}
}
