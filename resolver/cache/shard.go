package cache

import (
	"bytes"
	"encoding/binary"
	"math"
	"sync"
	"time"
)

const (
	// The index has a bucket for so many bytes. A short answer takes somewhat more.
	bucketShare = 128
	bucketSize  = 4 // bytes

	// maxShard is how far the 32 bits of the index reach, in bytes.
	maxShard = math.MaxUint32 &^ (alignment - 1)

	// mostMoved bounds the work of making room, which is a few microseconds then: so
	// many entries at most are kept for having been used, and the next goes even so.
	// Entries kept lie side by side from then on, so that a few would not do.
	mostMoved = 64
)

// shard is a part of the cache with its own lock: a ring of entries in the order in
// which they were written, and an index of them by hash. An entry is known by where
// it begins in data.
//
// When the ring is full, the oldest entry gives way, or is written anew at the
// front if it was used since it was written: the clock algorithm, which comes near
// to giving up the least recently used. A new answer is written over the one before
// it if that has the room, as is usual; otherwise the place of the old one is lost
// until the ring comes round to it.
type shard struct {
	mutex   sync.Mutex
	data    []byte
	buckets []uint32 // the first entry of each, or 0
	head    uint32   // where the next entry is written
	tail    uint32   // the oldest entry
	end     uint32   // where the entries before the turn end, if turned
	turned  bool     // the head has turned back to the beginning and is behind the tail
	stats   Stats
	_       [32]byte // to two cache lines, so that neighbours do not share one
}

// origin is where the first entry is, because 0 stands for none.
const origin = alignment

func (s *shard) open(data []byte, buckets []uint32) {
	s.data, s.buckets, s.head, s.tail = data, buckets, origin, origin
}

func (s *shard) header(at uint32) (h header) {
	h.decode(s.data[at:])
	return h
}

func (s *shard) setHeader(at uint32, h *header) {
	h.encode(s.data[at:])
}

// next, hash and setNext reach one field, for loops that need no other.
func (s *shard) next(at uint32) uint32 { return binary.LittleEndian.Uint32(s.data[at:]) }
func (s *shard) hash(at uint32) uint32 { return binary.LittleEndian.Uint32(s.data[at+8:]) }

func (s *shard) setNext(at, next uint32) { binary.LittleEndian.PutUint32(s.data[at:], next) }

// bucket returns the number of the bucket for a hash.
func (s *shard) bucket(hash uint32) int {
	return int(uint64(hash) * uint64(len(s.buckets)) >> 32)
}

// find returns the entry with the key, or 0.
func (s *shard) find(hash uint32, key []byte) uint32 {
	if len(s.buckets) == 0 {
		return 0
	}
	for at := s.buckets[s.bucket(hash)]; at != 0; at = s.next(at) {
		if s.hash(at) != hash {
			continue
		}
		h := s.header(at)
		start := at + headerSize + uint32(h.records)*offsetSize
		if bytes.Equal(s.data[start:start+uint32(h.key)], key) {
			return at
		}
	}
	return 0
}

// link replaces an entry in its bucket: by what follows it, or by the same entry
// elsewhere.
func (s *shard) link(hash, at, by uint32) {
	bucket := s.bucket(hash)
	if s.buckets[bucket] == at {
		s.buckets[bucket] = by
		return
	}
	before := s.buckets[bucket]
	for s.next(before) != at {
		before = s.next(before)
	}
	s.setNext(before, by)
}

// drop takes an entry out of the index. Its place is lost until it is the oldest.
func (s *shard) drop(at uint32) {
	h := s.header(at)
	s.link(h.hash, at, h.next)
	h.flags |= flagDead
	s.setHeader(at, &h)
	s.stats.Entries--
	s.stats.Bytes -= int64(h.size)
}

// place finds the place of a new entry, which takes the place of the old one unless
// that is 0, and completes its header.
func (s *shard) place(old uint32, size int, h *header, when moment, maxStale time.Duration) uint32 {
	if old != 0 {
		before := s.header(old)
		h.uses = before.uses / 2
		// Not far less either: the rest would be lost for as long as the entry lives.
		if room := int(before.size); size <= room && room <= 2*size {
			h.next, h.size, h.flags = before.next, before.size, before.flags
			return old
		}
		s.drop(old)
	}
	h.size = uint32(size)
	s.makeRoom(h.size, when, maxStale)
	at := s.head
	s.head += h.size
	bucket := s.bucket(h.hash)
	h.next = s.buckets[bucket]
	s.buckets[bucket] = at
	s.stats.Entries++
	s.stats.Bytes += int64(size)
	return at
}

// makeRoom makes sure that size bytes are free at the head.
func (s *shard) makeRoom(size uint32, when moment, maxStale time.Duration) {
	for moved := 0; ; {
		if !s.turned {
			if uint32(len(s.data))-s.head >= size {
				return
			}
			s.end, s.head, s.turned = s.head, origin, true
		}
		if s.tail == s.end {
			s.tail, s.turned = origin, false
			continue
		}
		if s.tail-s.head >= size {
			return
		}
		h := s.header(s.tail)
		switch {
		case h.flags&flagDead != 0:
		case when.since(h.stored) >= h.fresh()+maxStale:
			s.drop(s.tail)
		case h.flags&flagUsed != 0 && moved < mostMoved:
			s.move(&h)
			moved++
		default:
			s.drop(s.tail)
			s.stats.Evicted++
		}
		s.tail += h.size
	}
}

// move writes the oldest entry anew at the head, which is behind it, and gives it
// another turn of the ring.
func (s *shard) move(h *header) {
	h.flags &^= flagUsed
	s.setHeader(s.tail, h)
	if s.head != s.tail {
		s.link(h.hash, s.tail, s.head)
		copy(s.data[s.head:], s.data[s.tail:s.tail+h.size])
	}
	s.head += h.size
}

// write fills the place of an entry. TTLs beyond longest are cut to it.
func (s *shard) write(at uint32, h *header, ttls []uint16, key, message []byte, longest uint32) {
	entry := s.data[at : at+h.size]
	h.encode(entry)
	rest := entry[headerSize:]
	for _, offset := range ttls {
		binary.LittleEndian.PutUint16(rest, offset)
		rest = rest[offsetSize:]
	}
	stored := rest[copy(rest, key):]
	copy(stored, message)
	for _, offset := range ttls {
		if field := stored[offset:]; binary.BigEndian.Uint32(field) > longest {
			binary.BigEndian.PutUint32(field, longest)
		}
	}
}

// appendMessage appends the message of an entry with TTLs as they are at its age.
// They are rounded up to whole seconds, so that those of a fresh answer are not 0.
func (s *shard) appendMessage(dst []byte, at uint32, h *header, age time.Duration) []byte {
	entry := s.data[at : at+h.size]
	offsets := entry[headerSize : headerSize+int(h.records)*offsetSize]
	start := headerSize + len(offsets) + int(h.key)
	length := len(dst)
	dst = append(dst, entry[start:start+int(h.message)]...)
	message := dst[length:]
	// An entry is at most some days old.
	passed := uint32(age / time.Second)
	for ; len(offsets) > 0; offsets = offsets[offsetSize:] {
		field := message[binary.LittleEndian.Uint16(offsets):]
		ttl := binary.BigEndian.Uint32(field)
		if ttl > passed {
			ttl -= passed
		} else {
			ttl = staleTTL
		}
		binary.BigEndian.PutUint32(field, ttl)
	}
	return dst
}
