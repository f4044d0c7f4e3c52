package fakeip

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

// FuzzStore: no store makes the reader panic or the pool disagree with itself,
// and what is read is the same once it was written.
func FuzzStore(f *testing.F) {
	both := goodHeader + goodLine("a.test", 2) + goodLine("b.test", 3) + goodLine("c.test", 4)
	f.Add([]byte(both), uint8(2))
	f.Add([]byte(both[:len(both)-7]), uint8(200))
	f.Add([]byte(goodHeader+goodLine("a.test", 2)+goodLine("b.test", 2)+goodLine("a.test", 9)), uint8(3))
	f.Add([]byte("\x00\x00\n"+goodLine("a.test", 2)), uint8(1))
	f.Add([]byte(goodHeader+strings.Repeat("x", 2*maxLine)+"\n"+goodLine("a.test", 2)), uint8(1))
	f.Add([]byte("transproxy-tproxy fake-ip 2 \xff\n"), uint8(1))
	f.Add([]byte(""), uint8(1))
	f.Fuzz(func(t *testing.T, store []byte, names uint8) {
		max := int(names) + 1
		config := Config{IPv4: ipv4, IPv6: ipv6, Max: max}
		p := open(t, config)
		restored := 0
		found, err := p.ranges.read(bytes.NewReader(store), func(e entry) {
			restored++
			p.table.restore(e)
		})
		if err != nil && !errors.Is(err, errNoStore) {
			t.Fatal(err)
		}
		if (err != nil || found.other != "") && restored > 0 {
			t.Fatal("read a store of somebody else's")
		}
		if lines := bytes.Count(store, []byte("\n")) + 1; restored+found.damaged > lines {
			t.Fatalf("%d restored and %d damaged of %d lines", restored, found.damaged, lines)
		}
		for _, note := range found.notes() {
			if strings.ContainsAny(note, "\n\x00") {
				t.Fatalf("note %q", note)
			}
		}
		wantWhole(t, p)

		var text []byte
		for line := range p.text(p.used(true)) {
			if len(line) > maxLine {
				t.Fatalf("line %q", line)
			}
			text = append(text, line...)
		}
		again := open(t, config)
		found, err = again.ranges.read(bytes.NewReader(text), func(e entry) { again.table.restore(e) })
		if err != nil || found != (contents{}) {
			t.Fatalf("%+v, %v", found, err)
		}
		wantSame(t, again, p)

		// New names go on as always, whatever was held.
		for _, name := range []string{"new1.example", "new2.example"} {
			held := p.table.order()
			_, known := p.table.byName[name]
			address := lookup(t, p, name)
			offset, _ := p.ranges.offset(address)
			taken := slices.ContainsFunc(held, func(e entry) bool { return e.offset == offset })
			if !known && taken != (len(held) == max) {
				t.Fatalf("%s has number %d, %d names held before: %v", name, offset, len(held), held)
			}
			wantName(t, p, address, name)
		}
		wantWhole(t, p)
	})
}
