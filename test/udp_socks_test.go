package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// newUDPWorld is one whose SOCKS5 proxy carries UDP, and whose origin sends back what it
// gets on some ports.
func newUDPWorld(t *testing.T, ports ...int) *socksWorld {
	t.Helper()
	w := newSOCKSWorld(t)
	w.socks.Change(func() { w.socks.Associate = true })
	for _, port := range ports {
		w.echoUDP(w.Origin, port)
	}
	return w
}

// echoUDP sends back what comes to a port.
func (w *socksWorld) echoUDP(ns *netns.NS, port int) {
	w.t.Helper()
	var server net.PacketConn
	must(w.t, ns.Do(func() (err error) {
		server, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
		return err
	}))
	server.(*net.UDPConn).SetReadBuffer(1 << 20)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := server.ReadFrom(buffer)
			if err != nil {
				return
			}
			server.WriteTo(buffer[:n], from)
		}
	}()
	w.t.Cleanup(func() {
		server.Close()
		<-ended
	})
}

// echoed sends a datagram and says what becomes of it.
func echoed(t *testing.T, ns *netns.NS, to netip.AddrPort) string {
	t.Helper()
	conn, err := ns.Dial(t.Context(), "udp", to.String())
	must(t, err)
	defer conn.Close()
	// More than once, as every client does: while the rules change one may be lost.
	for range 3 {
		if _, err = conn.Write([]byte("hello")); err != nil {
			break
		}
		must(t, conn.SetReadDeadline(time.Now().Add(time.Second)))
		if _, err = conn.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	switch {
	case err == nil:
		return passes
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, os.ErrDeadlineExceeded):
		return dropped
	}
	return fmt.Sprint("ends in ", err)
}

const carriesUDP = "the upstream carries UDP"

// udpLine is a line of the access log about a UDP session.
type udpLine struct {
	flow
	Destinations      int
	SentDatagrams     int64 `json:"sent_datagrams"`
	ReceivedDatagrams int64 `json:"received_datagrams"`
}

func (g *gateway) udpLines() []udpLine {
	var lines []udpLine
	for line := range strings.Lines(g.output.String()) {
		var l udpLine
		if json.Unmarshal([]byte(line), &l) == nil && l.Message == "udp" {
			lines = append(lines, l)
		}
	}
	return lines
}

// TestUDPThroughSOCKS: QUIC's port passes through the proxy with no flag but its URL, over
// both families and on both engines; nothing goes past the proxy.
func TestUDPThroughSOCKS(t *testing.T) {
	for _, engine := range []string{"tproxy", "sk_lookup"} {
		t.Run(engine, func(t *testing.T) {
			if engine == "sk_lookup" {
				needsLookup(t)
			}
			w := newUDPWorld(t, 443, 5000)
			past := make([]net.PacketConn, 0, 2)
			for _, port := range []int{443, 5000} {
				must(t, w.Router.Do(func() error {
					conn, err := net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
					past = append(past, conn)
					return err
				}))
				defer past[len(past)-1].Close()
			}
			g := w.gateway("--engine", engine, "--udp", "5000=upstream,other=reject", "--output")
			g.waitFor(carriesUDP)
			for _, address := range both {
				for _, from := range []*netns.NS{w.Client, w.Gateway} {
					for _, port := range []uint16{443, 5000} {
						if got := echoed(t, from, netip.AddrPortFrom(address, port)); got != passes {
							t.Errorf("UDP to %s port %d %s", address, port, got)
						}
					}
				}
				if got := echoed(t, w.Client, netip.AddrPortFrom(address, 9)); got != refused {
					t.Errorf("UDP to %s, to a port that is to be refused, %s", address, got)
				}
			}
			for _, conn := range past {
				must(t, conn.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
				if _, from, err := conn.ReadFrom(make([]byte, 10)); err == nil {
					t.Errorf("%v went past the proxy", from)
				}
			}
			if n := w.socks.Associations(); n != 8 {
				t.Errorf("the proxy has %d associations", n)
			}
			g.stop()
			lines := g.udpLines()
			if len(lines) != 8 {
				t.Errorf("%d lines in the access log", len(lines))
			}
			for _, l := range lines {
				if l.Way != "upstream" || l.Upstream != "socks5://"+lab.Proxy4.String()+":1080" || l.SentDatagrams < 1 || l.ReceivedDatagrams < 1 ||
					l.Sent != 5*l.SentDatagrams || l.Received != 5*l.ReceivedDatagrams || l.Destinations != 1 || l.End != "the gateway stops" {
					t.Errorf("access line %+v", l)
				}
			}
			if !within(2*time.Second, func() bool { return w.socks.Associations() == 0 }) {
				t.Errorf("%d associations are left", w.socks.Associations())
			}
			if strings.Contains(g.output.String(), password) {
				t.Error("the password is in the log")
			}
		})
	}
}

// TestUDPNotCarried: what the proxy does not carry is refused at once, and carried once it
// does.
func TestUDPNotCarried(t *testing.T) {
	for _, fail := range []string{"open", "closed"} {
		w := newUDPWorld(t, 443)
		w.echoUDP(w.Router, 443) // past the proxy
		w.socks.Change(func() { w.socks.Associate = false })
		g := w.gateway("--fail", fail)
		g.waitFor("the upstream does not carry UDP")
		g.waitFor("Command not supported")
		want := func(fate string) {
			t.Helper()
			for _, address := range both {
				if got := echoed(t, w.Client, netip.AddrPortFrom(address, 443)); got != fate {
					t.Errorf("it %s, want: it %s", got, fate)
				}
			}
		}
		want(refused)
		w.socks.Change(func() { w.socks.Associate = true })
		must(t, g.command.Process.Signal(syscall.SIGHUP))
		g.waitFor(carriesUDP)
		want(passes)
		if n := w.socks.Associations(); n != 2 {
			t.Errorf("%d associations", n)
		}

		// The proxy goes, and with it all associations.
		w.socks.Close()
		if !within(5*time.Second, func() bool {
			return echoed(t, w.Client, netip.AddrPortFrom(lab.Origin4, 443)) == refused
		}) {
			t.Error("without the proxy it is not refused")
		}
		want(refused)
		if fail == "closed" {
			g.kill()
			want(refused)
		}
	}
}

// TestUDPRefusedWithoutSOCKS: what no upstream can carry is refused at the start, in a
// line.
func TestUDPRefusedWithoutSOCKS(t *testing.T) {
	w := newWorld(t)
	g := start(t, w.Gateway, program("--upstream", upstream(), "--udp", "443=upstream"))
	g.wait(5 * time.Second)
	if g.err == nil || !strings.Contains(g.output.String(), "--udp 443=upstream: only a SOCKS5 proxy carries UDP") || strings.Count(g.output.String(), "\n") != 1 {
		t.Errorf("%v: %s", g.err, g.output)
	}
}

// TestUDPLeftAlone: what is exempt, not to a captured port, or not of a client is forwarded
// as ever.
func TestUDPLeftAlone(t *testing.T) {
	w := newUDPWorld(t)
	g := w.gateway("--no-proxy", lab.Origin4.String(), "--allow-clients", lab.Client4.String()+","+lab.Client6.String())
	g.waitFor(carriesUDP)
	for _, c := range []struct {
		from, arrives *netns.NS
		to            netip.Addr
		port          int
	}{
		{w.Client, w.Router, lab.Origin4, 443}, // exempt
		{w.Client, w.Router, lab.Origin6, 123}, // not captured
		{w.Server, w.Router, lab.Origin6, 443}, // no client
		{w.Client, w.Server, lab.Server4, 443}, // beside the client
		{w.Client, w.Gateway, lab.Gateway6, 443},
		{w.Gateway, w.Router, lab.Origin6, 443}, // no --output
	} {
		var server net.PacketConn
		must(t, c.arrives.Do(func() (err error) {
			server, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", c.port))
			return err
		}))
		conn, err := c.from.Dial(t.Context(), "udp", netip.AddrPortFrom(c.to, uint16(c.port)).String())
		must(t, err)
		_, err = conn.Write([]byte("hello"))
		must(t, err, server.SetReadDeadline(time.Now().Add(time.Second)))
		if _, _, err := server.ReadFrom(make([]byte, 10)); err != nil {
			t.Errorf("UDP to %s port %d: %v", c.to, c.port, err)
		}
		conn.Close()
		server.Close()
	}
	if n := w.socks.Associations(); n != 0 {
		t.Errorf("%d associations", n)
	}
	g.stop()
}

// TestUDPByName: with --fake-ip the proxy is asked for names, and the answers come from the
// addresses that clients were told.
func TestUDPByName(t *testing.T) {
	w := newUDPWorld(t, 443)
	g := w.gateway("--fake-ip")
	g.waitFor(carriesUDP)
	for _, name := range []string{"origin.test", "six.test"} {
		for _, kind := range kinds { // whatever family the proxy reaches it in
			address := resolve(t, w.Client, name, kind)
			if got := echoed(t, w.Client, netip.AddrPortFrom(address, 443)); got != passes {
				t.Errorf("UDP to %s, %s, %s", name, address, got)
			}
			if !slices.Contains(w.socks.Reached(), name) {
				t.Errorf("the proxy was asked for %q", w.socks.Reached())
			}
			if got := echoed(t, w.Client, netip.AddrPortFrom(address, 444)); got != refused {
				t.Errorf("UDP to a port that is not carried %s", got)
			}
		}
	}
	g.stop()
	for _, l := range g.udpLines() {
		if l.NameFrom != "fake-ip" {
			t.Errorf("access line %+v", l)
		}
	}
}

// TestUDPMany: 1,000 clients' ports talk to 10 destinations each through the program. What
// each pair sends keeps its order, and when all is over everything is given back.
func TestUDPMany(t *testing.T) {
	const servers, rounds, step = 10, 3, 50
	clients := 1000
	if testing.Short() {
		clients = 200
	}
	var ports []int
	for server := range servers {
		ports = append(ports, 5000+server)
	}
	w := newUDPWorld(t, ports...)
	g := w.gateway("--udp", "5000-5009=upstream", "--udp-timeout", "3s")
	g.waitFor(carriesUDP)
	process := g.command.Process
	socketsBefore, memoryBefore := sockets(t, process), memory(t, process)
	// No address may have more than a quarter of the sessions.
	addresses := [][]string{
		{lab.Client4.String(), "192.0.2.31", "192.0.2.32", "192.0.2.33"},
		{lab.Client6.String(), "2001:db8:1::31", "2001:db8:1::32", "2001:db8:1::33"},
	}
	for i, prefix := range []string{"/24", "/64"} {
		for _, address := range addresses[i][1:] {
			must(t, w.Client.Addr("eth0", address+prefix))
		}
	}
	conns := make([]*net.UDPConn, clients)
	must(t, w.Client.Do(func() (err error) {
		for i := range conns {
			if conns[i], err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addresses[i%2][i/2%4])}); err != nil {
				return err
			}
		}
		return nil
	}))
	buffer := make([]byte, 100)
	next := func(conn *net.UDPConn) (netip.AddrPort, string) {
		t.Helper()
		must(t, conn.SetReadDeadline(time.Now().Add(3*time.Second)))
		n, from, err := conn.ReadFromUDPAddrPort(buffer)
		must(t, err)
		return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), string(buffer[:n])
	}
	for round := range rounds {
		for first := 0; first < clients; first += step {
			for i := first; i < first+step; i++ {
				for server := range servers {
					_, err := conns[i].WriteToUDPAddrPort(fmt.Appendf(nil, "%d %d", i, round), netip.AddrPortFrom(both[i%2], uint16(5000+server)))
					must(t, err)
					if round == 0 && server == 0 {
						next(conns[i]) // the association is there
					}
				}
			}
			for i := first; i < first+step; i++ {
				for server := range servers {
					if round == 0 && server == 0 {
						continue
					}
					from, said := next(conns[i])
					if from.Addr() != both[i%2] || said != fmt.Sprintf("%d %d", i, round) {
						t.Fatalf("client %d in round %d gets %q from %s", i, round, said, from)
					}
				}
			}
		}
	}
	t.Logf("%d associations, %d more sockets, %d KiB more memory", w.socks.Associations(), sockets(t, process)-socketsBefore,
		(memory(t, process)-memoryBefore)>>10)
	for _, conn := range conns {
		conn.Close()
	}
	if !within(10*time.Second, func() bool { return w.socks.Associations() == 0 && sockets(t, process) == socketsBefore }) {
		t.Errorf("%d associations and %d sockets are left, there were %d", w.socks.Associations(), sockets(t, process), socketsBefore)
	}
	t.Logf("%d KiB more memory afterwards", (memory(t, process)-memoryBefore)>>10)
	lines := g.udpLines()
	if len(lines) != clients {
		t.Errorf("%d lines in the access log", len(lines))
	}
	for _, l := range lines {
		if l.End != "idle" || l.Destinations != servers || l.SentDatagrams != servers*rounds || l.ReceivedDatagrams != servers*rounds {
			t.Fatalf("access line %+v", l)
		}
	}
	g.stop()
}

// TestUDPOfContainers: packets of a bridge that pass the rules as frames are carried as well.
func TestUDPOfContainers(t *testing.T) {
	needsLookup(t)
	w := newWorldOfHosts(t, false)
	filterBridges(t, w.Gateway, "1")
	s := &socksWorld{w.world, &lab.SOCKSProxy{Associate: true}}
	must(t, s.socks.Start(w.Proxy, lab.SOCKSPort))
	t.Cleanup(s.socks.Close)
	s.echoUDP(w.Origin, 443)
	g := startGateway(t, w.Gateway, "--upstream", fmt.Sprintf("socks5://%s", lab.Proxy4), "--engine", "auto")
	g.waitFor(carriesUDP)
	for _, from := range []*netns.NS{w.container, w.Client} {
		for _, address := range both {
			if got := echoed(t, from, netip.AddrPortFrom(address, 443)); got != passes {
				t.Errorf("UDP to %s %s", address, got)
			}
		}
	}
	if !strings.Contains(g.output.String(), `"engine":"sk_lookup"`) {
		t.Error("the engine is another one")
	}
	g.stop()
}
