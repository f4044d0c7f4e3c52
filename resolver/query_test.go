package resolver

import (
	"bytes"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// packed is a message in wire form.
func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	bytes, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return bytes
}

// question is a client's query.
func question(name string, kind uint16) *dns.Msg {
	m := new(dns.Msg).SetQuestion(name, kind)
	m.Id = 4711
	return m
}

func TestQueryIsRead(t *testing.T) {
	m := question("WWW.Example.ORG.", dns.TypeAAAA)
	m.CheckingDisabled = true
	m.SetEdns0(1400, true)
	m.IsEdns0().Option = []dns.EDNS0{
		&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"},
		&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}},
	}
	var q query
	if err := q.read(packed(t, m)); err != nil {
		t.Fatal(err)
	}
	if q.text() != "www.example.org" || q.kind != dns.TypeAAAA || q.class != dns.ClassINET || !q.edns || q.size != 1400 || !q.do || len(q.ecs) == 0 || q.limit() != 1400 {
		t.Errorf("%+v", q)
	}
	key := q.key(nil)
	m.Question[0].Name = "www.example.org."
	if err := q.read(packed(t, m)); err != nil || !bytes.Equal(key, q.key(nil)) {
		t.Errorf("letter case makes another key: %v", err)
	}
	m.CheckingDisabled = false
	if err := q.read(packed(t, m)); err != nil || bytes.Equal(key, q.key(nil)) {
		t.Errorf("CD makes no other key: %v", err)
	}
}

func TestQueryFaults(t *testing.T) {
	good := packed(t, question("a.test.", dns.TypeA))
	response := packed(t, new(dns.Msg).SetReply(question("a.test.", dns.TypeA)))
	two := question("a.test.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	none := question("a.test.", dns.TypeA)
	none.Question = nil
	notify := question("a.test.", dns.TypeSOA)
	notify.Opcode = dns.OpcodeNotify
	opts := question("a.test.", dns.TypeA)
	opts.SetEdns0(1232, false).SetEdns0(1232, false)
	loop := append(bytes.Clone(good[:headerSize]), 0xc0, headerSize, 0, 1, 0, 1)
	long := append(bytes.Clone(good[:headerSize]), bytes.Repeat(append([]byte{63}, bytes.Repeat([]byte{'a'}, 63)...), 4)...)
	for name, test := range map[string]struct {
		message []byte
		want    error
	}{
		"empty":          {nil, errIgnored},
		"half a header":  {good[:6], errIgnored},
		"a response":     {response, errIgnored},
		"two questions":  {packed(t, two), errForm},
		"no question":    {packed(t, none), errForm},
		"another opcode": {packed(t, notify), errOpcode},
		"cut":            {good[:len(good)-1], errForm},
		"cut name":       {good[:headerSize+3], errForm},
		"more behind it": {append(bytes.Clone(good), 0), errForm},
		"a pointer":      {loop, errForm},
		"too long":       {append(long, 0, 0, 1, 0, 1), errForm},
		"two OPT":        {packed(t, opts), errForm},
		"good":           {good, nil},
	} {
		var q query
		if err := q.read(test.message); err != test.want {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

// answerTo is a server's answer in wire form.
func answerTo(t testing.TB, m *dns.Msg, records ...string) []byte {
	t.Helper()
	reply := new(dns.Msg).SetReply(m)
	reply.Compress = true
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		reply.Answer = append(reply.Answer, rr)
	}
	return packed(t, reply)
}

func TestDress(t *testing.T) {
	stored := answerTo(t, question("example.org.", dns.TypeTXT), `example.org. 60 TXT "`+strings.Repeat("x", 200)+`"`, `example.org. 60 TXT "`+strings.Repeat("y", 200)+`"`,
		`example.org. 60 TXT "`+strings.Repeat("z", 200)+`"`)
	for name, test := range map[string]struct {
		edns  uint16
		limit int
		cut   bool
	}{
		"without EDNS over UDP": {0, 0, true}, "without EDNS over TCP": {0, 65535, false},
		"EDNS": {1232, 0, false}, "EDNS of 512": {512, 0, true}, "EDNS that says nothing": {1, 0, true},
	} {
		m := question("Example.ORG.", dns.TypeTXT)
		m.Id = 99
		m.CheckingDisabled = true
		if test.edns > 0 {
			m.SetEdns0(test.edns, true)
		}
		var q query
		if err := q.read(packed(t, m)); err != nil {
			t.Fatal(err)
		}
		limit := max(test.limit, q.limit())
		dressed := q.dress(bytes.Clone(stored), 0, noEDE, limit)
		var got dns.Msg
		if err := got.Unpack(dressed); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.Id != 99 || got.Question[0].Name != "Example.ORG." || !got.Response || !got.RecursionAvailable || !got.RecursionDesired || !got.CheckingDisabled || got.Authoritative {
			t.Errorf("%s: %v", name, got.MsgHdr)
		}
		if got.Truncated != test.cut || test.cut != (len(got.Answer) == 0) || len(dressed) > limit {
			t.Errorf("%s: truncated %t, %d records, %d bytes", name, got.Truncated, len(got.Answer), len(dressed))
		}
		if opt := got.IsEdns0(); (opt != nil) != (test.edns > 0) || opt != nil && (!opt.Do() || opt.UDPSize() != offered) {
			t.Errorf("%s: %v", name, opt)
		}
	}
}

func TestExtendedCodes(t *testing.T) {
	m := question("example.org.", dns.TypeA)
	m.SetEdns0(1232, false)
	m.IsEdns0().SetVersion(1)
	var q query
	if err := q.read(packed(t, m)); err != nil || q.version != 1 {
		t.Fatalf("version %d, %v", q.version, err)
	}
	var got dns.Msg
	if err := got.Unpack(q.dress(q.bare(rcodeBadVers), rcodeBadVers, edeStale, 512)); err != nil {
		t.Fatal(err)
	}
	opt := got.IsEdns0()
	if got.Rcode != dns.RcodeBadVers || opt == nil || opt.Version() != 0 || len(opt.Option) != 1 || opt.Option[0].(*dns.EDNS0_EDE).InfoCode != dns.ExtendedErrorCodeStaleAnswer {
		t.Errorf("%v", got)
	}
}

// FuzzQuery: no packet makes a panic, and what gets an answer gets one that is a
// response with its id, no longer than the limit, and that miekg/dns can read.
func FuzzQuery(f *testing.F) {
	m := question("www.example.org.", dns.TypeA)
	f.Add(packed(f, m))
	m.SetEdns0(4096, true)
	f.Add(packed(f, m))
	m.Opcode = dns.OpcodeUpdate
	f.Add(packed(f, m))
	f.Add(packed(f, question("localhost.", dns.TypeANY)))
	s := new(Server)
	f.Fuzz(func(t *testing.T, message []byte) {
		var q query
		fault := q.read(message)
		o, ok := s.refused(&q, fault, true)
		if fault == nil && q.version == 0 {
			if o, ok = s.local(&q); !ok {
				o, ok = refusal(&q, rcodeServFail), true
			}
		}
		if !ok {
			return
		}
		answer := q.dress(o.answer, o.rcode, o.why, q.limit())
		if len(answer) > q.limit() || !bytes.Equal(answer[:2], message[:2]) || answer[2]&0x80 == 0 {
			t.Fatalf("% x: % x", message, answer)
		}
		if err := new(dns.Msg).Unpack(answer); err != nil {
			t.Fatalf("% x: % x: %v", message, answer, err)
		}
		q.text()
		q.key(nil)
		if fault == nil {
			if err := new(dns.Msg).Unpack(q.upstream(true, len(q.ecs) > 0)); err != nil {
				t.Skip(err) // an option of the client's that miekg/dns does not read
			}
		}
	})
}

// FuzzAnswer: no answer of a server makes a panic, and what is passed on has a whole
// number of records and no OPT record but ours.
func FuzzAnswer(f *testing.F) {
	m := question("www.example.org.", dns.TypeA)
	var q query
	if err := q.read(packed(f, m)); err != nil {
		f.Fatal(err)
	}
	f.Add(answerTo(f, m, "www.example.org. 60 CNAME a.example.org.", "a.example.org. 60 A 192.0.2.1"))
	reply := new(dns.Msg).SetReply(m)
	reply.SetEdns0(1232, true)
	f.Add(packed(f, reply))
	f.Fuzz(func(t *testing.T, answer []byte) {
		clean, rcode, err := cleaned(bytes.Clone(answer), &q)
		if err != nil {
			return
		}
		for r, err := range records(clean, len(q.message)) {
			if err != nil || r.kind == typeOPT {
				t.Fatalf("% x: %v", clean, err)
			}
		}
		dressed := q.dress(clean, rcode, noEDE, 512)
		if len(dressed) > 512 {
			t.Fatalf("%d bytes", len(dressed))
		}
	})
}
