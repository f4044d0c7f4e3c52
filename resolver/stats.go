package resolver

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// Stats are counters since the start.
type Stats struct {
	Types   map[string]int64 // queries by type; the rare ones are OTHER
	Rcodes  map[string]int64 // answers by response code
	Results map[string]int64 // answers by where they came from, see below
	Ways    map[string]int64 // questions that were asked, by way
	Failed  map[string]int64 // of these, those without an answer
	Dropped map[string]int64 // messages that got no answer, by reason
	// Latency counts answers by how long they took; Bounds are the upper ends, and
	// the last count is of those that took longer.
	Latency []int64
	Bounds  []time.Duration
}

// Keys of Stats.Results.
const (
	ResultHit    = "hit"    // from the cache
	ResultMiss   = "miss"   // asked for
	ResultStale  = "stale"  // expired, because no server answered
	ResultFake   = "fake"   // an address of Config.Fake
	ResultLocal  = "local"  // nobody has to be asked
	ResultFailed = "failed" // nobody answered, or there was too much to do
)

// Keys of Stats.Dropped.
const (
	DroppedNoQuery = "no query" // responses, and what is shorter than a header
	DroppedReply   = "reply"    // the answer could not be sent
)

var latencyBounds = [...]time.Duration{
	time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second,
}

// result is an index for the results.
type result uint8

const (
	hit result = iota
	miss
	stale
	fake
	local
	failed
	resultCount
)

var resultNames = [resultCount]string{ResultHit, ResultMiss, ResultStale, ResultFake, ResultLocal, ResultFailed}

func (r result) String() string { return resultNames[r] }

// counters are counted by the loops and by goroutines alike.
type counters struct {
	kinds   [256]atomic.Int64 // by the types below 256; 0 is all others
	rcodes  [24]atomic.Int64
	results [resultCount]atomic.Int64
	latency [len(latencyBounds) + 1]atomic.Int64
	noQuery atomic.Int64
	noReply atomic.Int64

	mutex       sync.Mutex
	asked, lost map[string]int64 // by way
}

// answered counts one answer.
func (c *counters) answered(kind uint16, rcode int, from result, took time.Duration) {
	if int(kind) >= len(c.kinds) {
		kind = 0
	}
	c.kinds[kind].Add(1)
	c.rcodes[min(rcode, len(c.rcodes)-1)].Add(1)
	c.results[from].Add(1)
	bucket := 0
	for bucket < len(latencyBounds) && took > latencyBounds[bucket] {
		bucket++
	}
	c.latency[bucket].Add(1)
}

// exchanged counts a question that was asked.
func (c *counters) exchanged(way string, err error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.asked == nil {
		c.asked, c.lost = make(map[string]int64), make(map[string]int64)
	}
	c.asked[way]++
	if err != nil {
		c.lost[way]++
	}
}

// Stats returns the counters. It is safe for concurrent use.
func (s *Server) Stats() Stats {
	c := &s.stats
	stats := Stats{
		Types: map[string]int64{}, Rcodes: map[string]int64{}, Results: map[string]int64{},
		Dropped: map[string]int64{DroppedNoQuery: c.noQuery.Load(), DroppedReply: c.noReply.Load()},
		Bounds:  slices.Clone(latencyBounds[:]),
	}
	for kind := range c.kinds {
		if n := c.kinds[kind].Load(); n > 0 {
			name, known := dns.TypeToString[uint16(kind)]
			if !known || kind == 0 {
				name = "OTHER"
			}
			stats.Types[name] += n
		}
	}
	for rcode := range c.rcodes {
		if n := c.rcodes[rcode].Load(); n > 0 {
			stats.Rcodes[dns.RcodeToString[rcode]] += n
		}
	}
	for i := range c.results {
		stats.Results[resultNames[i]] = c.results[i].Load()
	}
	for i := range c.latency {
		stats.Latency = append(stats.Latency, c.latency[i].Load())
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	stats.Ways, stats.Failed = maps.Clone(c.asked), maps.Clone(c.lost)
	return stats
}

// typeName and rcodeName are what the registries call a number.
func typeName(kind uint16) string { return dns.Type(kind).String() }

func rcodeName(rcode int) string {
	if name, ok := dns.RcodeToString[rcode]; ok {
		return name
	}
	return fmt.Sprint(rcode)
}
