package cache

import (
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// question is what all answers of the tests answer, with this name and type A.
const question = "host.example.org."

// epoch is when the tests begin. It has no monotonic reading, so that a test moves
// both clocks.
var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func after(d time.Duration) time.Time { return epoch.Add(d) }

// response returns an answer without records.
func response(rcode dnsmessage.RCode) dnsmessage.Message {
	return dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 0x1234, Response: true, RecursionDesired: true, RecursionAvailable: true, RCode: rcode},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(question), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
}

func record(name string, ttl uint32, body dnsmessage.ResourceBody) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl},
		Body:   body,
	}
}

func address(name string, ttl uint32) dnsmessage.Resource {
	return record(name, ttl, &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}})
}

func alias(name, to string, ttl uint32) dnsmessage.Resource {
	return record(name, ttl, &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)})
}

func authority(ttl, minimum uint32) dnsmessage.Resource {
	return record("example.org.", ttl, &dnsmessage.SOAResource{
		NS: dnsmessage.MustNewName("ns.example.org."), MBox: dnsmessage.MustNewName("root.example.org."),
		Serial: 1, Refresh: 2, Retry: 3, Expire: 4, MinTTL: minimum,
	})
}

// text is a record of some length, to make answers large.
func text(ttl uint32, length int) dnsmessage.Resource {
	body := &dnsmessage.TXTResource{}
	for ; length > 0; length -= 250 {
		body.TXT = append(body.TXT, string(make([]byte, min(length, 250))))
	}
	return record(question, ttl, body)
}

func pack(t testing.TB, m dnsmessage.Message) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// simple is a positive answer of one record.
func simple(t testing.TB, ttl uint32) []byte {
	t.Helper()
	m := response(dnsmessage.RCodeSuccess)
	m.Answers = []dnsmessage.Resource{address(question, ttl)}
	return pack(t, m)
}

// nameError is an NXDOMAIN answer.
func nameError(t testing.TB, ttl, minimum uint32) []byte {
	t.Helper()
	m := response(dnsmessage.RCodeNameError)
	m.Authorities = []dnsmessage.Resource{authority(ttl, minimum)}
	return pack(t, m)
}

// ttls returns the TTLs of all records in their order.
func ttls(t testing.TB, b []byte) []uint32 {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	var all []uint32
	for _, section := range [][]dnsmessage.Resource{m.Answers, m.Authorities, m.Additionals} {
		for _, r := range section {
			all = append(all, r.Header.TTL)
		}
	}
	return all
}

// large is a configuration in which nothing gives way.
func large() Config {
	return Config{MaxBytes: 16 << 20, MaxStale: 24 * time.Hour}
}

func put(t testing.TB, c *Cache, key string, answer []byte, now time.Time) {
	t.Helper()
	if !c.Put([]byte(key), answer, now) {
		t.Fatalf("the answer for %q was not stored", key)
	}
}

// state asks for a key and returns only what the answer is worth.
func state(c *Cache, key string, now time.Time) State {
	_, s := c.Get(nil, []byte(key), now)
	return s
}
