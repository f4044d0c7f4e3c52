package cache

import (
	"encoding/binary"
	"math"
	"time"
)

// An entry is, in the memory of a shard:
//
//	header | where the TTLs are in the message, 2 bytes each | key | message | padding
const (
	headerSize = 48 // bytes
	offsetSize = 2  // bytes
	alignment  = 16 // bytes; room for an answer to grow a little without moving

	maxKey     = math.MaxUint16 // bytes
	maxMessage = math.MaxUint16 // bytes; as over TCP (RFC 1035, section 4.2.2)
)

const (
	// A name is asked for repeatedly from this many times on. Half the times of the
	// answer before count too, so that short TTLs do not hide it.
	hotUses = 3

	// An answer is soon to expire in the last tenth of its time, but not less than
	// dueLeast before, which a slow server may need, and never in the first half.
	dueShare = 10
	dueLeast = 2 * time.Second

	// dueAgain is when a refresh that was asked for is taken for lost: more than a
	// question takes, other servers that are tried after the first included.
	dueAgain = 10 * time.Second
)

// The flags of an entry.
const (
	flagUsed = 1 << iota // asked for since it was written or last passed over
	flagDead             // replaced or dropped: not in the index any more
)

// header is what is known of an entry.
type header struct {
	next    uint32 // the next entry of the same bucket, or 0
	size    uint32 // bytes of the whole entry
	hash    uint32
	ttl     uint32 // seconds for which the answer is fresh
	stored  moment
	told    uint32 // age in seconds when a caller was last told Due, or 0
	uses    uint16 // times asked for, as far as it counts for hotUses
	records uint16
	key     uint16 // bytes
	message uint16 // bytes
	flags   uint8
}

// entrySize is the size of an entry in bytes.
func entrySize(records, key, message int) int {
	return (headerSize + records*offsetSize + key + message + alignment - 1) &^ (alignment - 1)
}

func (h *header) decode(b []byte) {
	_ = b[headerSize-1]
	h.next = binary.LittleEndian.Uint32(b[0:])
	h.size = binary.LittleEndian.Uint32(b[4:])
	h.hash = binary.LittleEndian.Uint32(b[8:])
	h.ttl = binary.LittleEndian.Uint32(b[12:])
	h.stored.monotonic = int64(binary.LittleEndian.Uint64(b[16:]))
	h.stored.wall = int64(binary.LittleEndian.Uint64(b[24:]))
	h.told = binary.LittleEndian.Uint32(b[32:])
	h.uses = binary.LittleEndian.Uint16(b[36:])
	h.records = binary.LittleEndian.Uint16(b[38:])
	h.key = binary.LittleEndian.Uint16(b[40:])
	h.message = binary.LittleEndian.Uint16(b[42:])
	h.flags = b[44]
}

func (h *header) encode(b []byte) {
	_ = b[headerSize-1]
	binary.LittleEndian.PutUint32(b[0:], h.next)
	binary.LittleEndian.PutUint32(b[4:], h.size)
	binary.LittleEndian.PutUint32(b[8:], h.hash)
	binary.LittleEndian.PutUint32(b[12:], h.ttl)
	binary.LittleEndian.PutUint64(b[16:], uint64(h.stored.monotonic))
	binary.LittleEndian.PutUint64(b[24:], uint64(h.stored.wall))
	binary.LittleEndian.PutUint32(b[32:], h.told)
	binary.LittleEndian.PutUint16(b[36:], h.uses)
	binary.LittleEndian.PutUint16(b[38:], h.records)
	binary.LittleEndian.PutUint16(b[40:], h.key)
	binary.LittleEndian.PutUint16(b[42:], h.message)
	b[44] = h.flags
}

// fresh is the time for which the answer is fresh.
func (h *header) fresh() time.Duration {
	return time.Duration(h.ttl) * time.Second
}

// use says what the answer is worth at an age, and notes that it was asked for.
func (h *header) use(age, maxStale time.Duration) State {
	fresh := h.fresh()
	if age >= fresh+maxStale {
		return Miss
	}
	h.flags |= flagUsed
	if h.uses < math.MaxUint16 {
		h.uses++
	}
	if age >= fresh {
		return Stale
	}
	soon := min(max(fresh/dueShare, dueLeast), fresh/2)
	if h.uses < hotUses || fresh-age > soon {
		return Fresh
	}
	if h.told != 0 && age < time.Duration(h.told)*time.Second+dueAgain {
		return Fresh
	}
	h.told = uint32(max(1, age/time.Second))
	return Due
}

// moment is a time on two clocks, in nanoseconds. The monotonic one stands still
// while the machine sleeps, the wall clock may be set back: each alone would let
// answers live too long. A wall clock that is set forward makes them expire early,
// which does no harm.
type moment struct {
	monotonic, wall int64
}

func (c *Cache) moment(now time.Time) moment {
	return moment{monotonic: int64(now.Sub(c.start)), wall: now.UnixNano()}
}

// since is the time that has passed, never negative: another goroutine may have
// stored with a later now.
func (m moment) since(before moment) time.Duration {
	return time.Duration(max(m.monotonic-before.monotonic, m.wall-before.wall, 0))
}
