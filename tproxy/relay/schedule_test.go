package relay_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// FuzzSchedule lets two applications write, read, close and reset in an arbitrary
// order, with socket buffers so small that writes are short everywhere, and
// compares what each sees with what a wire would have shown it.
func FuzzSchedule(f *testing.F) {
	f.Add([]byte{0, 0xf8, 0xf9, 0xfa, 0xfb, 4, 5})
	f.Add([]byte{1, 0xf8, 4, 0xf3, 0xf9, 0xf2, 5})
	f.Add([]byte{2, 0x98, 0x99, 6})
	f.Add([]byte{3, 0xf8, 0xf8, 0xf8, 0xf3, 7})
	random := rand.New(rand.NewPCG(5, 6))
	for range 60 {
		script := make([]byte, 5+random.IntN(60))
		for i := range script {
			script[i] = byte(random.Uint32())
		}
		f.Add(script)
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 200 {
			return
		}
		runSchedule(t, script)
	})
}

// The first byte of a script chooses the circumstances, each further one is an
// operation: what in the low three bits, how much in the others.
const (
	withHandshake = 1 << iota
	smallBuffers
	withPipes
)

// application is one end of the modelled wire.
type application struct {
	name     string
	conn     *net.TCPConn
	to       *application
	written  int  // bytes that its writes have taken
	finished bool // it has sent a FIN
	read     int  // bytes that it has read
	ended    bool // it has read a FIN
	broken   bool // it has reset the connection
}

// content is the byte at a place of what an application writes.
func (a *application) content(place int) byte {
	return byte(place*7+place>>8+place>>16) ^ a.name[0]
}

func (a *application) write(t *testing.T, n int) {
	if a.finished {
		return
	}
	text := make([]byte, n)
	for i := range text {
		text[i] = a.content(a.written + i)
	}
	a.conn.SetWriteDeadline(time.Now().Add(2 * time.Millisecond))
	n, err := a.conn.Write(text)
	a.written += n
	a.judge(t, "write", err)
}

func (a *application) take(t *testing.T, n int, patience time.Duration) {
	text := make([]byte, n)
	a.conn.SetReadDeadline(time.Now().Add(patience))
	n, err := a.conn.Read(text)
	for i, got := range text[:n] {
		if want := a.to.content(a.read + i); got != want {
			t.Fatalf("%s: byte %d is %#x, want %#x", a.name, a.read+i, got, want)
		}
	}
	a.read += n
	if a.read > a.to.written {
		t.Fatalf("%s has read %d bytes of %d", a.name, a.read, a.to.written)
	}
	if err == io.EOF {
		if !a.to.finished || a.read != a.to.written {
			t.Fatalf("%s: FIN after %d of %d bytes, sent: %t", a.name, a.read, a.to.written, a.to.finished)
		}
		a.ended = true
		return
	}
	a.judge(t, "read", err)
}

// judge checks that an operation fails for a reason only.
func (a *application) judge(t *testing.T, action string, err error) {
	if err != nil && !a.to.broken && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%s: %s: %v, although the other side is well", a.name, action, err)
	}
}

func (a *application) finish(t *testing.T) {
	if !a.finished {
		a.finished = true
		a.judge(t, "send FIN", a.conn.CloseWrite())
	}
}

func runSchedule(t *testing.T, script []byte) {
	if len(script) == 0 {
		return
	}
	circumstances := script[0]
	p := listenPeer(t)
	session, config := p.to, relay.Config{}
	if circumstances&withHandshake != 0 {
		session = p.through
	}
	if circumstances&withPipes != 0 {
		config.MaxPipes = 2
	}
	shrink := func(socket int) {
		if circumstances&smallBuffers != 0 {
			unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<10)
			unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_RCVBUF, 32<<10)
		}
	}
	leaks(t)
	socket, address := listen(t, "127.0.0.1:0")
	shrink(socket)
	config.Sockets = [][]int{{socket}}
	g := start(t, 0, config, session)
	g.address = address.String()

	client := &application{name: "client", conn: g.dial(t)}
	server := &application{name: "server", conn: p.next(t), to: client}
	client.to = server
	if circumstances&withHandshake != 0 {
		client.write(t, 10)
		grant(t, server.conn, granted)
	}
	for _, conn := range []*net.TCPConn{client.conn, server.conn} {
		raw, err := conn.SyscallConn()
		check(t, err)
		raw.Control(func(fd uintptr) { shrink(int(fd)) })
	}

	for _, operation := range script[1:] {
		amount := 1 << ((operation >> 3) % 18)
		switch operation & 7 {
		case 0:
			client.write(t, amount)
		case 1:
			server.write(t, amount)
		case 2:
			client.take(t, amount, time.Millisecond)
		case 3:
			server.take(t, amount, time.Millisecond)
		case 4:
			client.finish(t)
		case 5:
			server.finish(t)
		case 6, 7:
			if operation>>3 > 2 {
				continue // seldom
			}
			broken := client
			if operation&7 == 7 {
				broken = server
			}
			broken.broken = true
			reset(t, broken.conn)
			expectBroken(t, broken.to)
			return
		}
	}
	client.finish(t)
	server.finish(t)
	deadline := time.Now().Add(patience)
	for _, reader := range []*application{client, server, client} {
		for !reader.ended {
			reader.take(t, 1<<17, 20*time.Millisecond)
			if other := reader.to; !other.ended {
				other.take(t, 1<<17, time.Millisecond)
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s has read %d of %d bytes and no FIN", reader.name, reader.read, reader.to.written)
			}
		}
	}
	want := relay.Outcome{Sent: int64(client.written), Received: int64(server.written), End: relay.Orderly}
	got := g.outcome(t)
	if got.Sent != want.Sent || got.Received != want.Received || got.End != want.End {
		t.Fatalf("%+v, want %+v", got, want)
	}
}

// expectBroken reads what is left, which ends by an error, or by a FIN that was
// sent before; then writing fails.
func expectBroken(t *testing.T, a *application) {
	for deadline := time.Now().Add(patience); ; {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not notice the reset", a.name)
		}
		if !a.ended {
			text := make([]byte, 1<<16)
			a.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			n, err := a.conn.Read(text)
			for i, got := range text[:n] {
				if want := a.to.content(a.read + i); got != want {
					t.Fatalf("%s: byte %d is %#x, want %#x", a.name, a.read+i, got, want)
				}
			}
			a.read += n
			switch {
			case err == io.EOF && !a.to.finished:
				t.Fatalf("%s: a FIN that nobody sent, after %d of %d bytes", a.name, a.read, a.to.written)
			case err == io.EOF:
				a.ended = true
			case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
				return
			}
			continue
		}
		a.conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := fmt.Fprint(a.conn, "x"); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if a.finished {
			return // it can neither read nor write: nothing is left to notice
		}
	}
}
