package relay

// slab holds the flows of a loop in chunks that never move, so that a flow is
// reached from the number in an epoll event and pointers to it stay valid.
//
// A slot is used again after its flow has ended. Events that were fetched for the
// old flow carry the old generation and are recognised by it: a descriptor number
// would not do, because the kernel gives it out again at once. Chunks are kept: the
// slab is as large as the most flows that were open at a time.
type slab struct {
	chunks []*[slabChunk]flow
	free   *flow // the slots to use next, linked by flow.next
	used   int   // flows that are alive
}

// slabChunk is how many flows are allocated at a time: 16 KiB.
const slabChunk = 64

// token names a side of a flow for as long as the flow lives. It travels in the
// data of epoll events and in the queue of a loop.
type token struct {
	slot       int32 // twice the number of the slot, plus the side; negative for a listener
	generation int32
}

// take returns a flow that is zero but for what identifies it.
func (s *slab) take() *flow {
	if s.free == nil {
		s.grow()
	}
	f := s.free
	s.free = f.next
	f.next = nil
	s.used++
	return f
}

func (s *slab) grow() {
	chunk := new([slabChunk]flow)
	first := int32(len(s.chunks) * slabChunk)
	s.chunks = append(s.chunks, chunk)
	// From the back, so that low numbers are used first.
	for i := slabChunk - 1; i >= 0; i-- {
		chunk[i].slot = first + int32(i)
		chunk[i].next = s.free
		s.free = &chunk[i]
	}
}

// give takes back a flow. Every token of it is stale from then on.
func (s *slab) give(f *flow) {
	*f = flow{slot: f.slot, generation: f.generation + 1, next: s.free}
	s.free = f
	s.used--
}

// find returns the flow and the side that a token names, or nil when that flow
// has ended.
func (s *slab) find(t token) (*flow, side) {
	slot := t.slot >> 1
	f := &s.chunks[slot/slabChunk][slot%slabChunk]
	if f.generation != t.generation || f.stage == vacant {
		return nil, 0
	}
	return f, side(t.slot & 1)
}

// each calls do with every flow that is alive; do may end it.
func (s *slab) each(do func(*flow)) {
	for _, chunk := range s.chunks {
		for i := range chunk {
			if chunk[i].stage != vacant {
				do(&chunk[i])
			}
		}
	}
}
