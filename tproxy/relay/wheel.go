package relay

import (
	"math/bits"
	"time"
)

// wheel holds the flows that have a time-out, hashed by when it is due
// (Varghese and Lauck, "Hashed and Hierarchical Timing Wheels", scheme 7). Each
// level has 64 slots, of which one spans all of the level below; a word of bits
// tells which slots are in use, so that the next one is found without a search.
//
// Adding and removing take constant time and no memory. A flow on which bytes
// move is not touched: it is looked at when the slot where it was first put
// comes up, and put further ahead if it has moved since.
type wheel struct {
	now    int64 // the tick up to which everything has been visited
	levels [wheelLevels]level
}

type level struct {
	used  uint64 // bit i: slots[i] is not empty
	slots [wheelSlots]*flow
}

const (
	// tick is the resolution: a time-out is at most this late, and never early.
	tick        = 64 * time.Millisecond
	wheelBits   = 6
	wheelSlots  = 1 << wheelBits
	wheelLevels = 4 // 64^4 ticks are 12 days; a longer time is visited more than once
	never       = time.Duration(1<<63 - 1)
)

// set makes sure that f is visited at the time due. A flow that is visited before
// that anyway stays where it is.
func (w *wheel) set(f *flow, due time.Duration) {
	when := max(int64((due+tick-1)/tick), w.now+1)
	if f.when != 0 {
		if f.when <= when {
			return
		}
		w.remove(f)
	}
	f.when = when
	w.insert(f)
}

// place returns the level and the slot for a tick that is still to come: the
// highest digit, to the base of 64, in which it differs from the present one.
func (w *wheel) place(when int64) (number, slot int) {
	number = (bits.Len64(uint64(w.now^when)) - 1) / wheelBits
	if number >= wheelLevels {
		// The top level goes round. What lies beyond its horizon is put into the
		// slot that comes up last and placed again from there.
		const shift = wheelBits * (wheelLevels - 1)
		number = wheelLevels - 1
		return number, int(min(when>>shift, w.now>>shift+wheelSlots-1)) & (wheelSlots - 1)
	}
	return number, int(when>>(wheelBits*number)) & (wheelSlots - 1)
}

func (w *wheel) insert(f *flow) {
	number, slot := w.place(f.when)
	level := &w.levels[number]
	f.at = uint16(number<<wheelBits | slot)
	f.prev, f.next = nil, level.slots[slot]
	if f.next != nil {
		f.next.prev = f
	}
	level.slots[slot] = f
	level.used |= 1 << slot
}

// remove takes out f, if it is in.
func (w *wheel) remove(f *flow) {
	if f.when == 0 {
		return
	}
	if f.next != nil {
		f.next.prev = f.prev
	}
	level, slot := &w.levels[f.at>>wheelBits], f.at&(wheelSlots-1)
	switch {
	case f.prev != nil:
		f.prev.next = f.next
	case f.next != nil:
		level.slots[slot] = f.next
	default:
		level.slots[slot] = nil
		level.used &^= 1 << slot
	}
	f.prev, f.next, f.when = nil, nil, 0
}

// first returns the first slot that is in use and the tick at which it comes up. A
// lower level always comes up before a higher one.
func (w *wheel) first() (number, slot int, when int64, ok bool) {
	for number := range w.levels {
		used := w.levels[number].used
		if used == 0 {
			continue
		}
		shift := wheelBits * number
		here := int(w.now>>shift) & (wheelSlots - 1)
		// The slot of the present tick is empty, so the distance is 1 to 63.
		ahead := bits.TrailingZeros64(bits.RotateLeft64(used, -here))
		return number, (here + ahead) & (wheelSlots - 1), (w.now>>shift + int64(ahead)) << shift, true
	}
	return 0, 0, 0, false
}

// next returns the time at which advance has work, or never.
func (w *wheel) next() time.Duration {
	_, _, when, ok := w.first()
	if !ok {
		return never
	}
	return time.Duration(when) * tick
}

// advance visits every flow whose time has come. visit finds it outside of the
// wheel and may set it again, or remove any other.
func (w *wheel) advance(to time.Duration, visit func(*flow)) {
	end := int64(to / tick)
	for {
		number, slot, when, ok := w.first()
		if !ok || when > end {
			break
		}
		w.now = when
		// From the head and one by one, because a visit may end other flows.
		// Nothing is put into this slot meanwhile: it is the present one.
		for level := &w.levels[number]; level.slots[slot] != nil; {
			f := level.slots[slot]
			due := f.when
			w.remove(f)
			if due > when {
				f.when = due
				w.insert(f)
				continue
			}
			visit(f)
		}
	}
	w.now = max(w.now, end)
}
