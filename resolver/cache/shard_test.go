package cache

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/metrics"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/dns/dnsmessage"
)

// checkRings fails the test unless the entries in each ring lie one behind the other,
// those that are alive are in the index, and the sums are right.
func checkRings(t testing.TB, c *Cache) {
	t.Helper()
	for i := range c.shards {
		s := &c.shards[i]
		var stats Stats
		walk := func(from, to uint32) {
			for at := from; at < to; {
				h := s.header(at)
				if h.size < headerSize || h.size%alignment != 0 || h.size > to-at {
					t.Fatalf("shard %d: an entry of %d bytes at %d of %d", i, h.size, at, to)
				}
				if h.flags&flagDead == 0 {
					stats.Entries++
					stats.Bytes += int64(h.size)
					linked := s.buckets[s.bucket(h.hash)]
					for linked != at && linked != 0 {
						linked = s.next(linked)
					}
					if linked != at {
						t.Fatalf("shard %d: the entry at %d is not in the index", i, at)
					}
				}
				at += h.size
			}
		}
		if s.turned {
			walk(s.tail, s.end)
			walk(origin, s.head)
		} else {
			walk(s.tail, s.head)
		}
		linked := int64(0)
		for _, at := range s.buckets {
			for ; at != 0; at = s.next(at) {
				linked++
			}
		}
		stats.Evicted = s.stats.Evicted
		if linked != stats.Entries || stats != s.stats {
			t.Fatalf("shard %d: %+v, counted %+v, %d in the index", i, s.stats, stats, linked)
		}
	}
}

// TestRingAgainstAMap does random things to a small cache. An answer that comes out
// is the last that went in; what is not there was evicted or has expired.
func TestRingAgainstAMap(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	const maxBytes = 128 << 10
	c := New(Config{MaxBytes: maxBytes, MaxStale: 20 * time.Second})
	type value struct {
		answer []byte
		stored time.Duration
		fresh  time.Duration
	}
	model := make(map[string]value)
	var now time.Duration
	hits := 0
	for round := range 60_000 {
		key := fmt.Sprintf("%0*d", 1+random.IntN(3)*20, random.IntN(900))
		switch random.IntN(10) {
		case 0, 1, 2, 3:
			m := response(dnsmessage.RCodeSuccess)
			ttl := uint32(random.IntN(40))
			m.Answers = []dnsmessage.Resource{address(question, ttl), text(ttl, 1+random.IntN(1<<random.IntN(12)))}
			m.ID = uint16(round)
			answer := pack(t, m)
			if c.Put([]byte(key), answer, after(now)) {
				model[key] = value{answer, now, time.Duration(ttl) * time.Second}
			} else {
				delete(model, key)
				if ttl > 0 && entrySize(2, len(key), len(answer)) <= maxBytes/64 {
					t.Fatalf("round %d: an answer of %d bytes was not stored", round, len(answer))
				}
			}
		case 4:
			now += time.Duration(random.Int64N(int64(100 * time.Millisecond)))
		default:
			got, s := c.Get(nil, []byte(key), after(now))
			if s == Miss {
				break
			}
			hits++
			v, ok := model[key]
			age := now - v.stored
			if !ok || (s == Stale) != (age >= v.fresh) || age >= v.fresh+20*time.Second || !bytes.Equal(got[:2], v.answer[:2]) || len(got) != len(v.answer) {
				t.Fatalf("round %d: %v at age %v of %v (%t)", round, s, age, v.fresh, ok)
			}
		}
		if round%64 == 0 {
			checkRings(t, c)
		}
	}
	if stats := c.Stats(); hits < 3000 || stats.Evicted < 5000 || stats.Bytes > maxBytes {
		t.Errorf("%d hits, %+v", hits, stats)
	}
}

// TestNamesInUseOutliveOthers: a scan of names that are asked for once does not push
// out those that are asked for time and again.
func TestNamesInUseOutliveOthers(t *testing.T) {
	c := New(Config{MaxBytes: 256 << 10})
	answer := simple(t, 3600)
	const names = 100
	for i := range names {
		put(t, c, fmt.Sprintf("used %d", i), answer, epoch)
	}
	var key []byte
	for i := range 20_000 {
		put(t, c, fmt.Sprintf("once %d", i), answer, epoch)
		key = fmt.Appendf(key[:0], "used %d", i%names)
		if _, s := c.Get(nil, key, epoch); s == Miss {
			t.Fatalf("%s is gone after %d others", key, i)
		}
	}
	if stats := c.Stats(); stats.Evicted == 0 {
		t.Errorf("nothing was evicted: %+v", stats)
	}
	checkRings(t, c)
}

// TestRefreshesPushOutNothing: answers that are stored again and again, as short TTLs
// make it happen, take no more room than once.
func TestRefreshesPushOutNothing(t *testing.T) {
	c := New(Config{MaxBytes: 256 << 10, MaxStale: time.Hour})
	put(t, c, "bystander", simple(t, 3600), epoch)
	answer := simple(t, 10)
	for i := range 100_000 {
		put(t, c, fmt.Sprintf("busy %d", i%50), answer, after(time.Duration(i)*time.Millisecond))
	}
	if stats := c.Stats(); stats.Evicted != 0 || stats.Entries != 51 {
		t.Errorf("%+v", stats)
	}
	if s := state(c, "bystander", after(time.Minute)); s != Fresh {
		t.Errorf("bystander: %v", s)
	}
}

func TestExpiredAnswersAreNotEvicted(t *testing.T) {
	c := New(Config{MaxBytes: 256 << 10})
	answer := simple(t, 10)
	for i := range 20_000 {
		put(t, c, fmt.Sprintf("name %d", i), answer, after(time.Duration(i)*time.Second))
	}
	if stats := c.Stats(); stats.Evicted != 0 {
		t.Errorf("counted as evicted: %+v", stats)
	}
}

func TestSmallBoundsStoreNothing(t *testing.T) {
	answer := simple(t, 60)
	for _, bytes := range []int{-1, 0, 1, 64, 1000, int(unsafe.Sizeof(Cache{})), 4096, 5000} {
		c := New(Config{MaxBytes: bytes})
		if c.Put([]byte("k"), answer, epoch) {
			t.Errorf("%d bytes: stored", bytes)
		}
		if s := state(c, "k", epoch); s != Miss {
			t.Errorf("%d bytes: %v", bytes, s)
		}
	}
	// All sizes up to where some are stored.
	for bytes := 0; bytes < 20_000; bytes += 8 {
		c := New(Config{MaxBytes: bytes})
		for i := range 40 {
			if c.Put([]byte{byte(i)}, answer, epoch) != (entrySize(1, 1, len(answer)) <= bytes/64) {
				t.Fatalf("%d bytes: stored or not, against the bound", bytes)
			}
		}
	}
}

func TestShardsFillCacheLines(t *testing.T) {
	if size, at := unsafe.Sizeof(shard{}), unsafe.Offsetof(Cache{}.shards); size != 128 || at != 0 {
		t.Errorf("a shard has %d bytes, the first is at %d", size, at)
	}
}

// heap returns the bytes of the heap that are in use, and those of them that the
// garbage collector has to look into.
func heap() (inUse, scanned int64) {
	runtime.GC()
	runtime.GC() // also what finalizers had kept
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/scan/heap:bytes"}}
	metrics.Read(sample)
	return int64(sample[0].Value.Uint64()), int64(sample[1].Value.Uint64())
}

// TestHeapStaysInBounds stores far more than there is room for, in answers of several
// sizes, and weighs the heap.
func TestHeapStaysInBounds(t *testing.T) {
	const entries = 50_000
	const tolerance = 64 << 10 // bytes: rounding of blocks to pages, and what the runtime does meanwhile
	answers := make([][]byte, 64)
	for i := range answers {
		m := response(dnsmessage.RCodeSuccess)
		m.Answers = []dnsmessage.Resource{address(question, 3600), text(3600, 1+i*i/4)}
		answers[i] = pack(t, m)
	}
	for _, maxBytes := range []int{1 << 20, 3_000_000, 8 << 20, 64 << 20} {
		t.Run(fmt.Sprint(maxBytes), func(t *testing.T) {
			key := make([]byte, 0, 64)
			before, scannedBefore := heap()
			c := New(Config{MaxBytes: maxBytes, MaxStale: time.Hour})
			for i := range entries {
				key = fmt.Appendf(key[:0], "host%d.department.example.org/A/IN", i)
				put(t, c, string(key), answers[i%len(answers)], epoch)
			}
			after, scannedAfter := heap()
			stats := c.Stats()
			grown, scanned := after-before, scannedAfter-scannedBefore
			t.Logf("heap grew by %d bytes, %d of them to be scanned; %+v", grown, scanned, stats)
			if grown > int64(maxBytes)+tolerance {
				t.Errorf("the heap grew by %d bytes, bound %d", grown, maxBytes)
			}
			if scanned > tolerance {
				t.Errorf("the garbage collector has to look into %d bytes", scanned)
			}
			if stats.Bytes > grown {
				t.Errorf("%d bytes are said to be held, the heap grew by %d", stats.Bytes, grown)
			}
			// The bound is made use of: entries take nine tenths of it if there are enough.
			if stats.Evicted > 0 && stats.Bytes < int64(maxBytes)*9/10 {
				t.Errorf("only %d bytes of %d are in use", stats.Bytes, maxBytes)
			}
			if stats.Entries+stats.Evicted != entries {
				t.Errorf("%d stored, %d evicted, of %d", stats.Entries, stats.Evicted, entries)
			}
			checkRings(t, c)
			runtime.KeepAlive(c)
		})
	}
}

// TestKeysAreHeldOnce weighs a cache by what its entries say: the key, the message and
// at most the header, an offset and the padding.
func TestKeysAreHeldOnce(t *testing.T) {
	c := New(large())
	answer := simple(t, 60)
	key := make([]byte, 4096)
	const entries = 1000
	for i := range entries {
		binary.BigEndian.PutUint64(key, uint64(i))
		put(t, c, string(key), answer, epoch)
	}
	most := int64(entries * (len(key) + len(answer) + headerSize + offsetSize + alignment))
	if stats := c.Stats(); stats.Entries != entries || stats.Bytes > most {
		t.Errorf("%+v, want %d bytes at most", stats, most)
	}
}

func TestConcurrentUse(t *testing.T) {
	c := New(Config{MaxBytes: 256 << 10, MaxStale: time.Minute})
	answers := make([][]byte, 8)
	for i := range answers {
		m := response(dnsmessage.RCodeSuccess)
		m.Answers = []dnsmessage.Resource{address(question, uint32(1+i)), text(uint32(1+i), 1+i*60)}
		answers[i] = pack(t, m)
	}
	var wait sync.WaitGroup
	for worker := range 4 {
		wait.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 0))
			var buffer, key []byte
			for i := range 10_000 {
				n := random.IntN(2000)
				key = fmt.Appendf(key[:0], "name %d", n)
				now := after(time.Duration(i) * time.Millisecond)
				want := answers[n%len(answers)]
				got, s := c.Get(buffer[:0], key, now)
				switch {
				case s == Miss:
					c.Put(key, want, now)
				case len(got) != len(want):
					t.Errorf("%s: %d bytes, want %d", key, len(got), len(want))
				}
				buffer = got
				if i%1000 == 0 {
					c.Stats()
				}
			}
		})
	}
	wait.Wait()
	checkRings(t, c)
}
