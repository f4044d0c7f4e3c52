// Package cache keeps answers of DNS servers in their wire form (RFC 1035,
// section 4) for as long as their TTLs allow. Negative answers are kept as RFC 2308
// says, and expired ones for a while longer, for when no server answers (RFC 8767).
//
// An answer is kept whole and under a key that only the caller understands: name,
// type and class as a rule, and the DO and CD bits. Nothing is put together from
// the records of several answers, so that DNSSEC signatures stay with what they
// sign (RFC 4035, section 4.5).
//
// All memory is taken once, by [New], as two blocks without a pointer in them,
// which the garbage collector need not look into. The system lends the pages of
// the blocks when they are first written.
package cache

import (
	"hash/maphash"
	"time"
	"unsafe"
)

const (
	// The bounds of [Config], and what is used where it says nothing.
	longestTTL      = 7 * 24 * time.Hour // RFC 8767, section 4
	longestNegative = 3 * time.Hour      // RFC 2308, section 5
	longestStale    = 3 * 24 * time.Hour // RFC 8767, section 5

	// staleTTL is what the expired records of a stale answer are given, in seconds (RFC 8767, section 4).
	staleTTL = 30

	// shardCount shards, each with its own lock, let processors work side by side. More
	// would leave the shards of a small cache too little room for long answers.
	shardCount = 1 << shardBits
	shardBits  = 4

	// entryShare is the part of MaxBytes that one entry may take: a quarter of a shard,
	// so that one long answer does not push out all others.
	entryShare = 4 * shardCount
)

// Config says how much is kept and for how long.
type Config struct {
	MaxBytes    int           // bound of all that the cache holds, its own overhead included
	MaxTTL      time.Duration // longer TTLs are cut to it; zero or more than 7 days: 7 days
	MaxNegative time.Duration // the same for NXDOMAIN and NODATA; zero or more than 3 hours: 3 hours
	MaxStale    time.Duration // how long an answer is kept once it has expired; zero: not at all; at most 3 days
}

// Cache holds answers. It is safe for concurrent use and needs no closing.
type Cache struct {
	shards      [shardCount]shard // first, where they are aligned to cache lines
	seed        maphash.Seed
	start       time.Time // what moments are counted from
	maxTTL      uint32    // seconds
	maxNegative uint32    // seconds
	maxStale    time.Duration
	maxEntry    int // bytes
}

// State says what an answer is worth.
type State int

const (
	// Miss: there is no answer.
	Miss State = iota
	// Fresh: the answer is as good as a server's.
	Fresh
	// Due: fresh, asked for repeatedly and soon to expire. One caller is told so, who
	// should ask a server and [Cache.Put] what that says; others find the answer Fresh.
	// If no new answer comes, another caller is told after 10 seconds.
	Due
	// Stale: the answer has expired and is to be used only when no server answers.
	Stale
)

// String returns the state in lower case.
func (s State) String() string {
	switch s {
	case Miss:
		return "miss"
	case Fresh:
		return "fresh"
	case Due:
		return "due"
	case Stale:
		return "stale"
	}
	return "unknown"
}

// Stats tells what a cache holds and has given up.
type Stats struct {
	Entries int64 // answers held, expired ones included
	Bytes   int64 // what they take, with keys and overhead; less than Config.MaxBytes
	Evicted int64 // answers that made room for others while they could still have been used
}

// New returns an empty cache. One whose MaxBytes are too few for an entry, or not
// positive, stores nothing.
func New(config Config) *Cache {
	c := &Cache{
		seed:        maphash.MakeSeed(),
		start:       time.Now(),
		maxTTL:      seconds(config.MaxTTL, longestTTL),
		maxNegative: seconds(config.MaxNegative, longestNegative),
		maxStale:    max(0, min(config.MaxStale, longestStale)),
		maxEntry:    max(0, config.MaxBytes) / entryShare,
	}
	c.divide(max(0, config.MaxBytes-int(unsafe.Sizeof(*c))) / shardCount)
	return c
}

// divide gives each shard its part, in bytes, of the memory.
func (c *Cache) divide(part int) {
	part = min(part, maxShard)
	buckets := part / bucketShare
	size := (part - buckets*bucketSize) &^ (alignment - 1)
	if buckets == 0 || size < origin+c.maxEntry {
		c.maxEntry = 0 // the bound is hardly more than the Cache itself
		return
	}
	// Two blocks, because each allocation may be rounded up by most of a page.
	data, index := make([]byte, size*shardCount), make([]uint32, buckets*shardCount)
	for i := range c.shards {
		c.shards[i].open(data[i*size:][:size:size], index[i*buckets:][:buckets:buckets])
	}
}

// seconds returns a time of the configuration, or the longest one if it is more or
// was not given.
func seconds(d, longest time.Duration) uint32 {
	if d <= 0 || d > longest {
		d = longest
	}
	return uint32(d / time.Second)
}

// Get appends the answer that is stored under key to dst, with TTLs as they are at
// now, and says what it is worth. In a stale answer, records that have expired have
// 30 seconds (RFC 8767, section 4). If there is no answer, dst is returned as it is.
//
// The ID, the flags and the case of the question are those of the stored message:
// the caller has to adapt them. Get does not allocate if dst has room.
func (c *Cache) Get(dst, key []byte, now time.Time) (answer []byte, state State) {
	hash, when := maphash.Bytes(c.seed, key), c.moment(now)
	s := &c.shards[hash>>(64-shardBits)]
	s.mutex.Lock()
	defer s.mutex.Unlock()
	at := s.find(uint32(hash), key)
	if at == 0 {
		return dst, Miss
	}
	h := s.header(at)
	age := when.since(h.stored)
	if state = h.use(age, c.maxStale); state == Miss {
		return dst, Miss
	}
	s.setHeader(at, &h)
	return s.appendMessage(dst, at, &h, age), state
}

// Put stores the answer under key, in the place of any earlier one, and reports
// whether it could. Neither slice is kept.
//
// The answer is a whole message with one question, compressed or not. It must not
// have an OPT record, which belongs to one transaction (RFC 6891, section 6.2.1):
// the caller has taken it out, and does not store an answer with an extended RCODE.
//
// Not stored are answers that are malformed or truncated (TC); of another RCODE
// than NOERROR and NXDOMAIN; negative without SOA record (RFC 2308, section 5); with
// a TTL of 0; longer, with key and overhead, than a 64th of MaxBytes; under a key of
// more than 65,535 bytes. Answers with a TTL of 0 and too long ones take the place of an
// earlier answer all the same, which is dropped: they are what holds now.
func (c *Cache) Put(key, answer []byte, now time.Time) bool {
	var few [64]uint16 // on the stack; nearly all answers have fewer records
	m, ok := parse(answer, few[:0])
	if !ok || len(key) > maxKey {
		return false
	}
	// No record outlives its longest TTL. Those of a negative answer stand for its
	// absence and none of them outlives that (RFC 2308, section 5; RFC 9077).
	longest := c.maxTTL
	if m.negative {
		longest = min(c.maxNegative, m.ttl)
	}
	m.ttl = min(m.ttl, longest)

	hash, when := maphash.Bytes(c.seed, key), c.moment(now)
	s := &c.shards[hash>>(64-shardBits)]
	s.mutex.Lock()
	defer s.mutex.Unlock()
	old := s.find(uint32(hash), key)
	size := entrySize(len(m.ttls), len(key), len(answer))
	if m.ttl == 0 || size > c.maxEntry {
		if old != 0 {
			s.drop(old)
		}
		return false
	}
	h := header{
		hash: uint32(hash), ttl: m.ttl, stored: when,
		records: uint16(len(m.ttls)), key: uint16(len(key)), message: uint16(len(answer)),
	}
	at := s.place(old, size, &h, when, c.maxStale)
	s.write(at, &h, m.ttls, key, answer, longest)
	return true
}

// Stats returns the present numbers.
func (c *Cache) Stats() Stats {
	var sum Stats
	for i := range c.shards {
		s := &c.shards[i]
		s.mutex.Lock()
		sum.Entries += s.stats.Entries
		sum.Bytes += s.stats.Bytes
		sum.Evicted += s.stats.Evicted
		s.mutex.Unlock()
	}
	return sum
}
