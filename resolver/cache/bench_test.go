package cache

import (
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// filled returns a cache of names with answers of some 100 bytes, and what turns a
// number into one of the keys.
func filled(b *testing.B, names int) (c *Cache, key func(dst []byte, n int) []byte) {
	b.Helper()
	m := response(dnsmessage.RCodeSuccess)
	m.Answers = []dnsmessage.Resource{
		alias(question, "front.example.org.", 3600), address("front.example.org.", 3600), address("front.example.org.", 3600),
	}
	answer := pack(b, m)
	if len(answer) < 80 || len(answer) > 120 {
		b.Fatalf("the answer has %d bytes", len(answer))
	}
	key = func(dst []byte, n int) []byte {
		dst = append(dst[:0], "\x08________\x07example\x03org\x00\x00\x01\x00\x01\x00"...)
		binary.BigEndian.PutUint64(dst[1:], uint64(n))
		return dst
	}
	c = New(large())
	for i := range names {
		c.Put(key(nil, i), answer, time.Now())
	}
	return c, key
}

func BenchmarkGet(b *testing.B) {
	for name, names := range map[string]int{"OneName": 1, "ManyNames": 50_000} {
		b.Run(name, func(b *testing.B) {
			c, key := filled(b, names)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				buffer, k, now := make([]byte, 0, 512), make([]byte, 0, 64), time.Now()
				for n := 0; pb.Next(); n += 7919 {
					k = key(k, n%names)
					if _, s := c.Get(buffer, k, now); s == Miss {
						b.Error("miss")
						return
					}
				}
			})
		})
	}
}

func BenchmarkPut(b *testing.B) {
	c, key := filled(b, 1)
	answer, _ := c.Get(nil, key(nil, 0), time.Now())
	b.ReportAllocs()
	k, now := make([]byte, 0, 64), time.Now()
	for n := 0; b.Loop(); n++ {
		k = key(k, n)
		c.Put(k, answer, now)
	}
}
