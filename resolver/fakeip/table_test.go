package fakeip

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// order returns what is in the table, the oldest first.
func (t *table) order() (entries []entry) {
	for at := t.oldest; at != none; at = t.places[at].newer {
		entries = append(entries, entry{t.places[at].name, t.places[at].offset})
	}
	return entries
}

// wantWhole checks that the parts of a pool's table agree with one another.
func wantWhole(t testing.TB, p *Pool) {
	t.Helper()
	table := &p.table
	entries := table.order()
	if len(entries) > table.max || len(entries) != len(table.byName) || len(entries) != len(table.byOffset) ||
		len(entries)+len(table.idle) != len(table.places) {
		t.Fatalf("%d in order, %d by name, %d by number, %d idle, %d places, at most %d", len(entries),
			len(table.byName), len(table.byOffset), len(table.idle), len(table.places), table.max)
	}
	backwards := 0
	used := true
	for at := table.newest; at != none; at = table.places[at].older {
		backwards++
		if table.places[at].used && !used {
			t.Fatal("a used place is older than one that is not")
		}
		used = table.places[at].used
	}
	if backwards != len(entries) {
		t.Fatalf("%d from the oldest, %d from the newest", len(entries), backwards)
	}
	for _, e := range entries {
		byName, byOffset := table.byName[e.name], table.byOffset[e.offset]
		if byName != byOffset || table.places[byName].name != e.name || e.offset >= p.ranges.size || !valid(e.name) {
			t.Fatalf("%v is at places %d and %d", e, byName, byOffset)
		}
	}
}

// wantSame checks that two pools hold the same in the same order.
func wantSame(t testing.TB, got, want *Pool) {
	t.Helper()
	if got, want := got.table.order(), want.table.order(); !slices.Equal(got, want) {
		t.Fatalf("holds %v\n want %v", got, want)
	}
}

func TestTableIsALeastRecentlyUsedOne(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for max := 1; max < 8; max++ {
		p := open(t, Config{Max: max})
		var model []entry // the oldest first
		for step := range 2000 {
			e := entry{name: fmt.Sprintf("%d.test", random.IntN(12)), offset: uint32(random.IntN(10))}
			byName := slices.IndexFunc(model, func(m entry) bool { return m.name == e.name })
			switch random.IntN(3) {
			case 0:
				address := lookup(t, p, e.name)
				e.offset, _ = p.ranges.offset(address)
				if byName >= 0 {
					if model[byName].offset != e.offset {
						t.Fatalf("the number of %v was %d", e, model[byName].offset)
					}
					model = slices.Delete(model, byName, byName+1)
				} else if len(model) == max {
					if model[0].offset != e.offset {
						t.Fatalf("%v is not in place of %v", e, model[0])
					}
					model = slices.Delete(model, 0, 1)
				}
				model = append(model, e)
			case 1:
				address, _ := p.ranges.addresses(e.offset)
				name, ok := p.Name(address)
				i := slices.IndexFunc(model, func(m entry) bool { return m.offset == e.offset })
				if ok != (i >= 0) || ok && model[i].name != name {
					t.Fatalf("number %d is of %q, %v; model %v", e.offset, name, ok, model)
				}
				if ok {
					model = append(slices.Delete(model, i, i+1), entry{name, e.offset})
				}
			case 2:
				if step > 20 { // as Open does, before anything else
					break
				}
				model = slices.DeleteFunc(model, func(m entry) bool { return m.name == e.name || m.offset == e.offset })
				if len(model) == max {
					model = slices.Delete(model, 0, 1)
				}
				p.table.restore(e)
				model = append(model, e)
				for i := range p.table.places {
					p.table.places[i].used = false
				}
			}
			if step%50 == 0 {
				p.table.takeUsed(false)
			}
			wantWhole(t, p)
			if got := p.table.order(); !slices.Equal(got, model) {
				t.Fatalf("holds %v\nmodel %v", got, model)
			}
		}
	}
}
