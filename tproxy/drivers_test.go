package tproxy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// A flow is carried by an event loop or by goroutines of its own, and nobody must
// be able to tell which. The tests of this file run on both.

// patience bounds every wait; nothing of it passes in a good run.
const patience = 30 * time.Second

// origin is where the clients of these tests believe to be going.
var origin = netip.MustParseAddrPort("203.0.113.7:9003")

// carrier is a server whose listener is an ordinary one, so that no test needs the
// privilege to open a transparent one, and the proxy that its flows go through.
type carrier struct {
	address string
	proxy   net.Listener
	records chan Record
}

// detaching is a flow that leaves its loop although it need not.
type detaching struct{ *flow }

func (d detaching) Route() (relay.Hop, error) {
	hop, err := d.flow.Route()
	if err == nil {
		hop = relay.Hop{Detach: d.flow.detach}
	}
	return hop, err
}

// drivers runs a test on a carrier of each kind.
func drivers(t *testing.T, test func(t *testing.T, c *carrier)) {
	for _, driver := range []string{"loop", "goroutines"} {
		t.Run(driver, func(t *testing.T) { test(t, startCarrier(t, driver == "goroutines")) })
	}
}

func startCarrier(t *testing.T, detach bool) *carrier {
	t.Helper()
	leaveNothing(t)
	c := &carrier{records: make(chan Record, 10_000)}
	var err error
	if c.proxy, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.proxy.Close() })
	proxy, err := upstream.Parse("http://" + c.proxy.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		config: Config{
			MaxFlows: 10_000, IdleTimeout: patience, HalfCloseTimeout: patience,
			Access: func(r Record) { c.records <- r },
			Log:    zerolog.Nop(),
			Dialer: &upstream.Dialer{ConnectTimeout: patience, HandshakeTimeout: patience},
		},
		policy: Policy{Upstream: upstream.NewGroup(upstream.First, proxy)},
	}
	var sockets [][]int
	for range 2 {
		sockets = append(sockets, []int{c.listen(t)})
	}
	s.forwarder = s.newForwarder()
	s.engine, err = relay.Open(relay.Config{
		Sockets: sockets,
		Accept: func(client, _ netip.AddrPort) relay.Session {
			s.open.Add(1)
			f := s.newFlow(client, origin)
			if detach {
				return detaching{f}
			}
			return f
		},
		ConnectTimeout: patience, HandshakeTimeout: patience, IdleTimeout: patience, HalfCloseTimeout: patience,
		MaxPipes: 64,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	t.Cleanup(func() {
		stop()
		select {
		case err := <-served:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Error("Serve does not return")
		}
		if open := s.open.Load(); open != 0 {
			t.Errorf("%d flows are still counted", open)
		}
	})
	return c
}

// listen opens a listening socket as the engine wants it, all on one address.
func (c *carrier) listen(t *testing.T) int {
	t.Helper()
	address := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if c.address != "" {
		address.Port = int(netip.MustParseAddrPort(c.address).Port())
	}
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err = errors.Join(err, unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		unix.Bind(socket, address), unix.Listen(socket, 4096)); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(socket)
	if err != nil {
		t.Fatal(err)
	}
	c.address = fmt.Sprintf("127.0.0.1:%d", bound.(*unix.SockaddrInet4).Port)
	return socket
}

// dial is a new client.
func (c *carrier) dial(t *testing.T) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", c.address, patience)
	return prepared(t, conn, err)
}

// accept is the far end of the next flow: what the proxy was asked for is read, and
// answered together with the first bytes from there.
func (c *carrier) accept(t *testing.T, early string) (*net.TCPConn, *bufio.Reader) {
	t.Helper()
	c.proxy.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
	accepted, err := c.proxy.Accept()
	conn := prepared(t, accepted, err)
	reader := bufio.NewReader(conn)
	for line := ""; line != "\r\n"; {
		if line, err = reader.ReadString('\n'); err != nil {
			t.Fatalf("read CONNECT: %v", err)
		}
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"+early); err != nil {
		t.Fatal(err)
	}
	return conn, reader
}

func prepared(t *testing.T, conn net.Conn, err error) *net.TCPConn {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// ended is the next flow to end.
func (c *carrier) ended(t *testing.T) Record {
	t.Helper()
	select {
	case record := <-c.records:
		return record
	case <-time.After(patience):
		t.Fatal("no flow ends")
		return Record{}
	}
}

// allWell takes the records of flows that all have to end well.
func (c *carrier) allWell(t *testing.T, flows int, check func(Record) bool) {
	t.Helper()
	for range flows {
		if record := c.ended(t); record.Err != nil || !check(record) {
			t.Fatalf("%+v", record)
		}
	}
}

// many runs so many clients and far ends, some at a time.
func many(t *testing.T, flows int, client func(number int), far func()) {
	const atOnce = 16
	var running sync.WaitGroup
	for worker := range atOnce {
		running.Go(func() {
			for i := worker; i < flows && !t.Failed(); i += atOnce {
				client(i)
			}
		})
		running.Go(func() {
			for i := worker; i < flows && !t.Failed(); i += atOnce {
				far()
			}
		})
	}
	running.Wait()
}

func TestBulkBothWays(t *testing.T) {
	size := int64(1 << 30)
	if testing.Short() {
		size = 64 << 20
	}
	drivers(t, func(t *testing.T, c *carrier) {
		client := c.dial(t)
		far, reader := c.accept(t, "")
		var sums [4]hash.Hash
		for i := range sums {
			sums[i] = sha256.New()
		}
		var running sync.WaitGroup
		produce := func(conn *net.TCPConn, sum hash.Hash, seed byte) {
			source := io.LimitReader(rand.NewChaCha8([32]byte{seed}), size)
			_, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(conn, sum)}, source, make([]byte, 256<<10))
			if err = errors.Join(err, conn.CloseWrite()); err != nil {
				t.Error(err)
			}
		}
		consume := func(from io.Reader, sum hash.Hash) {
			if n, err := io.CopyBuffer(sum, struct{ io.Reader }{from}, make([]byte, 256<<10)); err != nil || n != size {
				t.Errorf("read %d of %d bytes: %v", n, size, err)
			}
		}
		running.Go(func() { produce(client, sums[0], 1) })
		running.Go(func() { consume(reader, sums[1]) })
		running.Go(func() { produce(far, sums[2], 2) })
		running.Go(func() { consume(client, sums[3]) })
		running.Wait()
		for i := 0; i < 4; i += 2 {
			if string(sums[i].Sum(nil)) != string(sums[i+1].Sum(nil)) {
				t.Errorf("way %d: the hashes differ", i/2)
			}
		}
		c.allWell(t, 1, func(r Record) bool { return r.Sent == size && r.Received == size })
	})
}

// TestUrgentData: telnet sends its interrupt like that. Nothing is lost, before the mark,
// at it and behind it, however much is under way.
func TestUrgentData(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		for _, before := range []int{0, 10, 2 << 20} {
			client := c.dial(t)
			far, reader := c.accept(t, "")
			text := strings.Repeat("x", before)
			go func() {
				io.WriteString(client, text)
				raw, err := client.SyscallConn()
				if err != nil {
					t.Error(err)
					return
				}
				raw.Write(func(fd uintptr) bool {
					return unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) != unix.EAGAIN
				})
				io.WriteString(client, "behind")
				client.CloseWrite()
			}()
			far.SetReadDeadline(time.Now().Add(10 * time.Second))
			got, err := io.ReadAll(reader)
			if want := text + "!behind"; err != nil || string(got) != want {
				t.Errorf("%d bytes before the mark: got %d of %d bytes, %v", before, len(got), len(want), err)
			}
			far.Close()
			client.Close()
		}
	})
}

func TestSmallUploads(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		const flows = 2000
		text := func(i int) string { return strings.Repeat(fmt.Sprint(i, " "), i%700) }
		many(t, flows, func(i int) {
			conn := c.dial(t)
			io.WriteString(conn, text(i))
			conn.Close()
		}, func() {
			conn, reader := c.accept(t, "")
			got, err := io.ReadAll(reader)
			conn.Close()
			var i int
			fmt.Sscan(string(got), &i)
			if err != nil || string(got) != text(i) {
				t.Errorf("flow %d: read %d bytes, %v", i, len(got), err)
			}
		})
		c.allWell(t, flows, func(Record) bool { return true })
	})
}

func TestSmallDownloads(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		const flows = 2000
		text := strings.Repeat("0123456789abcdef", 300)
		many(t, flows, func(int) {
			conn := c.dial(t)
			if got, err := io.ReadAll(conn); err != nil || string(got) != text {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
			conn.Close()
		}, func() {
			conn, _ := c.accept(t, "")
			io.WriteString(conn, text)
			conn.Close()
		})
		c.allWell(t, flows, func(r Record) bool { return r.Received == int64(len(text)) })
	})
}

func TestEchoAfterHalfClose(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		const flows, size = 200, 300_000
		many(t, flows, func(i int) {
			conn := c.dial(t)
			text := strings.Repeat(fmt.Sprintf("%06d", i), size/6)
			go func() {
				io.WriteString(conn, text)
				conn.CloseWrite()
			}()
			if got, err := io.ReadAll(conn); err != nil || string(got) != text {
				t.Errorf("flow %d: read %d bytes, %v", i, len(got), err)
			}
			conn.Close()
		}, func() {
			conn, reader := c.accept(t, "")
			if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{reader}, make([]byte, 10_000)); err != nil {
				t.Error(err)
			}
			conn.Close()
		})
		c.allWell(t, flows, func(r Record) bool { return r.Sent == size && r.Received == size })
	})
}

// TestEarlyBytes: the client speaks before there is a tunnel, and the far side in
// the segment that opens it.
func TestEarlyBytes(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		for range 50 {
			client := c.dial(t)
			io.WriteString(client, "before the tunnel;")
			far, reader := c.accept(t, "with the answer;")
			io.WriteString(client, "after")
			client.CloseWrite()
			if got, err := io.ReadAll(reader); err != nil || string(got) != "before the tunnel;after" {
				t.Fatalf("the far side read %q, %v", got, err)
			}
			io.WriteString(far, "after")
			far.Close()
			if got, err := io.ReadAll(client); err != nil || string(got) != "with the answer;after" {
				t.Fatalf("the client read %q, %v", got, err)
			}
			c.allWell(t, 1, func(r Record) bool { return r.Sent == 23 && r.Received == 21 })
		}
	})
}

// TestResets: a reset of either side, at any moment, is one for the other.
func TestResets(t *testing.T) {
	moments := map[string]func(from, to *net.TCPConn){
		"at once":             func(_, _ *net.TCPConn) {},
		"after bytes":         func(from, to *net.TCPConn) { io.WriteString(from, "a"); to.Read(make([]byte, 1)) },
		"after an answer":     func(from, to *net.TCPConn) { io.WriteString(to, "a"); from.Read(make([]byte, 1)) },
		"after the other FIN": func(from, to *net.TCPConn) { to.CloseWrite(); io.ReadAll(from) },
		"nobody reads":        func(from, _ *net.TCPConn) { pour(from) },
		"it does not read":    func(_, to *net.TCPConn) { pour(to) },
	}
	drivers(t, func(t *testing.T, c *carrier) {
		for name, moment := range moments {
			for _, who := range []string{"client", "far side"} {
				from := c.dial(t)
				to, _ := c.accept(t, "")
				if who == "far side" {
					from, to = to, from
				}
				moment(from, to)
				from.SetLinger(0)
				from.Close()
				if n, err := io.Copy(io.Discard, to); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s, %s: the other side read %d bytes, then %v", who, name, n, err)
				}
				if record := c.ended(t); record.Err == nil {
					t.Errorf("%s, %s: the flow ended well: %+v", who, name, record)
				}
			}
		}
	})
}

// TestResetInTheHandshake: a client that is gone does not keep its flow waiting for
// the proxy, nor a proxy that is gone the client.
func TestResetInTheHandshake(t *testing.T) {
	drivers(t, func(t *testing.T, c *carrier) {
		client := c.dial(t)
		conn, err := c.proxy.Accept()
		far := prepared(t, conn, err)
		far.SetLinger(0)
		far.Close()
		if _, err := io.ReadAll(client); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client sees %v", err)
		}
		if record := c.ended(t); record.Err == nil {
			t.Errorf("%+v", record)
		}
	})
}

// pour writes until nobody takes it any more.
func pour(conn net.Conn) {
	conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	for block := make([]byte, 1<<20); ; {
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

// leaveNothing makes a test fail that leaves goroutines or descriptors behind. It is
// called before anything is opened.
func leaveNothing(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // the runtime opens its poller for good
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	goroutines, descriptors := runtime.NumGoroutine(), openDescriptors()
	t.Cleanup(func() {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			// What the runtime caches for splice(2) is closed by its finalizers.
			runtime.GC()
			if runtime.NumGoroutine() <= goroutines && openDescriptors() <= descriptors {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left behind: %d goroutines of %d before, %d descriptors of %d",
					runtime.NumGoroutine(), goroutines, openDescriptors(), descriptors)
				return
			}
		}
	})
}

func openDescriptors() int {
	entries, _ := os.ReadDir("/proc/self/fd")
	return len(entries)
}
