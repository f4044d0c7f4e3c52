package relay_test

import (
	"bufio"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/relay"
)

// hop is a next hop that serves by itself, and knows its connections.
type hop struct {
	peer
	mutex   sync.Mutex
	all     int        // connections ever
	waiting []net.Conn // those on which nothing has come
	rude    bool       // to reset the next on which something comes
}

func listenHop(t *testing.T) *hop {
	t.Helper()
	h := &hop{peer: listenPeer(t)}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := h.Accept()
			if err != nil {
				return
			}
			h.mutex.Lock()
			h.all++
			h.waiting = append(h.waiting, conn)
			h.mutex.Unlock()
			serving.Go(func() { h.serve(conn) })
		}
	})
	t.Cleanup(func() {
		h.Close()
		h.drop()
		serving.Wait()
	})
	return h
}

// serve grants a tunnel and sends back what comes.
func (h *hop) serve(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	_, err := reader.Peek(1)
	h.mutex.Lock()
	h.waiting = slices.DeleteFunc(h.waiting, func(other net.Conn) bool { return other == conn })
	rude := err == nil && h.rude
	if rude {
		h.rude = false
	}
	h.mutex.Unlock()
	if rude {
		conn.(*net.TCPConn).SetLinger(0)
		return
	}
	if _, err := reader.Discard(len(question)); err != nil {
		return
	}
	io.WriteString(conn, granted)
	io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{reader}) // the pipes of splice would outlive the test
}

// drop closes the connections on which nothing has come.
func (h *hop) drop() {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	for _, conn := range h.waiting {
		conn.Close()
	}
}

// ahead is how many connections wait for a flow.
func (h *hop) ahead() int {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	return len(h.waiting)
}

// warmly is a session whose hop may be connected to ahead.
func (h *hop) warmly() *stub {
	s := h.through()
	s.hop.Warm = true
	return s
}

// echo takes a flow to its end.
func echo(t *testing.T, g *gateway) {
	t.Helper()
	conn := g.dial(t)
	send(t, conn, "hello")
	check(t, conn.CloseWrite())
	expectEnd(t, conn, "hello")
	if outcome := g.outcome(t); outcome.End != relay.Orderly {
		t.Fatalf("%+v", outcome)
	}
}

// TestWarm opens connections ahead once a connect was measured: one more than flows came
// at once, each for one flow.
func TestWarm(t *testing.T) {
	h := listenHop(t)
	g := start(t, 1, relay.Config{MaxWarm: 8}, h.warmly)
	const flows = 20
	for number := range flows {
		echo(t, g)
		eventually(t, "two stand ready", func() bool { return h.ahead() >= 2 })
		if warm := g.Stats().Warm; warm != int64(number) {
			t.Fatalf("%d flows found a connection, of %d after the first", warm, number)
		}
	}
	if h.all != flows+h.ahead() || h.ahead() > 8 {
		t.Errorf("%d connections for %d flows, of which %d wait", h.all, flows, h.ahead())
	}

	t.Run("closed by the other side", func(t *testing.T) {
		h.drop()
		eventually(t, "none stands ready", func() bool { return h.ahead() == 0 })
		before := g.Stats().Warm
		echo(t, g)
		if g.Stats().Warm != before {
			t.Error("a closed connection was used")
		}
		eventually(t, "two stand ready", func() bool { return h.ahead() >= 2 })
	})
	t.Run("reset by the other side when it is used", func(t *testing.T) {
		h.mutex.Lock()
		h.rude = true
		h.mutex.Unlock()
		echo(t, g) // the stub would not retry
		eventually(t, "two stand ready", func() bool { return h.ahead() >= 2 })
	})
	t.Run("in another network", func(t *testing.T) {
		before := g.Stats().Warm
		g.NetworkChanged()
		echo(t, g)
		if g.Stats().Warm != before {
			t.Error("a connection of the former network was used")
		}
		eventually(t, "two stand ready", func() bool { return h.ahead() >= 2 })
	})
	t.Run("after a burst", func(t *testing.T) {
		var conns []*net.TCPConn
		for range 50 {
			conns = append(conns, g.dial(t))
		}
		eventually(t, "all that may be stand ready", func() bool { return h.ahead() == 8 })
		for _, conn := range conns {
			check(t, conn.CloseWrite())
			expectEnd(t, conn, "")
			g.outcome(t)
		}
	})
}

// TestWarmNot opens nothing ahead where that is not asked for, or not worth while.
func TestWarmNot(t *testing.T) {
	for name, config := range map[string]relay.Config{
		"off":  {},
		"near": {MaxWarm: 8, WarmAbove: time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			h := listenHop(t)
			g := start(t, 1, config, h.warmly)
			for range 5 {
				echo(t, g)
			}
			if h.all != 5 || g.Stats().Warm != 0 {
				t.Errorf("%d connections for 5 flows, %d of them ahead", h.all, g.Stats().Warm)
			}
		})
	}
}
