package resolver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/fakeip"
)

// served is a server on loopback.
type served struct {
	*Server
	address string
	stop    func()
}

// serve starts a server, which at the end of the test leaves no goroutine behind.
func serve(t testing.TB, config Config) *served {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	config.CacheBytes = max(config.CacheBytes, 1<<20)
	config.MaxInFlight, config.MaxPerClient = max(config.MaxInFlight, 100), max(config.MaxPerClient, 100)
	config.MaxConnections = max(config.MaxConnections, 100)
	config.Log = zerolog.Nop()
	var address string
	var s *Server
	for try := 0; s == nil; try++ {
		// A port that is free over UDP may be taken over TCP, by the tests of another
		// package for example.
		probe, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address = probe.LocalAddr().String()
		probe.Close()
		config.Listen = []netip.AddrPort{netip.MustParseAddrPort(address)}
		if s, err = Listen(config); err != nil && try == 100 {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Serve does not return")
		}
		for deadline := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("%d goroutines, before %d", runtime.NumGoroutine(), goroutines)
				break
			}
		}
	})
	t.Cleanup(stop)
	return &served{s, address, stop}
}

// ask asks a server and wants an answer.
func (s *served) ask(t testing.TB, network string, m *dns.Msg) *dns.Msg {
	t.Helper()
	client := dns.Client{Net: network, Timeout: 10 * time.Second}
	answer, _, err := client.Exchange(m, s.address)
	if err != nil {
		t.Fatalf("%s over %s: %v", m.Question[0].Name, network, err)
	}
	return answer
}

// echoing answers every A question with an address, and counts the questions.
func echoing(t testing.TB, asked *atomic.Int64) wayFunc {
	return func(_ context.Context, query []byte) ([]byte, error) {
		asked.Add(1)
		m := new(dns.Msg)
		if err := m.Unpack(query); err != nil {
			t.Error(err)
		}
		return answerTo(t, m, m.Question[0].Name+" 60 A 192.0.2.1"), nil
	}
}

func TestAnswersAreKept(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{Zones: []Zone{{Way: echoing(t, &asked)}}})
	for _, network := range []string{"udp", "tcp", "udp"} {
		answer := s.ask(t, network, question("WwW.example.org.", dns.TypeA))
		if len(answer.Answer) != 1 || answer.Question[0].Name != "WwW.example.org." || answer.Id != 4711 {
			t.Errorf("%s: %v", network, answer)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("it was asked for %d times", n)
	}
	var stats Stats
	for range 100 { // an answer is counted once it is on its way
		if stats = s.Stats(); stats.Types["A"] == 3 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if stats.Results[ResultHit] != 2 || stats.Results[ResultMiss] != 1 || stats.Types["A"] != 3 || stats.Rcodes["NOERROR"] != 3 || stats.Ways["way"] != 1 {
		t.Errorf("%+v", stats)
	}
	local := netip.MustParseAddr("127.0.0.1")
	if name, ok := s.Name(local, netip.MustParseAddr("192.0.2.1")); !ok || name != "www.example.org" {
		t.Errorf("the name is %q, %t", name, ok)
	}
	if name, ok := s.Name(netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("192.0.2.1")); ok {
		t.Errorf("another client's name is %q", name)
	}
}

func TestIdenticalQuestionsAreAskedOnce(t *testing.T) {
	var asked atomic.Int64
	release := make(chan struct{})
	way := wayFunc(func(ctx context.Context, query []byte) ([]byte, error) {
		<-release
		return echoing(t, &asked)(ctx, query)
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}})
	var asking sync.WaitGroup
	for range 20 {
		asking.Go(func() { s.ask(t, "udp", question("a.test.", dns.TypeA)) })
	}
	for s.inFlight.Load() < 20 {
		time.Sleep(time.Millisecond)
	}
	// A slow question does not block another one.
	if answer := s.ask(t, "udp", question("localhost.", dns.TypeA)); len(answer.Answer) != 1 {
		t.Errorf("%v", answer)
	}
	close(release)
	asking.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("it was asked for %d times", n)
	}
}

func TestNobodyAnswers(t *testing.T) {
	way := wayFunc(func(context.Context, []byte) ([]byte, error) { return nil, errors.New("down") })
	s := serve(t, Config{Zones: []Zone{{Suffix: "test", Way: way}}})
	m := question("a.test.", dns.TypeA)
	m.SetEdns0(1232, false)
	answer := s.ask(t, "udp", m)
	opt := answer.IsEdns0()
	if answer.Rcode != dns.RcodeServerFailure || opt == nil || len(opt.Option) != 1 || opt.Option[0].(*dns.EDNS0_EDE).InfoCode != dns.ExtendedErrorCodeNetworkError {
		t.Errorf("%v", answer)
	}
	if answer := s.ask(t, "tcp", question("elsewhere.org.", dns.TypeA)); answer.Rcode != dns.RcodeRefused {
		t.Errorf("a name without a way: %v", answer)
	}
}

func TestExpiredAnswerWhenNobodyAnswers(t *testing.T) {
	var down atomic.Bool
	way := wayFunc(func(_ context.Context, query []byte) ([]byte, error) {
		if down.Load() {
			return nil, errors.New("down")
		}
		m := new(dns.Msg)
		m.Unpack(query)
		return answerTo(t, m, "a.test. 1 A 192.0.2.1"), nil
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}})
	m := question("a.test.", dns.TypeA)
	m.SetEdns0(1232, false)
	s.ask(t, "udp", m)
	down.Store(true)
	var answer *dns.Msg
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if answer = s.ask(t, "udp", m); len(answer.IsEdns0().Option) > 0 {
			break
		}
	}
	if len(answer.Answer) != 1 || answer.Answer[0].Header().Ttl != 30 || len(answer.IsEdns0().Option) != 1 {
		t.Fatalf("%v", answer)
	}
	if s.Stats().Results[ResultStale] == 0 {
		t.Errorf("%+v", s.Stats())
	}
}

func TestStrangersAreRefused(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{Zones: []Zone{{Way: echoing(t, &asked)}}, Allow: func(netip.Addr) bool { return false }})
	for _, network := range []string{"udp", "tcp"} {
		if answer := s.ask(t, network, question("a.test.", dns.TypeA)); answer.Rcode != dns.RcodeRefused {
			t.Errorf("%s: %v", network, answer)
		}
	}
	if asked.Load() != 0 {
		t.Error("it was asked for")
	}
}

func TestTooManyQuestionsOfAClient(t *testing.T) {
	release := make(chan struct{})
	way := wayFunc(func(ctx context.Context, _ []byte) ([]byte, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return nil, errors.New("released")
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}, MaxInFlight: 1000, MaxPerClient: 100})
	var asking sync.WaitGroup
	for i := range 100 {
		asking.Go(func() {
			s.ask(t, "udp", question(strings.Repeat("a", i%60+1)+strings.Repeat(".b", i/60)+".test.", dns.TypeA))
		})
	}
	for s.inFlight.Load() < 100 {
		time.Sleep(time.Millisecond)
	}
	if answer := s.ask(t, "udp", question("one-more.test.", dns.TypeA)); answer.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v", answer)
	}
	close(release)
	asking.Wait()
}

// TestOutOfOrder: on one connection a fast answer overtakes a slow one.
func TestOutOfOrder(t *testing.T) {
	var asked atomic.Int64
	release := make(chan struct{})
	way := wayFunc(func(ctx context.Context, query []byte) ([]byte, error) {
		if strings.Contains(string(query), "slow") {
			<-release
		}
		return echoing(t, &asked)(ctx, query)
	})
	s := serve(t, Config{Zones: []Zone{{Way: way}}})
	conn, err := dns.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	for _, name := range []string{"slow.test.", "fast.test."} {
		if err := conn.WriteMsg(question(name, dns.TypeA)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"fast.test.", "slow.test."} {
		answer, err := conn.ReadMsg()
		if err != nil || answer.Question[0].Name != want {
			t.Fatalf("%v, %v; want %s", answer, err, want)
		}
		if want == "fast.test." {
			close(release)
		}
	}
}

// TestNamesThatNeverLeave are answered without a way.
func TestNamesThatNeverLeave(t *testing.T) {
	s := serve(t, Config{})
	for _, test := range []struct {
		name    string
		kind    uint16
		rcode   int
		answers int
	}{
		{"localhost.", dns.TypeA, dns.RcodeSuccess, 1},
		{"a.localhost.", dns.TypeAAAA, dns.RcodeSuccess, 1},
		{"localhost.", dns.TypeMX, dns.RcodeSuccess, 0},
		{"hidden.onion.", dns.TypeA, dns.RcodeNameError, 0},
		{"use-application-dns.net.", dns.TypeA, dns.RcodeNameError, 0},
		{"_dns.resolver.arpa.", dns.TypeSVCB, dns.RcodeSuccess, 0},
		{"example.org.", dns.TypeANY, dns.RcodeSuccess, 1},
		{"example.org.", dns.TypeAXFR, dns.RcodeNotImplemented, 0},
		{"example.org.", dns.TypeA, dns.RcodeRefused, 0},
	} {
		m := question(test.name, test.kind)
		answer := s.ask(t, "udp", m)
		if answer.Rcode != test.rcode || len(answer.Answer) != test.answers {
			t.Errorf("%s: %v", test.name, answer)
		}
		if test.answers == 0 && test.rcode != dns.RcodeNotImplemented && test.rcode != dns.RcodeRefused && len(answer.Ns) != 1 {
			t.Errorf("%s: no SOA record", test.name)
		}
	}
	chaos := question("version.bind.", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	if answer := s.ask(t, "udp", chaos); answer.Rcode != dns.RcodeRefused {
		t.Errorf("%v", answer)
	}
}

func TestFakeAddresses(t *testing.T) {
	pool, err := fakeip.Open(fakeip.Config{IPv4: netip.MustParsePrefix("198.18.0.0/15"), IPv6: netip.MustParsePrefix("fd00:1::/64")})
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	s := serve(t, Config{Zones: []Zone{{}}, Fake: pool})
	address := s.ask(t, "udp", question("Any.Name.", dns.TypeA)).Answer[0].(*dns.A).A
	again := s.ask(t, "tcp", question("any.name.", dns.TypeA)).Answer[0].(*dns.A).A
	if !address.Equal(again) {
		t.Errorf("%s, then %s", address, again)
	}
	if six := s.ask(t, "udp", question("any.name.", dns.TypeAAAA)); len(six.Answer) != 1 {
		t.Errorf("%v", six)
	}
	if https := s.ask(t, "udp", question("any.name.", dns.TypeHTTPS)); https.Rcode != dns.RcodeSuccess || len(https.Answer) != 0 || len(https.Ns) != 1 {
		t.Errorf("%v", https)
	}
	reverse, _ := dns.ReverseAddr(address.String())
	if ptr := s.ask(t, "udp", question(reverse, dns.TypePTR)); len(ptr.Answer) != 1 || ptr.Answer[0].(*dns.PTR).Ptr != "any.name." {
		t.Errorf("%v", ptr)
	}
	fake, _ := netip.AddrFromSlice(address.To4())
	if name, ok := s.Name(netip.MustParseAddr("192.0.2.99"), fake); !ok || name != "any.name" {
		t.Errorf("%q, %t", name, ok)
	}
	if odd := s.ask(t, "udp", question("1.2.3.4.", dns.TypeA)); odd.Rcode != dns.RcodeNameError {
		t.Errorf("%v", odd)
	}
}

// TestClientSubnet is passed on only if that is wanted.
func TestClientSubnet(t *testing.T) {
	for _, keep := range []bool{false, true} {
		var seen atomic.Bool
		way := wayFunc(func(_ context.Context, query []byte) ([]byte, error) {
			m := new(dns.Msg)
			if err := m.Unpack(query); err != nil {
				return nil, err
			}
			for _, option := range m.IsEdns0().Option {
				seen.Store(option.Option() == dns.EDNS0SUBNET)
			}
			return answerTo(t, m, "a.test. 60 A 192.0.2.1"), nil
		})
		s := serve(t, Config{Zones: []Zone{{Way: way}}, KeepECS: keep})
		m := question("a.test.", dns.TypeA)
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)}}
		s.ask(t, "udp", m)
		if seen.Load() != keep {
			t.Errorf("kept %t, seen %t", keep, seen.Load())
		}
		s.stop()
	}
}

// TestCachedAnswersCostNoMemory: what a loop does for a query that is kept, but for
// the system calls.
func TestCachedAnswersCostNoMemory(t *testing.T) {
	var asked atomic.Int64
	s := serve(t, Config{Zones: []Zone{{Way: echoing(t, &asked)}}})
	m := question("www.example.org.", dns.TypeA)
	m.SetEdns0(1232, true)
	s.ask(t, "udp", m)
	message := packed(t, m)
	client := netip.MustParseAddr("127.0.0.1")
	var q query
	key, into := make([]byte, 0, 300), make([]byte, 0, 2000)
	if allocations := testing.AllocsPerRun(100, func() {
		if err := q.read(message); err != nil {
			t.Fatal(err)
		}
		o, ok := s.cached(t.Context(), &q, q.key(key), into)
		if !ok {
			t.Fatal("it is not kept")
		}
		s.rememberAll(client, &q, o.answer)
		q.dress(o.answer, o.rcode, o.why, q.limit())
		s.done(&q, o, time.Now(), client, "udp")
	}); allocations != 0 {
		t.Errorf("%v allocations", allocations)
	}
}

func BenchmarkCached(b *testing.B) {
	var asked atomic.Int64
	s := serve(b, Config{Zones: []Zone{{Way: echoing(b, &asked)}}})
	m := question("www.example.org.", dns.TypeA)
	s.ask(b, "udp", m)
	message := packed(b, m)
	client := netip.MustParseAddr("127.0.0.1")
	var q query
	key, into := make([]byte, 0, 300), make([]byte, 0, 2000)
	for b.Loop() {
		q.read(message)
		o, _ := s.cached(b.Context(), &q, q.key(key), into)
		s.rememberAll(client, &q, o.answer)
		q.dress(o.answer, o.rcode, o.why, q.limit())
		s.done(&q, o, time.Now(), client, "udp")
	}
}
