package forward

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	get  = "GET /%d HTTP/1.1\r\nHost: %s\r\n\r\n"
	okay = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
)

// answering is a peer that reads requests with package net/http and answers each.
func answering(t *testing.T, answer func(conn net.Conn, number int, request *http.Request) (again bool)) *peer {
	p := newPeer(t, func(p *peer, conn *net.TCPConn, number int) {
		reader := bufio.NewReader(conn)
		for {
			request, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			p.mutex.Lock()
			fmt.Fprintf(&p.received, "%d %s %s|", number, request.Method, request.RequestURI)
			p.mutex.Unlock()
			if !answer(conn, number, request) {
				return
			}
		}
	})
	return p
}

func answerOkay(conn net.Conn, _ int, request *http.Request) bool {
	io.Copy(io.Discard, request.Body)
	_, err := io.WriteString(conn, okay)
	return err == nil
}

// exchangeText sends a request and reads one answer.
func exchangeText(t *testing.T, client net.Conn, reader *bufio.Reader, request string) (*http.Response, string) {
	t.Helper()
	if _, err := io.WriteString(client, request); err != nil {
		t.Fatal(err)
	}
	return readAnswer(t, reader)
}

func readAnswer(t *testing.T, reader *bufio.Reader) (*http.Response, string) {
	t.Helper()
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatalf("reading an answer: %v", err)
	}
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("reading its body: %v", err)
	}
	return response, string(body)
}

// TestEachRequestGoesItsOwnWay sends requests for several hosts on one connection.
func TestEachRequestGoesItsOwnWay(t *testing.T) {
	p := answering(t, answerOkay)
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	reader := bufio.NewReader(client)
	for i, host := range []string{"a.test", "b.test", "direct.test", "a.test"} {
		exchangeText(t, client, reader, fmt.Sprintf(get, i, host))
	}
	p.expect(t, "0 GET http://a.test/0|0 GET http://b.test/1|1 GET /2|0 GET http://a.test/3|")
	for i, direct := range []bool{false, false, true, false} {
		if r := w.record(t, i); r.Direct != direct || r.Status != 200 || r.Received != 2 || r.Err != nil {
			t.Errorf("record %d: %+v", i, r)
		}
	}
}

// TestConnectionsAreShared sees that the second client's request goes out on the
// connection of the first.
func TestConnectionsAreShared(t *testing.T) {
	p := answering(t, answerOkay)
	w := newWorld(t, p, "", nil)
	for i := range 3 {
		client := w.client(t, Captured)
		exchangeText(t, client, bufio.NewReader(client), fmt.Sprintf(get, i, "a.test"))
		w.record(t, i) // the connection is kept before that
	}
	p.expect(t, "0 GET http://a.test/0|0 GET http://a.test/1|0 GET http://a.test/2|")
	for i := range 3 {
		if r := w.record(t, i); r.Reused != (i > 0) {
			t.Errorf("record %d: reused %t", i, r.Reused)
		}
	}
}

// TestPassingConnectionsAreNot: an authentication may hold for a connection, and then
// for what comes on it from others.
func TestPassingConnectionsAreNot(t *testing.T) {
	p := answering(t, answerOkay)
	w := newWorld(t, p, "", nil)
	for i := range 2 {
		client := w.client(t, Passing)
		reader := bufio.NewReader(client)
		exchangeText(t, client, reader, fmt.Sprintf("GET http://a.test/%d HTTP/1.1\r\nHost: a.test\r\n\r\n", i))
		exchangeText(t, client, reader, fmt.Sprintf("GET http://a.test/%d HTTP/1.1\r\nHost: a.test\r\n\r\n", i))
	}
	p.expect(t, "0 GET http://a.test/0|0 GET http://a.test/0|1 GET http://a.test/1|1 GET http://a.test/1|")
}

// TestStaleConnection closes the kept connection as the second request arrives: what
// may be repeated is, and the rest is not.
func TestStaleConnection(t *testing.T) {
	for _, c := range []struct{ request, want string }{
		{"GET /1 HTTP/1.1\r\nHost: a.test\r\n\r\n", "200"},
		{"POST /1 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 2\r\n\r\nhi", "502"},
	} {
		var requests atomic.Int32
		p := answering(t, func(conn net.Conn, number int, r *http.Request) bool {
			return requests.Add(1) != 2 && answerOkay(conn, number, r)
		})
		w := newWorld(t, p, "", nil)
		client := w.client(t, Captured)
		reader := bufio.NewReader(client)
		exchangeText(t, client, reader, fmt.Sprintf(get, 0, "a.test"))
		response, _ := exchangeText(t, client, reader, c.request)
		if !strings.HasPrefix(response.Status, c.want) {
			t.Errorf("%.4s: %s, want %s", c.request, response.Status, c.want)
		}
	}
}

// TestPipelining sends three requests at once; the answers come in their order.
func TestPipelining(t *testing.T) {
	p := answering(t, func(conn net.Conn, _ int, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		text := r.URL.Path + string(body)
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
		return true
	})
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	io.WriteString(client, fmt.Sprintf(get, 1, "a.test")+"POST /2 HTTP/1.1\r\nHost: b.test\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"+fmt.Sprintf(get, 3, "direct.test"))
	reader := bufio.NewReader(client)
	for _, want := range []string{"/1", "/2hi", "/3"} {
		if _, body := readAnswer(t, reader); body != want {
			t.Errorf("got %q, want %q", body, want)
		}
	}
}

// TestContinue has the client wait for 100 before it sends the body.
func TestContinue(t *testing.T) {
	p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
		head := "POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
		p.read(conn, len(head))
		io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n")
		p.read(conn, 5)
		io.WriteString(conn, okay)
		p.drain(conn)
	})
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	reader := bufio.NewReader(client)
	request := "POST / HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
	if response, _ := exchangeText(t, client, reader, request); response.StatusCode != 100 {
		t.Fatalf("got %s before the body", response.Status)
	}
	if response, _ := exchangeText(t, client, reader, "hello"); response.StatusCode != 200 || response.Close {
		t.Errorf("got %s, close %t", response.Status, response.Close)
	}
	if sent := w.record(t, 0).Sent; sent != 5 {
		t.Errorf("recorded %d bytes of the body", sent)
	}
}

// TestContinueRefused has the server refuse the body that the client has not sent.
func TestContinueRefused(t *testing.T) {
	p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
		conn.Read(make([]byte, 1000))
		io.WriteString(conn, "HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno")
		io.Copy(io.Discard, conn)
	})
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	request := "POST / HTTP/1.1\r\nHost: a.test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
	response, body := exchangeText(t, client, bufio.NewReader(client), request)
	if response.StatusCode != 417 || body != "no" || !response.Close {
		t.Errorf("got %s, %q, close %t", response.Status, body, response.Close)
	}
}

// TestEarlyAnswer has the server answer while most of the body is still with the
// client, which goes on sending.
func TestEarlyAnswer(t *testing.T) {
	p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
		conn.Read(make([]byte, 1000))
		io.WriteString(conn, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno")
		conn.CloseWrite()
		io.CopyN(io.Discard, conn, 100<<10)
	})
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	go func() {
		fmt.Fprintf(client, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n\r\n", 1<<30)
		client.Write(make([]byte, 600<<10))
	}()
	response, body := readAnswer(t, bufio.NewReader(client))
	if response.StatusCode != 413 || body != "no" {
		t.Errorf("got %s, %q", response.Status, body)
	}
}

// TestBodies carries bodies of several sizes and framings each way, and compares them.
func TestBodies(t *testing.T) {
	p := answering(t, func(conn net.Conn, _ int, r *http.Request) bool {
		sum := sha256.New()
		body, err := io.ReadAll(io.TeeReader(r.Body, sum))
		if err != nil {
			return false
		}
		answer := &http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"Sum": {fmt.Sprintf("%x", sum.Sum(nil))}}, Body: io.NopCloser(bytes.NewReader(body))}
		answer.ContentLength = int64(len(body))
		if len(r.TransferEncoding) > 0 {
			answer.ContentLength, answer.TransferEncoding = -1, []string{"chunked"}
		}
		return answer.Write(conn) == nil
	})
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	reader := bufio.NewReader(client)
	random := rand.NewChaCha8([32]byte{})
	number := 0
	for _, size := range []int{0, 1, 1000, bufferSize - 1, bufferSize, bufferSize + 1, spliced - 1, spliced + 1, 3 << 20} {
		for _, chunked := range []bool{false, true} {
			data := make([]byte, size)
			random.Read(data)
			request, _ := http.NewRequest("PUT", "http://a.test/", bytes.NewReader(data))
			if chunked {
				request.ContentLength, request.TransferEncoding = -1, []string{"chunked"}
			}
			sent := make(chan error, 1)
			go func() { sent <- request.Write(client) }()
			response, body := readAnswer(t, reader)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%x", sha256.Sum256(data)); response.Header.Get("Sum") != want || body != string(data) {
				t.Fatalf("%d bytes, chunked %t: the body is not the same", size, chunked)
			}
			record := w.record(t, number)
			number++
			if record.Sent != int64(size) || record.Received != int64(size) {
				t.Errorf("%d bytes, chunked %t: recorded %d and %d", size, chunked, record.Sent, record.Received)
			}
		}
	}
	if n := p.connections(); n != 1 {
		t.Errorf("%d connections to the next hop, want 1", n)
	}
}

// TestCutAnswer sees that an answer which ends too early does not look whole.
func TestCutAnswer(t *testing.T) {
	for name, answer := range map[string]string{
		"sized":   "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbeginning",
		"chunked": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nbeginning\r\n",
	} {
		p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
			conn.Read(make([]byte, 1000))
			io.WriteString(conn, answer)
		})
		w := newWorld(t, p, "", nil)
		client := w.client(t, Captured)
		fmt.Fprintf(client, get, 0, "a.test")
		if got, err := io.ReadAll(client); err == nil {
			t.Errorf("%s: got %q and an orderly end", name, got)
		}
		if err := w.record(t, 0).Err; err == nil {
			t.Errorf("%s: recorded as whole", name)
		}
	}
}

// TestHostileAnswers sees that what cannot be passed on becomes 502.
func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"no HTTP":           "SSH-2.0-x\r\n\r\n",
		"both lengths":      "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"two lengths":       "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
		"a signed length":   "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"a status too long": "HTTP/1.1 2000 OK\r\n\r\n",
		"a status too low":  "HTTP/1.1 099 OK\r\n\r\n",
		"NUL":               "HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
		"CR in a field":     "HTTP/1.1 200 OK\r\nX: a\rY: b\r\n\r\n",
		"endless interim":   strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 2*maxInterim),
		"an endless head":   "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxHead),
		"an unasked 101":    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
		"nothing":           "",
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
				conn.Read(make([]byte, 1000))
				io.WriteString(conn, answer)
			})
			w := newWorld(t, p, "", nil)
			client := w.client(t, Captured)
			fmt.Fprintf(client, get, 0, "a.test")
			got, err := io.ReadAll(client)
			if err != nil || !strings.Contains(string(got), "HTTP/1.1 502 Bad Gateway\r\n") || !strings.Contains(string(got), "Proxy-Status: ") {
				t.Errorf("got %.300q, %v", got, err)
			}
		})
	}
}

// TestUpgradeByTunnel has the proxy refuse the upgrade, and take a CONNECT.
func TestUpgradeByTunnel(t *testing.T) {
	for _, tunnels := range []bool{true, false} {
		p := newPeer(t, func(p *peer, conn *net.TCPConn, _ int) {
			reader := bufio.NewReader(conn)
			request, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			if request.Method != "CONNECT" || !tunnels {
				io.WriteString(conn, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
				io.Copy(io.Discard, conn)
				return
			}
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
			request, err = http.ReadRequest(reader)
			if err != nil || request.RequestURI != "/chat" || request.Header.Get("Upgrade") != "websocket" || request.Host != "a.test" {
				t.Errorf("in the tunnel: %+v, %v", request, err)
				return
			}
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(conn, reader)
			conn.CloseWrite()
		})
		w := newWorld(t, p, "", nil)
		client := w.client(t, Captured)
		reader := bufio.NewReader(client)
		request := "GET /chat HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
		response, body := exchangeText(t, client, reader, request)
		if !tunnels {
			if response.StatusCode != 403 || body != "no" {
				t.Errorf("without a tunnel: %s %q", response.Status, body)
			}
			continue
		}
		if response.StatusCode != 101 {
			t.Fatalf("got %s", response.Status)
		}
		io.WriteString(client, "echo")
		client.CloseWrite()
		if echo, err := io.ReadAll(reader); err != nil || string(echo) != "echo" {
			t.Errorf("got %q, %v", echo, err)
		}
	}
}

// TestCredential sees that the configured credential goes to the proxy, and that its
// refusal is one for all.
func TestCredential(t *testing.T) {
	p := answering(t, func(conn net.Conn, _ int, r *http.Request) bool {
		if r.Header.Get("Proxy-Authorization") != "Basic dTpw" {
			t.Errorf("sent %q", r.Header.Get("Proxy-Authorization"))
		}
		if r.URL.Path == "/0" {
			io.WriteString(conn, okay)
			return true
		}
		io.WriteString(conn, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n")
		return true
	})
	w := newWorld(t, p, "u:p@", nil)
	for i, want := range []int{200, 502, 502} {
		client := w.client(t, Captured)
		response, body := exchangeText(t, client, bufio.NewReader(client), fmt.Sprintf(get, i, "a.test"))
		if response.StatusCode != want || strings.Contains(body, "dTpw") || response.Header.Get("Proxy-Authenticate") != "" {
			t.Errorf("request %d: %s, %v, %q", i, response.Status, response.Header, body)
		}
		w.record(t, i)
	}
	p.expect(t, "0 GET http://a.test/0|0 GET http://a.test/1|") // and no third
	if err := w.record(t, 1).Err; !upstream.Denied(err) {
		t.Errorf("recorded %v", err)
	}
	if err := w.record(t, 2).Err; !errors.Is(err, upstream.ErrCredentialRefused) {
		t.Errorf("recorded %v", err)
	}
}

// TestUnreachable sees that a next hop that is not there is told as such.
func TestUnreachable(t *testing.T) {
	p := newPeer(t, nil)
	p.listener.Close()
	w := newWorld(t, p, "", nil)
	client := w.client(t, Captured)
	response, body := exchangeText(t, client, bufio.NewReader(client), fmt.Sprintf(get, 0, "a.test"))
	if response.StatusCode != 502 || !strings.Contains(response.Header.Get("Proxy-Status"), "error=connection_refused") || !response.Close {
		t.Errorf("got %s, %v", response.Status, response.Header)
	}
	if !strings.Contains(body, "made by the gateway") {
		t.Errorf("the page does not say who speaks: %q", body)
	}
	client = w.client(t, Captured)
	if response, _ := exchangeText(t, client, bufio.NewReader(client), fmt.Sprintf(get, 0, "refused.test")); response.StatusCode != 403 {
		t.Errorf("refused by Route: %s", response.Status)
	}
}

// TestDrain lets a running request end, and no other start.
func TestDrain(t *testing.T) {
	release := make(chan struct{})
	p := answering(t, func(conn net.Conn, number int, r *http.Request) bool {
		if r.URL.Path == "/1" {
			<-release
		}
		return answerOkay(conn, number, r)
	})
	w := newWorld(t, p, "", nil)
	var sessions []*Session
	var clients []net.Conn
	for range 2 {
		far, near := pair(t)
		session := w.server.Open(near, Client{Destination: destination}, nil)
		go session.Serve(t.Context())
		sessions, clients = append(sessions, session), append(clients, far)
	}
	idle, busy := bufio.NewReader(clients[0]), bufio.NewReader(clients[1])
	exchangeText(t, clients[0], idle, fmt.Sprintf(get, 0, "a.test"))
	fmt.Fprintf(clients[1], get, 1, "a.test")
	for !strings.Contains(p.saw(), "/1|") {
		time.Sleep(time.Millisecond)
	}
	for _, session := range sessions {
		session.Drain()
	}
	if rest, err := io.ReadAll(idle); err != nil || len(rest) > 0 {
		t.Errorf("the idle client got %q, %v", rest, err)
	}
	close(release)
	if response, body := readAnswer(t, busy); body != "ok" || !response.Close {
		t.Errorf("the busy client got %q, close %t", body, response.Close)
	}
}

// pair is a connection of which both ends belong to the test.
func pair(t *testing.T) (far, near *net.TCPConn) {
	t.Helper()
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if far, err = net.DialTCP("tcp4", nil, listener.Addr().(*net.TCPAddr)); err != nil {
		t.Fatal(err)
	}
	if near, err = listener.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(10 * time.Second))
	return far, near
}

// TestConfiguration asks for the PAC, as browsers do.
func TestConfiguration(t *testing.T) {
	w := newWorld(t, newPeer(t, nil), "", nil)
	client := w.client(t, Passing)
	reader := bufio.NewReader(client)
	for _, path := range []string{"/proxy.pac", "/wpad.dat?x"} {
		response, body := exchangeText(t, client, reader, "GET "+path+" HTTP/1.1\r\nHost: gateway\r\n\r\n")
		if response.Header.Get("Content-Type") != "application/x-ns-proxy-autoconfig" || !strings.Contains(body, `return "PROXY 203.0.113.7:80";`) {
			t.Errorf("%s: %v %q", path, response.Header, body)
		}
	}
	if response, _ := exchangeText(t, client, reader, "GET /x HTTP/1.1\r\nHost: gateway\r\n\r\n"); response.StatusCode != 400 {
		t.Errorf("another path: %s", response.Status)
	}
}
