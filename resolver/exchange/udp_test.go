package exchange_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// datagrams is a stand-in server of UDP on loopback.
type datagrams struct {
	conn   *net.UDPConn
	handle func(d *datagrams, from *net.UDPAddr, query []byte)
	asked  atomic.Int64
}

func (d *datagrams) start(t testing.TB) *datagrams {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	d.conn = conn
	var serving sync.WaitGroup
	serving.Go(func() {
		buffer := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFromUDP(buffer)
			if err != nil {
				return
			}
			d.asked.Add(1)
			d.handle(d, from, bytes.Clone(buffer[:n]))
		}
	})
	t.Cleanup(func() { conn.Close(); serving.Wait() })
	return d
}

func (d *datagrams) dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "udp", d.conn.LocalAddr().String())
}

func silentUDP(t testing.TB) *datagrams {
	return (&datagrams{handle: func(*datagrams, *net.UDPAddr, []byte) {}}).start(t)
}

func TestUDPQueriesAreHardToGuess(t *testing.T) {
	wantGoroutines(t)
	const name = "abcdefghijklmnopqrstuvwxyz.Example.org"
	ids, cases, ports := make(map[string]bool), make(map[string]bool), make(map[int]bool)
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		ids[string(query[:2])] = true
		cases[string(query[12:])] = true
		ports[from.Port] = true
		d.conn.WriteToUDP(answer(query, 0), from)
	}}).start(t)
	server := closed(t, exchange.NewUDP("udp.test", d.dial, nil, exchange.Config{}))
	for range 100 {
		if err := ask(server, t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	d.conn.Close()
	if len(ids) < 95 || len(cases) < 99 || len(ports) < 50 {
		t.Errorf("of 100 queries %d ids, %d cases, %d ports", len(ids), len(cases), len(ports))
	}
}

// TestUDPAnswerHasTheCaseOfTheQuery, wherever it repeats the name.
func TestUDPAnswerHasTheCaseOfTheQuery(t *testing.T) {
	wantGoroutines(t)
	records := func(query []byte) []byte {
		message := answer(query, 0)
		message[7] = 2
		message = append(message, query[12:len(query)-4]...)
		return append(message, 0, 1, 0, 1, 0, 0, 1, 0, 0, 4, 192, 0, 2, 2)
	}
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		d.conn.WriteToUDP(append(records(query), "behind the end"...), from)
	}}).start(t)
	server := closed(t, exchange.NewUDP("udp.test", d.dial, nil, exchange.Config{}))
	for range 10 {
		q := query("mIxEdcase.example.ORG")
		got, err := server.Exchange(t.Context(), q)
		if want := records(q); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%q, %v\nwant %q", got, err, want)
		}
	}
}

// forgeries returns answers to query as somebody would guess who does not see it.
func forgeries(query []byte) [][]byte {
	var forged [][]byte
	add := func(change func(message []byte) []byte) {
		message := answer(query, 0)
		message[len(message)-1] = 66
		forged = append(forged, change(message))
	}
	add(func(m []byte) []byte { m[0]++; return m })
	add(func(m []byte) []byte { m[13] ^= 0x20; return m })
	add(func(m []byte) []byte { m[13] = 'x'; return m })
	add(func(m []byte) []byte { m[len(query)-3] = 28; return m })
	add(func(m []byte) []byte { m[2] &^= 0x80; return m })
	add(func(m []byte) []byte { m[2] |= 0x28; return m })
	add(func(m []byte) []byte { m[5] = 2; return m })
	add(func(m []byte) []byte { return m[:len(m)-1] })
	add(func(m []byte) []byte { return m[:5] })
	add(func(m []byte) []byte { return nil })
	return forged
}

func TestForgedUDPAnswersAreIgnored(t *testing.T) {
	wantGoroutines(t)
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		for _, forged := range forgeries(query) {
			d.conn.WriteToUDP(forged, from)
		}
		d.conn.WriteToUDP(answer(query, 0), from)
	}}).start(t)
	group := closed(t, exchange.NewGroup("group", exchange.NewUDP("udp.test", d.dial, unusable(t), exchange.Config{})))
	if err := ask(group, t.Context(), "a.test"); err != nil {
		t.Fatal(err)
	}
	if forged := group.Stats().Servers[0].Mismatched; forged != int64(len(forgeries(query("a.test")))) {
		t.Errorf("%d mismatched", forged)
	}
}

// unusable is a Dial that must not be called.
func unusable(t testing.TB) exchange.Dial {
	return func(context.Context) (net.Conn, error) {
		t.Error("TCP was used")
		return nil, errors.New("unusable")
	}
}

// TestEveryIDForged: all 65,536 answers that somebody can guess who knows the name
// but not its case come first. With TCP to fall back on the answer comes from there.
// Without, it is awaited.
func TestEveryIDForged(t *testing.T) {
	wantGoroutines(t)
	const name = "abcdefghijklmnop.example.org"
	tcp := (&standIn{handle: plain}).start(t)
	for _, dial := range []exchange.Dial{tcp.dial, nil} {
		flooded := false
		d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
			forged := answer(query, 0)
			copy(forged[12:], bytes.ToLower(query[12:len(query)-4]))
			forged[len(forged)-1] = 66
			for id := range 1 << 16 {
				if flooded {
					break
				}
				forged[0], forged[1] = byte(id>>8), byte(id)
				d.conn.WriteToUDP(forged, from)
			}
			// The kernel drops it for as long as there is no room.
			flooded = true
			for range 20 {
				d.conn.WriteToUDP(answer(query, 0), from)
				time.Sleep(20 * time.Millisecond)
			}
		}}).start(t)
		group := exchange.NewGroup("group", exchange.NewUDP("udp.test", d.dial, dial, exchange.Config{Timeout: 20 * time.Second}))
		if err := ask(group, t.Context(), name); err != nil {
			t.Error(err)
		}
		if mismatched := group.Stats().Servers[0].Mismatched; dial != nil && mismatched != 16 || dial == nil && mismatched < 1000 {
			t.Errorf("%d mismatched", mismatched)
		}
		group.Close()
	}
}

func TestServerThatChangesCaseIsAskedOverTCP(t *testing.T) {
	wantGoroutines(t)
	tcp := (&standIn{handle: plain}).start(t)
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		lower := answer(query, 0)
		copy(lower[12:], bytes.ToLower(query[12:len(query)-4]))
		d.conn.WriteToUDP(lower, from)
	}}).start(t)
	server := closed(t, exchange.NewUDP("udp.test", d.dial, tcp.dial, exchange.Config{}))
	within(t, 2*time.Second, "the answer", func() {
		if err := ask(server, t.Context(), "abcdefghijklmnop.example.org"); err != nil {
			t.Error(err)
		}
	})
}

func TestTruncatedAnswerIsAskedForOverTCP(t *testing.T) {
	wantGoroutines(t)
	tcp := (&standIn{handle: plain}).start(t)
	for name, reply := range map[string]func(query []byte) []byte{
		"TC":            func(q []byte) []byte { m := withRcode(q, 0); m[2] |= 2; return m },
		"cut and TC":    func(q []byte) []byte { m := answer(q, 0); m[2] |= 2; return m[:len(m)-3] },
		"giant":         func(q []byte) []byte { return answer(q, 5000) },
		"without query": func(q []byte) []byte { return append(q[:2:2], 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0) },
	} {
		d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
			d.conn.WriteToUDP(reply(query), from)
		}}).start(t)
		server := exchange.NewUDP("udp.test", d.dial, tcp.dial, exchange.Config{})
		within(t, 500*time.Millisecond, name, func() {
			if err := ask(server, t.Context(), "A.test"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		server.Close()
	}

	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		message := withRcode(query, 0)
		message[2] |= 2
		d.conn.WriteToUDP(message, from)
	}}).start(t)
	server := closed(t, exchange.NewUDP("udp.test", d.dial, nil, exchange.Config{}))
	if got, err := server.Exchange(t.Context(), query("a.test")); err != nil || got[2]&2 == 0 {
		t.Errorf("without TCP: %x, %v", got, err)
	}
	refused := exchange.NewUDP("udp.test", d.dial, func(context.Context) (net.Conn, error) { return nil, syscall.EPERM }, exchange.Config{})
	defer refused.Close()
	if _, err := refused.Exchange(t.Context(), query("a.test")); !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "udp.test: over TCP: ") {
		t.Error(err)
	}
}

func TestLostDatagramIsSentAgain(t *testing.T) {
	wantGoroutines(t)
	var first []byte
	d := (&datagrams{handle: func(d *datagrams, from *net.UDPAddr, query []byte) {
		if first == nil {
			first = query
		} else if !bytes.Equal(first, query) {
			t.Error("the second query is another one")
		} else {
			d.conn.WriteToUDP(answer(query, 0), from)
		}
	}}).start(t)
	server := closed(t, exchange.NewUDP("udp.test", d.dial, unusable(t), exchange.Config{}))
	within(t, 2*time.Second, "the answer", func() {
		if err := ask(server, t.Context(), "a.test"); err != nil {
			t.Error(err)
		}
	})
}

func TestUDPErrors(t *testing.T) {
	wantGoroutines(t)
	d := silentUDP(t)
	server := closed(t, exchange.NewUDP("silent.test", d.dial, nil, exchange.Config{Timeout: 100 * time.Millisecond}))
	err := ask(server, t.Context(), "a.test")
	if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "ask silent.test: no answer within 100ms: context deadline exceeded" {
		t.Error(err)
	}
	d.conn.Close()
	within(t, time.Second, "the refusal", func() {
		if err := ask(server, t.Context(), "a.test"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	})
}
