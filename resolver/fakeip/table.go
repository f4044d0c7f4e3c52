package fakeip

// table holds names by number and the other way round, in the order of their last
// use. Everything takes constant time; the places are a doubly linked list.
type table struct {
	max      int
	places   []place
	byName   map[string]int32 // place
	byOffset map[uint32]int32 // place
	newest   int32            // place; none if there is no name
	oldest   int32
	idle     []int32 // places without a name or number
	next     uint32  // all numbers below are taken
}

// place is where a name and its number lie.
type place struct {
	name         string
	offset       uint32
	newer, older int32 // places; none at the ends
	used         bool  // since the uses were last written
}

// none is no place.
const none = -1

// entry is a name and its number, outside of the table.
type entry struct {
	name   string
	offset uint32
}

// newTable returns a table for at most max names. The numbers must be more than that, or as many.
func newTable(max int) table {
	return table{
		max:      max,
		byName:   make(map[string]int32),
		byOffset: make(map[uint32]int32),
		newest:   none,
		oldest:   none,
	}
}

// offset returns the number of a name and counts as a use.
func (t *table) offset(name string) (offset uint32, ok bool) {
	at, ok := t.byName[name]
	if !ok {
		return 0, false
	}
	t.use(at)
	return t.places[at].offset, true
}

// name returns the name of a number and counts as a use.
func (t *table) name(offset uint32) (name string, ok bool) {
	at, ok := t.byOffset[offset]
	if !ok {
		return "", false
	}
	t.use(at)
	return t.places[at].name, true
}

// use makes a place the newest. Those that are used since the uses were last
// written are therefore always the newest ones, without gap.
func (t *table) use(at int32) {
	t.places[at].used = true
	if t.newest != at {
		t.unlink(at)
		t.link(at)
	}
}

// claim returns a place with a number for a new name, out of the order and the
// maps: put has to follow. It takes a free number if there are fewer names than
// the table may hold, else that of the oldest name.
func (t *table) claim() (at int32) {
	if len(t.byName) >= t.max {
		at = t.oldest
		t.remove(at)
		return at
	}
	for t.taken(t.next) {
		t.next++
	}
	at = t.empty()
	t.places[at].offset = t.next
	t.next++
	return at
}

// taken reports whether a number belongs to a name.
func (t *table) taken(offset uint32) bool {
	_, ok := t.byOffset[offset]
	return ok
}

// put gives a claimed place its name and makes it the newest.
func (t *table) put(at int32, name string) {
	place := &t.places[at]
	place.name = name
	place.used = true
	t.byName[name] = at
	t.byOffset[place.offset] = at
	t.link(at)
}

// restore does what a line of the store says: it supersedes what the table has
// for the name and for the number. dropped says that a name had to go because the
// table was full.
func (t *table) restore(e entry) (dropped bool) {
	if at, ok := t.byName[e.name]; ok {
		t.discard(at)
	}
	if at, ok := t.byOffset[e.offset]; ok {
		t.discard(at)
	}
	if len(t.byName) >= t.max {
		t.discard(t.oldest)
		dropped = true
	}
	at := t.empty()
	t.places[at].offset = e.offset
	t.put(at, e.name)
	t.places[at].used = false
	return dropped
}

// empty returns a place without a name.
func (t *table) empty() (at int32) {
	if last := len(t.idle) - 1; last >= 0 {
		at = t.idle[last]
		t.idle = t.idle[:last]
		return at
	}
	t.places = append(t.places, place{})
	return int32(len(t.places) - 1)
}

// discard takes a name out and frees its place and its number.
func (t *table) discard(at int32) {
	t.remove(at)
	t.idle = append(t.idle, at)
}

// remove takes a place out of the maps and of the order.
func (t *table) remove(at int32) {
	place := &t.places[at]
	delete(t.byName, place.name)
	delete(t.byOffset, place.offset)
	place.name = ""
	t.unlink(at)
}

// link makes a place the newest.
func (t *table) link(at int32) {
	t.places[at].newer, t.places[at].older = none, t.newest
	if t.newest == none {
		t.oldest = at
	} else {
		t.places[t.newest].newer = at
	}
	t.newest = at
}

// unlink takes a place out of the order.
func (t *table) unlink(at int32) {
	newer, older := t.places[at].newer, t.places[at].older
	if newer == none {
		t.newest = older
	} else {
		t.places[newer].older = older
	}
	if older == none {
		t.oldest = newer
	} else {
		t.places[older].newer = newer
	}
}

// takeUsed returns the places that were used since the last call, newest first;
// all places if all is set.
func (t *table) takeUsed(all bool) (places []int32) {
	for at := t.newest; at != none && (all || t.places[at].used); at = t.places[at].older {
		t.places[at].used = false
		places = append(places, at)
	}
	return places
}
