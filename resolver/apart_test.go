package resolver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// named is a way with a name of its own.
type named struct {
	wayFunc
	name string
}

func (n named) String() string { return n.name }

// silent is a way of servers that do not answer.
func silent(ctx context.Context, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestSlowWayKeepsNobodyElseWaiting: while every question to one way is stuck, others are
// answered, and so is what nobody has to be asked for.
func TestSlowWayKeepsNobodyElseWaiting(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{
		Zones:       []Zone{{Way: named{silent, "slow"}}, {Suffix: "corp.test", Way: named{echoing(t, &asked), "fast"}}},
		MaxInFlight: 200, MaxPerClient: 1000,
	})
	conn, err := net.Dial("udp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for i := range 250 { // more than may be in flight, and fewer than fill the queue of a socket
		packed, err := question(fmt.Sprintf("n%d.test.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(packed)
	}
	for s.inFlight.Load() < 150 {
		time.Sleep(time.Millisecond)
	}
	for _, name := range []string{"host.corp.test.", "localhost.", "other.corp.test."} {
		start := time.Now()
		if answer := s.ask(t, "udp", question(name, dns.TypeA)); len(answer.Answer) != 1 || time.Since(start) > time.Second {
			t.Errorf("%s: %v after %v", name, answer, time.Since(start))
		}
	}
}

// TestNamesOfOthers: a client that shares an entry with others does not choose the name
// under which their flows leave.
func TestNamesOfOthers(t *testing.T) {
	wire := func(name string) []byte {
		packed := make([]byte, 255)
		end, err := dns.PackDomainName(name, packed, 0, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		return packed[:end]
	}
	address := netip.MustParseAddr("203.0.113.7")
	victim, other, flow := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("192.0.2.1")
	for _, c := range []struct {
		name string
		told []any // a client and its name, in turn
		want string
	}{
		{"one client", []any{victim, "good.org."}, "good.org"},
		{"it asks for another", []any{victim, "good.org.", victim, "also.org."}, "also.org"},
		{"two, of one mind", []any{victim, "good.org.", other, "good.org."}, "good.org"},
		{"two that differ", []any{victim, "good.org.", other, "evil.org."}, ""},
		{"and again", []any{victim, "good.org.", other, "evil.org.", other, "evil.org."}, ""},
		{"one of two changes its mind", []any{victim, "good.org.", other, "good.org.", victim, "new.org."}, ""},
	} {
		told := newTold()
		for i := 0; i < len(c.told); i += 2 {
			told.remember(c.told[i].(netip.Addr), address, wire(c.told[i+1].(string)))
		}
		name, ok := told.name(flow, address)
		if ok != (c.want != "") || ok && name != c.want {
			t.Errorf("%s: %q, %t; want %q", c.name, name, ok, c.want)
		}
	}
}

// TestTruncatedAnswer: a server's partial answer is not passed on as whole.
func TestTruncatedAnswer(t *testing.T) {
	way := wayFunc(func(_ context.Context, query []byte) ([]byte, error) {
		m := new(dns.Msg)
		if err := m.Unpack(query); err != nil {
			return nil, err
		}
		m.Response, m.Truncated = true, true
		return m.Pack()
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}})
	if answer := s.ask(t, "tcp", question("a.test.", dns.TypeA)); answer.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v", answer)
	}
}

// TestServerThatAsksBack gets no answer to what it would be asked for.
func TestServerThatAsksBack(t *testing.T) {
	var asked atomic.Int64
	way := echoing(t, &asked)
	s := serve(t, Config{Zones: []Zone{{Way: way}, {Suffix: "corp.test", Way: way, Servers: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}}})
	if answer := s.ask(t, "udp", question("unknown.corp.test.", dns.TypeA)); answer.Rcode != dns.RcodeRefused {
		t.Errorf("%v", answer)
	}
	if answer := s.ask(t, "udp", question("public.test.", dns.TypeA)); len(answer.Answer) != 1 {
		t.Errorf("%v", answer)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestSubnetIsNotAnsweredFromTheCache: what is kept is for any network.
func TestSubnetIsNotAnsweredFromTheCache(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{Zones: []Zone{{Way: echoing(t, &asked)}}, KeepECS: true})
	s.ask(t, "udp", question("a.test.", dns.TypeA))
	with := question("a.test.", dns.TypeA)
	with.SetEdns0(1232, false)
	with.IsEdns0().Option = append(with.IsEdns0().Option, &dns.EDNS0_SUBNET{
		Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0),
	})
	s.ask(t, "udp", with)
	if n := asked.Load(); n != 2 {
		t.Errorf("asked %d times, want 2", n)
	}
}

// TestConnectionsOfAClient: one client does not take all connections of a listener, and
// those that say nothing end soon when there are many.
func TestConnectionsOfAClient(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{Zones: []Zone{{Way: echoing(t, &asked)}}, MaxConnections: 1000})
	var idle []net.Conn
	for range tcpPerClient {
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		idle = append(idle, conn)
	}
	// They are accepted in their order.
	conn, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "timeout") {
		t.Errorf("one more is open: %v", err)
	}
	idle[0].Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		client := dns.Client{Net: "tcp", Timeout: time.Second}
		if _, _, err := client.Exchange(question("a.test.", dns.TypeA), s.address); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the place of a connection that has ended is not given to another")
		}
	}
}

// TestDotInALabel is no border of a zone.
func TestDotInALabel(t *testing.T) {
	name := nameText([]byte("\x06x.corp\x04test\x00"))
	if within(name, "corp.test") || newZones([]Zone{{Suffix: "corp.test"}}).of(name) != nil {
		t.Errorf("%s is taken for one of corp.test", name)
	}
}

// TestFloodWithoutServers: questions of which nobody answers any leave neither goroutines
// (serve sees to it) nor memory behind, and the service is back with the servers.
func TestFloodWithoutServers(t *testing.T) {
	var asked atomic.Int64
	var away atomic.Bool
	answering := echoing(t, &asked)
	way := wayFunc(func(ctx context.Context, query []byte) ([]byte, error) {
		// As over UDP and TCP, where what is lost is sent again.
		for away.Load() {
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(100 * time.Millisecond):
			}
		}
		return answering(ctx, query)
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}, MaxInFlight: 500, MaxPerClient: 500, CacheBytes: 1 << 20})
	conn, err := net.Dial("udp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var answers atomic.Int64
	go func() {
		buffer := make([]byte, 1500)
		for {
			if _, err := conn.Read(buffer); err != nil {
				return
			}
			answers.Add(1)
		}
	}()
	const questions = 50000
	for i := range questions {
		// They go away and come back in the midst of it.
		away.Store(i > questions/4 && i < questions*3/4)
		packed, err := question(fmt.Sprintf("n%d.flood.test.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		conn.Write(packed)
		if i%100 == 0 {
			time.Sleep(time.Millisecond) // the socket's queue is short
		}
	}
	limit := 2 * time.Second
	if testing.Short() {
		limit *= 5 // the race detector's run
	}
	// What is sent to a full queue is lost, so the question is sent again, as a client does.
	client := dns.Client{Timeout: 200 * time.Millisecond}
	start := time.Now()
	for {
		answer, _, err := client.Exchange(question("back.test.", dns.TypeA), s.address)
		if err == nil && len(answer.Answer) == 1 {
			break
		}
		if time.Since(start) > limit {
			t.Fatalf("the service is not back after %v: %v, %v", limit, answer, err)
		}
	}
	t.Logf("%d answers to %d questions; back after %v", answers.Load(), questions, time.Since(start))
	// Half of them were sent while there were servers; how many of those a full queue lost
	// depends on what else the machine does.
	if n := answers.Load(); n < questions/10 {
		t.Errorf("only %d answers", n)
	}
}
