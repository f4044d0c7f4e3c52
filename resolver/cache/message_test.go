package cache

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

func TestPutRefuses(t *testing.T) {
	whole := simple(t, 60)
	owner := bytes.LastIndex(whole, []byte{0xc0, 0x0c}) // the pointer that is the name of the record
	changed := func(change func(m *dnsmessage.Message)) []byte {
		m := response(dnsmessage.RCodeSuccess)
		m.Answers = []dnsmessage.Resource{address(question, 60)}
		change(&m)
		return pack(t, m)
	}
	bytesChanged := func(change func(b []byte) []byte) []byte { return change(bytes.Clone(whole)) }
	pointer := func(to int) []byte {
		return bytesChanged(func(b []byte) []byte {
			binary.BigEndian.PutUint16(b[owner:], 0xc000|uint16(to))
			return b
		})
	}
	for name, answer := range map[string][]byte{
		"nothing":          nil,
		"half a header":    whole[:11],
		"header alone":     whole[:12],
		"a query":          changed(func(m *dnsmessage.Message) { m.Response = false }),
		"another opcode":   changed(func(m *dnsmessage.Message) { m.OpCode = 5 }),
		"truncated":        changed(func(m *dnsmessage.Message) { m.Truncated = true }),
		"SERVFAIL":         changed(func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeServerFailure }),
		"REFUSED":          changed(func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeRefused }),
		"TTL 0":            simple(t, 0),
		"no question":      changed(func(m *dnsmessage.Message) { m.Questions = nil }),
		"two questions":    changed(func(m *dnsmessage.Message) { m.Questions = append(m.Questions, m.Questions[0]) }),
		"NODATA, no SOA":   changed(func(m *dnsmessage.Message) { m.Answers = nil }),
		"alias, no SOA":    changed(func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{alias(question, "a.", 60)} }),
		"NXDOMAIN, no SOA": changed(func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError }),
		"referral": changed(func(m *dnsmessage.Message) {
			m.Answers = nil
			m.Authorities = []dnsmessage.Resource{record("org.", 60, &dnsmessage.NSResource{NS: dnsmessage.MustNewName("ns.")})}
		}),
		"SOA as answer alone": changed(func(m *dnsmessage.Message) { m.Answers = []dnsmessage.Resource{authority(60, 60)} }),
		"OPT": changed(func(m *dnsmessage.Message) {
			m.Additionals = []dnsmessage.Resource{record(".", 0x8000, &dnsmessage.OPTResource{})}
		}),
		"short SOA": changed(func(m *dnsmessage.Message) {
			m.Answers, m.Authorities = nil, []dnsmessage.Resource{record(".", 60, &dnsmessage.UnknownResource{Type: typeSOA, Data: make([]byte, 21)})}
		}),
		"long SOA": changed(func(m *dnsmessage.Message) {
			m.Answers, m.Authorities = nil, []dnsmessage.Resource{record(".", 60, &dnsmessage.UnknownResource{Type: typeSOA, Data: make([]byte, 23)})}
		}),
		"bytes after the end":       bytesChanged(func(b []byte) []byte { return append(b, 0) }),
		"one record too few":        bytesChanged(func(b []byte) []byte { b[7] = 2; return b }),
		"65,535 records too few":    bytesChanged(func(b []byte) []byte { b[10], b[11] = 255, 255; return b }),
		"data beyond the end":       bytesChanged(func(b []byte) []byte { b[len(b)-5]++; return b }),
		"reserved label":            bytesChanged(func(b []byte) []byte { b[12] |= 0x40; return b }),
		"pointer to itself":         pointer(owner),
		"pointer forward":           pointer(owner + 2),
		"pointer beyond the end":    pointer(0x3fff),
		"pointer into the header":   pointer(11),
		"half a pointer":            bytesChanged(func(b []byte) []byte { return b[:owner+1] }),
		"more than a message holds": append(bytes.Clone(whole), make([]byte, 65536)...),
	} {
		c := New(large())
		if c.Put([]byte("key"), answer, epoch) {
			t.Errorf("%s: stored", name)
		}
		if s := state(c, "key", epoch); s != Miss {
			t.Errorf("%s: %v", name, s)
		}
		// The capacity is cut, so that looking beyond the end panics.
		for n := range min(len(answer), 200) {
			c.Put([]byte("key"), answer[:n:n], epoch)
		}
	}
	c := New(large())
	if c.Put(make([]byte, 65536), whole, epoch) {
		t.Error("giant key: stored")
	}
}

// TestPointerChains: names that are made of pointers to pointers are taken up to a
// bound and cost little beyond it.
func TestPointerChains(t *testing.T) {
	build := func(pointers int) []byte {
		b := []byte{0, 0, 0x80, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1} // the root, A, IN
		chain := pointers - 1
		// The chain lies in the data of the first record.
		b = append(b, 0, 0, 1, 0, 1, 0, 0, 0, 60, byte((2*chain)>>8), byte(2*chain))
		target := 12
		for range chain {
			b = append(b, 0xc0|byte(target>>8), byte(target))
			target = len(b) - 2
		}
		b = append(b, 0xc0|byte(target>>8), byte(target), 0, 1, 0, 1, 0, 0, 0, 60, 0, 0)
		return b
	}
	c := New(large())
	for pointers, want := range map[int]bool{1: true, 2: true, maxPointers: true, maxPointers + 1: false, 8000: false} {
		if got := c.Put([]byte("key"), build(pointers), epoch); got != want {
			t.Errorf("%d pointers: stored %v", pointers, got)
		}
	}
}

func TestNamesOf255BytesAtMost(t *testing.T) {
	c := New(large())
	for _, last := range []int{61, 62} {
		var name []byte
		for _, length := range []int{63, 63, 63, last} {
			name = append(append(name, byte(length)), make([]byte, length)...)
		}
		b := []byte{0, 0, 0x80, 0, 0, 1, 0, 1, 0, 0, 0, 0}
		b = append(append(b, name...), 0, 0, 1, 0, 1)
		b = append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1)
		if got, want := c.Put([]byte("key"), b, epoch), last == 61; got != want {
			t.Errorf("last label of %d bytes: stored %v", last, got)
		}
	}
}

// expected says, from an unpacked message, for how many seconds the cache may keep it.
func expected(m *dnsmessage.Message) uint32 {
	if !m.Response || m.OpCode != 0 || m.Truncated || len(m.Questions) != 1 {
		return 0
	}
	negative, authority := true, false
	ttl, minimum := uint32(7*24*3600), uint32(3*3600)
	for _, r := range m.Answers {
		if r.Header.Type == m.Questions[0].Type || m.Questions[0].Type == dnsmessage.TypeALL {
			negative = false
		}
	}
	for _, section := range [][]dnsmessage.Resource{m.Answers, m.Authorities, m.Additionals} {
		for _, r := range section {
			if r.Header.Type == dnsmessage.TypeOPT {
				return 0
			}
			ttl = min(ttl, r.Header.TTL)
		}
	}
	for _, r := range m.Authorities {
		if body, ok := r.Body.(*dnsmessage.SOAResource); ok {
			authority, minimum = true, min(minimum, body.MinTTL)
		}
	}
	switch {
	case m.RCode == dnsmessage.RCodeNameError:
		negative = true
	case m.RCode != dnsmessage.RCodeSuccess:
		return 0
	}
	if !negative {
		return ttl
	}
	if !authority {
		return 0
	}
	return min(ttl, minimum)
}

// FuzzPutGet: whatever is put, no panic; what comes out is what went in but for TTLs,
// which never grow; and what is stored, for how long, agrees with a reading of the
// message by another parser.
func FuzzPutGet(f *testing.F) {
	signed := response(dnsmessage.RCodeSuccess)
	signed.Answers = []dnsmessage.Resource{
		alias(question, "a.example.org.", 900), address("a.example.org.", 60),
		record(question, 60, &dnsmessage.UnknownResource{Type: 46, Data: make([]byte, 40)}),
	}
	noData := response(dnsmessage.RCodeSuccess)
	noData.Authorities = []dnsmessage.Resource{authority(300, 60)}
	for _, seed := range [][]byte{simple(f, 60), simple(f, 1<<31), nameError(f, 300, 60), pack(f, signed), pack(f, noData)} {
		f.Add([]byte("key"), seed, uint32(30))
	}
	f.Fuzz(func(t *testing.T, key, answer []byte, age uint32) {
		c := New(Config{MaxBytes: 1 << 19, MaxStale: time.Hour}) // small, for speed: entries of 8 KiB
		before := bytes.Clone(answer)
		stored := c.Put(key, answer, epoch)
		if !bytes.Equal(answer, before) {
			t.Fatal("Put changed the answer")
		}
		checkGet(t, c, key, answer, stored, age)
		checkRings(t, c)

		// Packed anew, it is as that parser understood it.
		var m dnsmessage.Message
		if m.Unpack(answer) != nil {
			return
		}
		packed, err := m.Pack()
		if err != nil || len(packed) > 4000 {
			return
		}
		ttl := expected(&m)
		if got := c.Put([]byte("packed"), packed, epoch); got != (ttl > 0) {
			t.Fatalf("stored %v, expected TTL %d: %x", got, ttl, packed)
		}
		if end := time.Duration(ttl) * time.Second; ttl > 0 {
			if s := state(c, "packed", after(end-1)); s != Fresh {
				t.Fatalf("TTL %d, before its end: %v", ttl, s)
			}
			if s := state(c, "packed", after(end)); s != Stale {
				t.Fatalf("TTL %d, at its end: %v", ttl, s)
			}
		}
	})
}

// checkGet compares what comes out with what went in.
func checkGet(t *testing.T, c *Cache, key, answer []byte, stored bool, age uint32) {
	t.Helper()
	first, s := c.Get(nil, key, epoch)
	if stored != (s == Fresh) || !stored && (s != Miss || first != nil) {
		t.Fatalf("stored %v, then %v", stored, s)
	}
	if !stored {
		return
	}
	later, s := c.Get(nil, key, after(time.Duration(age)*time.Second))
	places, ok := parse(answer, nil)
	if !ok {
		t.Fatal("stored, but not to be parsed")
	}
	if len(first) != len(answer) || s != Miss && len(later) != len(answer) || s == Miss && len(later) != 0 {
		t.Fatalf("%d bytes in, %d out, then %d (%v)", len(answer), len(first), len(later), s)
	}
	for _, at := range places.ttls {
		in, out := binary.BigEndian.Uint32(answer[at:]), binary.BigEndian.Uint32(first[at:])
		if out == 0 || out > in || out > 7*24*3600 {
			t.Fatalf("TTL %d came out as %d", in, out)
		}
		copy(first[at:], answer[at:at+4])
		if s == Miss {
			continue
		}
		if aged := binary.BigEndian.Uint32(later[at:]); aged != out-age && !(s == Stale && age >= out && aged == staleTTL) {
			t.Fatalf("%v after %d s: TTL %d came out as %d", s, age, out, aged)
		}
		copy(later[at:], answer[at:at+4])
	}
	if !bytes.Equal(first, answer) || s != Miss && !bytes.Equal(later, answer) {
		t.Fatal("more than TTLs changed")
	}
}
