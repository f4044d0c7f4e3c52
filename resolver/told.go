package resolver

import (
	"hash/maphash"
	"net/netip"
	"sync"
)

// told remembers for which name each client was last told an address. It is a table
// of fixed size in which what is told anew takes the place of what was told there
// before: a flow comes right after its answer.
type told struct {
	seed   maphash.Seed
	shards [toldShards]toldShard
}

// 32 Ki answers: some hundred names for each of some hundred clients, in 2 MiB.
const (
	toldShards = 64
	toldSets   = 128 // in a shard
	toldWays   = 4   // in a set
)

type toldShard struct {
	mutex sync.Mutex
	sets  [toldSets]toldSet
}

type toldSet struct {
	entries [toldWays]toldEntry
	next    uint8 // the one to be replaced
}

type toldEntry struct {
	client, address [16]byte
	name            string // in wire form; empty for a vacant entry

	// Of an entry of otherFamily, which all clients share: who was told, zero if several
	// were, and whether they were told different names.
	asker [16]byte
	mixed bool
}

// again takes note of a name that an asker was told for the same address. A client that
// shares the entry must not choose the name under which the flows of another leave: once
// names differ there is none.
func (e *toldEntry) again(asker [16]byte, name []byte) {
	same := e.name == string(name)
	switch {
	case !same && e.asker != asker:
		e.mixed = true
	case !same:
		e.name = string(name)
	case e.asker != asker:
		e.asker = [16]byte{}
	}
}

// otherFamily stands for the client of an answer that was asked for over the other
// family than that of the address in it: the flow will come from an address of the
// client that cannot be told beforehand.
var otherFamily = netip.IPv6Unspecified()

func newTold() *told { return &told{seed: maphash.MakeSeed()} }

// set locks and returns the set in which the answer belongs.
func (t *told) set(client, address [16]byte) (*toldSet, *sync.Mutex) {
	hash := maphash.Comparable(t.seed, [2][16]byte{client, address})
	shard := &t.shards[hash%toldShards]
	shard.mutex.Lock()
	return &shard.sets[hash/toldShards%toldSets], &shard.mutex
}

// remember takes note of an answer. name is in wire form, and copied only when it is
// not what was told before.
func (t *told) remember(client, address netip.Addr, name []byte) {
	asker := client.As16()
	if client.Unmap().Is4() != address.Is4() {
		client = otherFamily
	}
	key := [2][16]byte{client.As16(), address.As16()}
	set, mutex := t.set(key[0], key[1])
	defer mutex.Unlock()
	for i := range set.entries {
		if e := &set.entries[i]; e.client == key[0] && e.address == key[1] && e.name != "" {
			e.again(asker, name)
			return
		}
	}
	set.entries[set.next] = toldEntry{client: key[0], address: key[1], name: string(name), asker: asker}
	set.next = (set.next + 1) % toldWays
}

// name returns the name that a client asked for when it was told an address.
func (t *told) name(client, address netip.Addr) (name string, ok bool) {
	if name, ok = t.find(client, address); !ok {
		name, ok = t.find(otherFamily, address)
	}
	return name, ok
}

func (t *told) find(client, address netip.Addr) (name string, ok bool) {
	key := [2][16]byte{client.As16(), address.Unmap().As16()}
	set, mutex := t.set(key[0], key[1])
	defer mutex.Unlock()
	for i := range set.entries {
		if e := &set.entries[i]; e.client == key[0] && e.address == key[1] && e.name != "" {
			return nameText([]byte(e.name)), !e.mixed
		}
	}
	return "", false
}

// rememberAll takes note of the addresses in an answer to a client.
func (s *Server) rememberAll(client netip.Addr, q *query, answer []byte) {
	if q.kind != typeA && q.kind != typeAAAA || q.class != classIN {
		return
	}
	for r, err := range records(answer, len(q.message)) {
		if err != nil || r.section != 1 {
			return
		}
		data := r.data(answer)
		switch {
		case r.kind == typeA && len(data) == 4:
			s.told.remember(client, netip.AddrFrom4([4]byte(data)), q.name)
		case r.kind == typeAAAA && len(data) == 16:
			s.told.remember(client, netip.AddrFrom16([16]byte(data)), q.name)
		}
	}
}
