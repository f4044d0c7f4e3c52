package cache

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func TestGetReturnsTheStoredMessage(t *testing.T) {
	c := New(large())
	stored := simple(t, 300)
	if got, s := c.Get([]byte("before"), []byte("key"), epoch); s != Miss || string(got) != "before" {
		t.Fatalf("empty cache: %v, %q", s, got)
	}
	put(t, c, "key", bytes.Clone(stored), epoch)
	got, s := c.Get([]byte("before"), []byte("key"), epoch)
	if s != Fresh || string(got) != "before"+string(stored) {
		t.Errorf("%v\n got %x\nwant %x", s, got, stored)
	}
	if s := state(c, "other", epoch); s != Miss {
		t.Errorf("another key: %v", s)
	}
	if s := state(c, "", epoch); s != Miss {
		t.Errorf("no key: %v", s)
	}
}

func TestEveryTTLCountsDown(t *testing.T) {
	m := response(dnsmessage.RCodeSuccess)
	m.Answers = []dnsmessage.Resource{alias(question, "a.example.org.", 900), address("a.example.org.", 60)}
	m.Authorities = []dnsmessage.Resource{record("example.org.", 3600, &dnsmessage.NSResource{NS: dnsmessage.MustNewName("ns.example.org.")})}
	m.Additionals = []dnsmessage.Resource{address("ns.example.org.", 7200)}
	c := New(large())
	put(t, c, "key", pack(t, m), epoch)
	for _, test := range []struct {
		age  time.Duration
		want []uint32
	}{
		{0, []uint32{900, 60, 3600, 7200}},
		{999 * time.Millisecond, []uint32{900, 60, 3600, 7200}},
		{time.Second, []uint32{899, 59, 3599, 7199}},
		{60*time.Second - 1, []uint32{841, 1, 3541, 7141}},
	} {
		got, s := c.Get(nil, []byte("key"), after(test.age))
		if got := ttls(t, got); s == Miss || s == Stale || !slices.Equal(got, test.want) {
			t.Errorf("after %v: %v, %v; want %v", test.age, s, got, test.want)
		}
	}
}

// TestLifetime: how long an answer is fresh, and the TTLs that it is given out
// with at first.
func TestLifetime(t *testing.T) {
	positive := func(answers, authorities, additionals []dnsmessage.Resource) dnsmessage.Message {
		m := response(dnsmessage.RCodeSuccess)
		m.Answers, m.Authorities, m.Additionals = answers, authorities, additionals
		return m
	}
	list := func(r ...dnsmessage.Resource) []dnsmessage.Resource { return r }
	missing := func(answers, authorities []dnsmessage.Resource) dnsmessage.Message {
		m := positive(answers, authorities, nil)
		m.RCode = dnsmessage.RCodeNameError
		return m
	}
	const week = 7 * 24 * 3600
	for _, test := range []struct {
		name    string
		message dnsmessage.Message
		want    uint32 // seconds
		ttls    []uint32
	}{
		{"one record", positive(list(address(question, 60)), nil, nil), 60, []uint32{60}},
		{"shortest in the answer", positive(list(alias(question, "a.", 20), address("a.", 60)), nil, nil), 20, []uint32{20, 60}},
		{"shortest in the authority", positive(list(address(question, 60)), list(authority(30, 5)), nil), 30, []uint32{60, 30}},
		{"shortest in the additional", positive(list(address(question, 60)), nil, list(address("ns.", 10))), 10, []uint32{60, 10}},
		{"longer than MaxTTL", positive(list(address(question, week+1)), nil, nil), week, []uint32{week}},
		{"highest bit set", positive(list(address(question, 1<<31)), nil, nil), week, []uint32{week}},
		{"only one longer than MaxTTL", positive(list(alias(question, "a.", 1<<31), address("a.", 60)), nil, nil), 60, []uint32{week, 60}},
		{"NXDOMAIN, SOA TTL", missing(nil, list(authority(40, 50))), 40, []uint32{40}},
		{"NXDOMAIN, SOA MINIMUM", missing(nil, list(authority(3600, 50))), 50, []uint32{50}},
		{"NXDOMAIN, MaxNegative", missing(nil, list(authority(week, week))), 3 * 3600, []uint32{3 * 3600}},
		{"NXDOMAIN behind an alias", missing(list(alias(question, "a.", 20)), list(authority(3600, 50))), 20, []uint32{20, 20}},
		{"NODATA", positive(nil, list(authority(3600, 50)), nil), 50, []uint32{50}},
		{"NODATA behind an alias", positive(list(alias(question, "a.", 3600)), list(authority(3600, 50)), nil), 50, []uint32{50, 50}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := New(large())
			put(t, c, "key", pack(t, test.message), epoch)
			got, _ := c.Get(nil, []byte("key"), epoch)
			if got := ttls(t, got); !slices.Equal(got, test.ttls) {
				t.Errorf("TTLs %v, want %v", got, test.ttls)
			}
			end := time.Duration(test.want) * time.Second
			if s := state(c, "key", after(end-1)); s != Fresh && s != Due {
				t.Errorf("just before %v: %v", end, s)
			}
			if s := state(c, "key", after(end)); s != Stale {
				t.Errorf("after %v: %v", end, s)
			}
		})
	}
}

func TestConfigBoundsTTLs(t *testing.T) {
	c := New(Config{MaxBytes: 1 << 20, MaxTTL: 30 * time.Second, MaxNegative: 10 * time.Second, MaxStale: time.Minute})
	put(t, c, "positive", simple(t, 300), epoch)
	put(t, c, "negative", nameError(t, 300, 300), epoch)
	for key, end := range map[string]time.Duration{"positive": 30 * time.Second, "negative": 10 * time.Second} {
		for at, want := range map[time.Duration]State{end - 1: Fresh, end: Stale, end + time.Minute - 1: Stale, end + time.Minute: Miss} {
			if s := state(c, key, after(at)); s != want && !(want == Fresh && s == Due) {
				t.Errorf("%s after %v: %v, want %v", key, at, s, want)
			}
		}
	}
}

func TestStaleAnswersHaveThirtySeconds(t *testing.T) {
	m := response(dnsmessage.RCodeSuccess)
	m.Answers = []dnsmessage.Resource{alias(question, "a.example.org.", 300), address("a.example.org.", 60)}
	c := New(Config{MaxBytes: 1 << 20, MaxStale: 365 * 24 * time.Hour})
	put(t, c, "key", pack(t, m), epoch)
	const most = 3*24*time.Hour + time.Minute // the answer's own minute comes first
	for _, test := range []struct {
		age  time.Duration
		want []uint32
	}{
		{time.Minute, []uint32{240, 30}},
		{299 * time.Second, []uint32{1, 30}},
		{300 * time.Second, []uint32{30, 30}},
		{most - 1, []uint32{30, 30}},
	} {
		got, s := c.Get(nil, []byte("key"), after(test.age))
		if got := ttls(t, got); s != Stale || !slices.Equal(got, test.want) {
			t.Errorf("after %v: %v, %v; want %v", test.age, s, got, test.want)
		}
	}
	if got, s := c.Get([]byte("before"), []byte("key"), after(most)); s != Miss || string(got) != "before" {
		t.Errorf("after %v: %v, %q", most, s, got)
	}
}

func TestNothingIsStaleWithoutMaxStale(t *testing.T) {
	c := New(Config{MaxBytes: 1 << 20})
	put(t, c, "key", simple(t, 60), epoch)
	if s := state(c, "key", after(time.Minute)); s != Miss {
		t.Errorf("expired: %v", s)
	}
}

func TestFailuresLeaveTheEarlierAnswer(t *testing.T) {
	failure := response(dnsmessage.RCodeServerFailure)
	c := New(large())
	put(t, c, "key", simple(t, 60), epoch)
	if c.Put([]byte("key"), pack(t, failure), after(time.Hour)) {
		t.Error("SERVFAIL was stored")
	}
	if s := state(c, "key", after(time.Hour)); s != Stale {
		t.Errorf("after SERVFAIL: %v", s)
	}
}

func TestAnswersNotToBeStoredDropTheEarlierOne(t *testing.T) {
	huge := response(dnsmessage.RCodeSuccess)
	huge.Answers = []dnsmessage.Resource{address(question, 60), text(60, 20_000)}
	for name, answer := range map[string][]byte{"TTL 0": simple(t, 0), "NXDOMAIN with MINIMUM 0": nameError(t, 60, 0), "too large": pack(t, huge)} {
		c := New(Config{MaxBytes: 1 << 20, MaxStale: time.Hour})
		put(t, c, "key", simple(t, 60), epoch)
		if c.Put([]byte("key"), answer, after(time.Second)) {
			t.Errorf("%s: stored", name)
		}
		if s := state(c, "key", after(time.Second)); s != Miss {
			t.Errorf("%s: then %v", name, s)
		}
		if stats := c.Stats(); stats != (Stats{}) {
			t.Errorf("%s: then %+v", name, stats)
		}
		put(t, c, "key", simple(t, 60), after(time.Second))
		if s := state(c, "key", after(time.Second)); s != Fresh {
			t.Errorf("%s: stored again, %v", name, s)
		}
	}
}

func TestANewAnswerReplacesTheOldOne(t *testing.T) {
	c := New(large())
	put(t, c, "key", simple(t, 60), epoch)
	before := c.Stats()
	put(t, c, "key", simple(t, 90), after(30*time.Second))
	if stats := c.Stats(); stats != before {
		t.Errorf("same size: %+v, before %+v", stats, before)
	}
	got, s := c.Get(nil, []byte("key"), after(70*time.Second))
	if got := ttls(t, got); s != Fresh || !slices.Equal(got, []uint32{50}) {
		t.Errorf("%v, %v", s, got)
	}
	// Longer and shorter ones move.
	for _, length := range []int{3000, 10} {
		m := response(dnsmessage.RCodeSuccess)
		m.Answers = []dnsmessage.Resource{address(question, 60), text(60, length)}
		stored := pack(t, m)
		put(t, c, "key", stored, epoch)
		if got, s := c.Get(nil, []byte("key"), epoch); s != Fresh || !bytes.Equal(got, stored) {
			t.Errorf("%d bytes: %v, %x", length, s, got)
		}
		if stats, want := c.Stats(), int64(entrySize(2, len("key"), len(stored))); stats.Entries != 1 || stats.Bytes != want {
			t.Errorf("%d bytes: %+v, want %d bytes", length, stats, want)
		}
	}
}

func TestDueIsToldOnce(t *testing.T) {
	c := New(large())
	put(t, c, "hot", simple(t, 300), epoch)
	put(t, c, "cold", simple(t, 300), epoch)
	ask := func(key string, at time.Duration, want State) {
		t.Helper()
		if s := state(c, key, after(at)); s != want {
			t.Errorf("%s after %v: %v, want %v", key, at, s, want)
		}
	}
	ask("hot", 0, Fresh)
	ask("hot", time.Second, Fresh)
	ask("hot", 269*time.Second, Fresh)
	ask("hot", 270*time.Second, Due)
	ask("hot", 270*time.Second, Fresh)
	ask("hot", 280*time.Second-1, Fresh)
	ask("hot", 280*time.Second, Due) // the refresh is lost
	ask("hot", 281*time.Second, Fresh)
	ask("cold", 270*time.Second, Fresh)
	ask("cold", 271*time.Second, Fresh)
	ask("cold", 272*time.Second, Due)
	// A name that was hot is so again sooner, and not told before its time.
	put(t, c, "hot", simple(t, 300), after(282*time.Second))
	ask("hot", 283*time.Second, Fresh)
	ask("hot", 553*time.Second, Due)
	ask("hot", 582*time.Second, Stale)
}

func TestDueOfShortTTLs(t *testing.T) {
	for ttl, soon := range map[uint32]time.Duration{1: 500 * time.Millisecond, 2: time.Second, 5: 2 * time.Second, 20: 2 * time.Second, 60: 6 * time.Second} {
		c := New(large())
		put(t, c, "key", simple(t, ttl), epoch)
		end := time.Duration(ttl) * time.Second
		for range 5 {
			if s := state(c, "key", after(end-soon-1)); s != Fresh {
				t.Errorf("TTL %d, more than %v to go: %v", ttl, soon, s)
			}
		}
		if s := state(c, "key", after(end-soon)); s != Due {
			t.Errorf("TTL %d, %v to go: %v", ttl, soon, s)
		}
	}
}

func TestDueIsToldToOneOfManyCallers(t *testing.T) {
	c := New(large())
	put(t, c, "key", simple(t, 300), epoch)
	var told atomic.Int32
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for range 100 {
				if state(c, "key", after(299*time.Second)) == Due {
					told.Add(1)
				}
			}
		})
	}
	wait.Wait()
	if told.Load() != 1 {
		t.Errorf("told %d times", told.Load())
	}
}

// TestMoments: an answer ages by the clock that ran more, and never backwards.
func TestMoments(t *testing.T) {
	stored := moment{monotonic: 1000, wall: 5000}
	for name, test := range map[string]struct {
		now  moment
		want time.Duration
	}{
		"both clocks":         {moment{1010, 5010}, 10},
		"machine slept":       {moment{1010, 9000}, 4000},
		"wall clock put back": {moment{1010, 100}, 10},
		"stored later":        {moment{990, 4990}, 0},
	} {
		if got := test.now.since(stored); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

func TestGetAndPutAllocateNothing(t *testing.T) {
	c := New(large())
	key, stored := []byte("\x04host\x07example\x03org\x00\x00\x01\x00\x01"), simple(t, 300)
	buffer := make([]byte, 0, 512)
	now := time.Now()
	if n := testing.AllocsPerRun(100, func() { c.Put(key, stored, now) }); n != 0 {
		t.Errorf("Put: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { c.Get(buffer, key, now) }); n != 0 {
		t.Errorf("Get: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { c.Get(buffer, []byte("none"), now) }); n != 0 {
		t.Errorf("Get of nothing: %v allocations", n)
	}
}
