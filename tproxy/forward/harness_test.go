package forward

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// peer is a scripted next hop: on its connections it waits for the requests that a
// test expects, byte for byte, and sends what the test says.
type peer struct {
	listener *net.TCPListener
	script   func(p *peer, conn *net.TCPConn, number int)

	mutex    sync.Mutex
	received bytes.Buffer // on all connections
	number   int          // of connections so far
	running  sync.WaitGroup
}

func newPeer(t *testing.T, script func(p *peer, conn *net.TCPConn, number int)) *peer {
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{listener: listener, script: script}
	p.running.Go(p.accept)
	t.Cleanup(func() {
		listener.Close()
		p.running.Wait()
	})
	return p
}

func (p *peer) accept() {
	for {
		conn, err := p.listener.AcceptTCP()
		if err != nil {
			return
		}
		p.mutex.Lock()
		number := p.number
		p.number++
		p.mutex.Unlock()
		p.running.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			p.script(p, conn, number)
		})
	}
}

// read waits for n bytes and keeps them.
func (p *peer) read(conn net.Conn, n int) bool {
	data := make([]byte, n)
	n, err := io.ReadFull(conn, data)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.received.Write(data[:n])
	return err == nil
}

// drain keeps what else comes until the other side closes.
func (p *peer) drain(conn net.Conn) {
	data, _ := io.ReadAll(conn)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.received.Write(data)
}

// expect waits until what a test expects has arrived, and no more.
func (p *peer) expect(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); p.saw() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the next hop got %q,\nwant %q", p.saw(), want)
		}
	}
}

// saw is what has arrived so far.
func (p *peer) saw() string {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.received.String()
}

func (p *peer) connections() int {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.number
}

func (p *peer) address() netip.AddrPort { return p.listener.Addr().(*net.TCPAddr).AddrPort() }

// world is a server whose ways all lead to one peer.
type world struct {
	peer    *peer
	proxy   *upstream.Proxy // to the peer, as one of HTTP
	server  *Server
	mutex   sync.Mutex
	records []Record
}

// destination is where the clients of the tests believe to be.
var destination = netip.MustParseAddrPort("203.0.113.7:80")

// newWorld makes one. Names that end in direct.test go directly, refused.test is
// refused.
func newWorld(t *testing.T, p *peer, user string, change func(*Config)) *world {
	t.Helper()
	proxy, err := upstream.Parse("http://" + user + p.address().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Login(nil, auth.Basic); err != nil {
		t.Fatal(err)
	}
	w := &world{peer: p, proxy: proxy}
	config := Config{
		Dialer: &upstream.Dialer{ConnectTimeout: 5 * time.Second, HandshakeTimeout: 5 * time.Second},
		Route: func(client Client, host string, port uint16) (Way, error) {
			way := Way{Proxy: proxy, Target: upstream.Target{Host: host, Port: port}}
			switch {
			case host == "":
				way.Target.Host = client.Destination.Addr().String()
			case host == "refused.test":
				return Way{}, errors.New("refused by the test")
			case strings.HasSuffix(host, "direct.test"):
				way.Proxy, way.Direct = nil, p.address()
			}
			return way, nil
		},
		Check: func(netip.Addr) error { return nil },
		Relay: func(_ context.Context, client, upstream upstream.Conn, flight, rest []byte) (sent, received int64, err error) {
			upstream.Write(flight)
			client.Write(rest)
			var up sync.WaitGroup
			up.Go(func() {
				sent, _ = io.Copy(upstream, client)
				upstream.CloseWrite()
			})
			received, _ = io.Copy(client, upstream)
			client.CloseWrite()
			up.Wait()
			client.SetLinger(-1)
			client.Close()
			upstream.Close()
			return sent + int64(len(flight)), received + int64(len(rest)), nil
		},
		Record: func(r Record) {
			w.mutex.Lock()
			defer w.mutex.Unlock()
			w.records = append(w.records, r)
		},
		IdleTimeout:      time.Minute,
		HandshakeTimeout: 5 * time.Second,
	}
	if change != nil {
		change(&config)
	}
	w.server = NewServer(config)
	t.Cleanup(w.server.Close)
	return w
}

// client connects to the gateway as a client of a kind; its session ends with the test.
func (w *world) client(t *testing.T, kind Kind) *net.TCPConn {
	t.Helper()
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.DialTCP("tcp4", nil, listener.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	served, err := listener.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	served.SetLinger(0)
	client.SetDeadline(time.Now().Add(10 * time.Second))
	ctx, reset := context.WithCancelCause(t.Context())
	ended := make(chan struct{})
	who := Client{Kind: kind, Address: netip.MustParseAddrPort("192.168.1.9:40000"), Destination: destination}
	session := w.server.Open(served, who, nil)
	go func() {
		defer close(ended)
		session.Serve(ctx)
	}()
	t.Cleanup(func() {
		client.Close()
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("the session has not ended with its client's connection")
			reset(errors.New("end of the test"))
			<-ended
		}
	})
	return client
}

// record waits for a record, counted from 0.
func (w *world) record(t *testing.T, number int) Record {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		w.mutex.Lock()
		records := w.records
		w.mutex.Unlock()
		if len(records) > number {
			return records[number]
		}
	}
	t.Fatalf("no record %d", number)
	return Record{}
}
