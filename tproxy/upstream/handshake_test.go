package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// script is one conversation with a proxy and what is to become of it. Every
// driver has to make the same of it, for every protocol.
type script struct {
	name  string
	proxy string // its URL
	legs  []leg

	rest       string   // after a tunnel: what belongs to it
	refused    int      // code of the RefusedError
	reason     string   // its reason
	schemes    []string // its schemes
	denied     bool     // the credential was refused
	says       string   // part of the error's text
	incomplete bool     // the proxy closes before the end of its answer
	after      standing // of the credential
}

// leg is one message to the proxy and its answer.
type leg struct{ hears, says string }

// standing is what is known of a proxy's credential.
type standing string

const (
	isUnknown   standing = "not judged"
	isAccepted  standing = "accepted"
	isRefused   standing = "refused"
	isNotNeeded standing = "not needed"
)

// scripts are those of all protocols.
func scripts() []script { return slices.Concat(connectScripts(), socks5Scripts(), socks4Scripts()) }

// stream is all that the proxy says.
func (s script) stream() string {
	all := ""
	for _, leg := range s.legs {
		all += leg.says
	}
	return all
}

// heard is all that it is told.
func (s script) heard() string {
	all := ""
	for _, leg := range s.legs {
		all += leg.hears
	}
	return all
}

// ending is what a driver made of a conversation.
type ending struct {
	sent string // to the proxy
	rest string
	done bool
	err  error
}

// check compares how a conversation ended with what the table wants.
func (s script) check(t *testing.T, proxy *upstream.Proxy, got ending) {
	t.Helper()
	if got.sent != s.heard() {
		t.Errorf("the proxy was told\n     %q\nwant %q", got.sent, s.heard())
	}
	if after := standingOf(t, proxy); after != s.after {
		t.Errorf("afterwards the credential is %s, want %s", after, s.after)
	}
	if s.incomplete {
		if got.done || got.err != nil && !errors.Is(got.err, io.ErrUnexpectedEOF) {
			t.Fatalf("done %v, error %v of an incomplete answer", got.done, got.err)
		}
		return
	}
	if tunnel := s.refused == 0 && s.says == ""; tunnel != got.done || tunnel != (got.err == nil) || got.rest != s.rest {
		t.Fatalf("done %v, error %v, rest %q", got.done, got.err, got.rest)
	}
	var refused *upstream.RefusedError
	if errors.As(got.err, &refused) != (s.refused != 0) || upstream.Denied(got.err) != s.denied {
		t.Fatalf("denied %v, error %v", upstream.Denied(got.err), got.err)
	}
	if refused != nil && (refused.Code != s.refused || refused.Reason != s.reason || !slices.Equal(refused.Schemes, s.schemes)) {
		t.Fatalf("refused by %#v", refused)
	}
	if got.err != nil && (!strings.Contains(got.err.Error(), s.says) || strings.ContainsAny(got.err.Error(), "\r\n") || strings.HasSuffix(got.err.Error(), ": ")) {
		t.Fatalf("error %q", got.err)
	}
}

// standingOf looks whether the next flow would send the credential, and alone.
func standingOf(t testing.TB, proxy *upstream.Proxy) standing {
	t.Helper()
	if lease, ok := proxy.Standing(); ok {
		if lease == nil {
			return isNotNeeded
		}
		return isAccepted
	}
	lease, ok, err := try(proxy)
	switch {
	case errors.Is(err, upstream.ErrCredentialRefused):
		return isRefused
	case !ok || err != nil:
		t.Fatalf("the turn was not passed: ok %v, error %v", ok, err)
	}
	lease.Settle(io.ErrUnexpectedEOF)
	return isUnknown
}

// begin returns a proxy of which nothing is known, a lease of its credential and a
// handshake under that.
func begin(t testing.TB, url string) (*upstream.Proxy, *upstream.Lease, upstream.Handshake) {
	t.Helper()
	proxy, err := parseBasic(url)
	if err != nil {
		t.Fatal(err)
	}
	lease, err := proxy.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	handshake, err := proxy.Handshake(target, lease)
	if err != nil {
		t.Fatal(err)
	}
	return proxy, lease, handshake
}

// feed gives the pieces to a new handshake one by one, each in a buffer that is
// overwritten afterwards, as the engine does.
func feed(t testing.TB, url string, pieces ...[]byte) (*upstream.Proxy, ending) {
	t.Helper()
	proxy, lease, handshake := begin(t, url)
	got := ending{sent: string(handshake.Hello())}
	for i, piece := range pieces {
		buffer := slices.Clone(piece)
		out, rest, done, err := handshake.Feed(buffer)
		got.sent += string(out)
		if done && err == nil {
			got.rest, got.done = string(rest)+string(bytes.Join(pieces[i+1:], nil)), true
			return proxy, got
		}
		if len(rest) > 0 || done {
			t.Fatalf("done %v, rest %q, error %v", done, rest, err)
		}
		if err != nil {
			got.err = err
			return proxy, got
		}
		for i := range buffer {
			buffer[i] = '#'
		}
	}
	lease.Settle(io.ErrUnexpectedEOF) // as drivers do when the proxy closes
	return proxy, got
}

// single cuts bytes into pieces of one.
func single(bytes []byte) [][]byte {
	return slices.Collect(slices.Chunk(bytes, 1))
}

// TestFeed runs the scripts without any input or output, with every cut of the
// stream.
func TestFeed(t *testing.T) {
	for _, s := range scripts() {
		t.Run(s.name, func(t *testing.T) {
			all := []byte(s.stream())
			cuts := [][][]byte{single(all)}
			if len(s.legs) == 1 || s.refused == 0 && s.says == "" || s.incomplete {
				// An error drops what was still to be sent: not the whole at once.
				cuts = append(cuts, [][]byte{all})
			}
			step := 1 + len(all)/512 // every cut, but of the few long ones
			for cut := 1; cut < len(all); cut += step {
				cuts = append(cuts, [][]byte{all[:cut], all[cut:]})
			}
			for _, cut := range cuts {
				proxy, got := feed(t, s.proxy, cut...)
				if got.err != nil && strings.HasPrefix(s.heard(), got.sent) {
					got.sent = s.heard()
				}
				s.check(t, proxy, got)
			}
		})
	}
}

func TestHostileTarget(t *testing.T) {
	hosts := []string{
		"", ".", "..", "a..b", "[::1]", "::1%eth0", "fe80::1%a\r\nb", "1.2.3", "256.1.1.1", "example.org:443", "exämple.org",
		strings.Repeat("a", 64), strings.Repeat("a.", 127) + "a", strings.Repeat("x", 1<<20),
	}
	for c := range 256 {
		if c := byte(c); !strings.ContainsRune("-_.", rune(c)) && (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') {
			hosts = append(hosts, "a"+string([]byte{c})+"b")
		}
	}
	for _, url := range []string{"http://proxy", "socks5://proxy", "socks4a://proxy"} {
		proxy := parse(t, url)
		for _, host := range hosts {
			if _, err := proxy.Handshake(upstream.Target{Host: host, Port: 443}, nil); err == nil {
				t.Errorf("%s: %q is taken for a host", url, host)
			} else if text := err.Error(); strings.ContainsAny(text, "\r\n") || len(text) > 2000 {
				t.Errorf("%s: %.100q: %q is no line for a log", url, host, text)
			}
		}
		if _, err := proxy.Handshake(upstream.Target{Host: "example.org"}, nil); err == nil {
			t.Errorf("%s: port 0 is taken", url)
		}
	}
}

// fromClient is what a client says at once, before the tunnel is there.
const fromClient = "client speaks first"

// serve plays a script's part of the proxy, each answer whole or octet by octet,
// takes what comes through the tunnel, and closes. It returns what it heard before
// the tunnel.
func (s script) serve(conn net.Conn, whole bool) (heard string) {
	defer conn.Close()
	buffer := make([]byte, 4096)
	for _, leg := range s.legs {
		n, err := io.ReadFull(conn, buffer[:len(leg.hears)])
		heard += string(buffer[:n])
		if err != nil {
			return heard
		}
		pieces := [][]byte{[]byte(leg.says)}
		if !whole {
			pieces = single([]byte(leg.says))
		}
		for _, piece := range pieces {
			if _, err := conn.Write(piece); err != nil {
				return heard
			}
		}
	}
	if s.incomplete {
		return heard
	}
	n, _ := io.ReadFull(conn, buffer[:len(fromClient)])
	if text := string(buffer[:n]); text != fromClient {
		heard += text // of the handshake, where nothing more was to come
	}
	return heard
}

// longest is up to where a script is played octet by octet as well.
const longest = 1000 // bytes

// TestDrive runs the scripts on both kinds of net.Conn.
func TestDrive(t *testing.T) {
	for _, connection := range []struct {
		name string
		make func(*testing.T) (client, server net.Conn)
	}{{"pipe", pipe}, {"loopback", loopback}} {
		for _, s := range scripts() {
			for _, whole := range []bool{true, false} {
				if !whole && len(s.stream()) > longest {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%t", connection.name, s.name, whole), func(t *testing.T) {
					client, server := connection.make(t)
					heard := make(chan string, 1)
					go func() { heard <- s.serve(server, whole) }()
					proxy, lease, handshake := begin(t, s.proxy)
					rest, err := upstream.Drive(client, handshake)
					lease.Settle(err)
					if rest != nil && len(rest) == 0 {
						t.Error("an empty rest holds the buffer")
					}
					got := ending{rest: string(rest), done: err == nil, err: err}
					if err == nil {
						go io.WriteString(client, fromClient)
						more, _ := io.ReadAll(client)
						got.rest += string(more)
					}
					client.Close()
					got.sent = <-heard
					if s.incomplete && !errors.Is(err, io.ErrUnexpectedEOF) {
						t.Fatalf("error %v of a proxy that closes", err)
					}
					s.check(t, proxy, got)
				})
			}
		}
	}
}

// TestEngine runs the scripts on the engine, with a client that speaks before the
// tunnel is there.
func TestEngine(t *testing.T) {
	e := startEngine(t)
	for _, s := range scripts() {
		for _, whole := range []bool{true, false} {
			if !whole && len(s.stream()) > longest {
				continue
			}
			t.Run(fmt.Sprintf("%s/%t", s.name, whole), func(t *testing.T) {
				proxy, lease, handshake := begin(t, s.proxy)
				heard := make(chan string, 1)
				rest, outcome := e.carry(t, handshake, fromClient, func(conn *net.TCPConn) {
					conn.SetNoDelay(true)
					heard <- s.serve(conn, whole)
				})
				lease.Settle(outcome.Err)
				got := ending{sent: <-heard, rest: rest, done: outcome.End != relay.HandshakeFailed, err: outcome.Err}
				if got.done && (outcome.End != relay.Orderly || outcome.Sent != int64(len(fromClient)) || outcome.Received != int64(len(s.rest))) {
					t.Errorf("%+v", outcome)
				}
				if s.incomplete && !errors.Is(outcome.Err, io.ErrUnexpectedEOF) {
					t.Fatalf("error %v of a proxy that closes", outcome.Err)
				}
				s.check(t, proxy, got)
			})
		}
	}
}

// engine is the package relay with one flow at a time.
type engine struct {
	gateway, proxy net.Addr
	accepted       chan *net.TCPConn // by the proxy
	sessions       chan *session     // that the next flow gets
}

// session is a flow that goes to the proxy at once.
type session struct {
	hop     relay.Hop
	outcome chan relay.Outcome
}

func (*session) Peek([]byte, bool) bool                  { return false }
func (s *session) Route() (relay.Hop, error)             { return s.hop, nil }
func (*session) Connected(netip.AddrPort, time.Duration) {}

func (*session) Retry(relay.End, error) (relay.Hop, bool) { return relay.Hop{}, false }

func (s *session) Closed(outcome relay.Outcome) { s.outcome <- outcome }

func startEngine(t testing.TB) *engine {
	t.Helper()
	e := &engine{accepted: make(chan *net.TCPConn), sessions: make(chan *session, 1)}
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.proxy = proxy.Addr()
	go func() {
		for {
			conn, err := proxy.Accept()
			if err != nil {
				return
			}
			e.accepted <- conn.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() { proxy.Close() })

	socket, address := listenRaw(t)
	e.gateway = address
	running, err := relay.Open(relay.Config{
		Sockets:          [][]int{{socket}},
		Accept:           func(_, _ netip.AddrPort) relay.Session { return <-e.sessions },
		ConnectTimeout:   10 * time.Second,
		HandshakeTimeout: 10 * time.Second,
		IdleTimeout:      10 * time.Second,
		HalfCloseTimeout: 10 * time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- running.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return e
}

// listenRaw returns a listening socket as the engine wants it.
func listenRaw(t testing.TB) (socket int, address net.Addr) {
	t.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false) // as the gateway's listeners are
	listener, err := config.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	socket, err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(socket, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	return socket, listener.Addr()
}

// carry runs a flow of a client that says something at once and then reads to the
// end; serve plays the proxy.
func (e *engine) carry(t testing.TB, handshake upstream.Handshake, says string, serve func(*net.TCPConn)) (received string, outcome relay.Outcome) {
	t.Helper()
	s := &session{
		hop:     relay.Hop{Addrs: []netip.AddrPort{netip.MustParseAddrPort(e.proxy.String())}, Handshake: handshake},
		outcome: make(chan relay.Outcome, 1),
	}
	e.sessions <- s
	client, err := net.Dial("tcp", e.gateway.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(client, says)
	proxy := <-e.accepted
	proxy.SetDeadline(time.Now().Add(10 * time.Second))
	go serve(proxy)
	all, err := io.ReadAll(client)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the flow does not end")
	}
	client.Close()
	return string(all), <-s.outcome
}

// sameEverywhere is the property that the fuzz tests look for: however a stream is
// cut up and whoever drives the handshake, the end is the same. It returns that of
// the whole stream in one piece.
func (e *engine) sameEverywhere(t *testing.T, url string, stream []byte, cut, second int) ending {
	t.Helper()
	proxy, whole := feed(t, url, stream)
	after := standingOf(t, proxy)
	same := func(how string, proxy *upstream.Proxy, got ending) {
		t.Helper()
		if whole.err != nil {
			// What was still to be sent is dropped at an error, and how much that is
			// depends on the cut.
			got.sent = whole.sent
		}
		if got.sent != whole.sent || got.rest != whole.rest || got.done != whole.done || !sameError(got.err, whole.err) {
			t.Fatalf("whole: %+v\n%s: %+v", whole, how, got)
		}
		if got := standingOf(t, proxy); got != after {
			t.Fatalf("whole: the credential is %s; %s: %s", after, how, got)
		}
	}

	first := min(cut, len(stream))
	next := min(first+second, len(stream))
	pieces := [][]byte{stream[:first], stream[first:next], stream[next:]}
	for _, cuts := range [][][]byte{single(stream), pieces} {
		proxy, got := feed(t, url, cuts...)
		same(fmt.Sprintf("in %d pieces", len(cuts)), proxy, got)
	}

	proxy, lease, handshake := begin(t, url)
	client, server := socketPair(t)
	heard := make(chan string, 1)
	go func() { heard <- recite(server, pieces) }()
	got := ending{}
	rest, err := upstream.Drive(client, handshake)
	lease.Settle(err)
	if got.done = err == nil; got.done {
		more, _ := io.ReadAll(client)
		got.rest = string(rest) + string(more)
	}
	client.Close()
	got.sent, got.err = <-heard, err
	same("by Drive", proxy, got)

	proxy, lease, handshake = begin(t, url)
	received, outcome := e.carry(t, handshake, "", func(conn *net.TCPConn) { heard <- recite(conn, pieces) })
	lease.Settle(outcome.Err)
	got = ending{sent: <-heard, done: outcome.End != relay.HandshakeFailed}
	if got.rest = received; !got.done {
		got.err = outcome.Err
	}
	same("by the engine", proxy, got)
	return whole
}

// sameError compares an error of a driver with that of Feed, which has none where
// the proxy closes.
func sameError(got, fed error) bool {
	if got == nil || fed == nil || errors.Is(got, io.ErrUnexpectedEOF) {
		return fed == nil && (got == nil || errors.Is(got, io.ErrUnexpectedEOF))
	}
	return strings.HasSuffix(got.Error(), fed.Error()) && upstream.Denied(got) == upstream.Denied(fed)
}

// recite says everything without waiting for anything, and returns what it heard.
func recite(conn interface {
	net.Conn
	CloseWrite() error
}, pieces [][]byte,
) (heard string) {
	defer conn.Close()
	go func() {
		for _, piece := range pieces {
			if len(piece) > 0 {
				conn.Write(piece)
			}
		}
		conn.CloseWrite()
	}()
	all, _ := io.ReadAll(conn)
	return string(all)
}

// socketPair is a connection within the process.
func socketPair(t testing.TB) (client, server *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*net.UnixConn
	for _, fd := range fds {
		file := os.NewFile(uintptr(fd), "pair")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		ends = append(ends, conn.(*net.UnixConn))
	}
	return ends[0], ends[1]
}
