package resolver

import (
	"errors"
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// Types and class of which the server knows more than the number.
const (
	typeA    = dns.TypeA
	typeAAAA = dns.TypeAAAA
	typePTR  = dns.TypePTR
	classIN  = dns.ClassINET
)

// Why a query got no better answer, for the log.
var (
	errTooMany = errors.New("too many questions at once")
	errSlow    = errors.New("no server has answered in time")
)

const (
	// fakeTTL is short because a fake address may be given to another name, and
	// because a client may move to a network where it means nothing.
	fakeTTL = 10 // seconds
	// localTTL is that of answers that never change while this program runs.
	localTTL = 3600 // seconds
)

// Names that never leave, or that would have a browser ask somebody else.
const (
	nameLocalhost = "localhost"               // RFC 6761 section 6.3
	nameOnion     = "onion"                   // RFC 7686 section 2
	nameInvalid   = "invalid"                 // RFC 6761 section 6.4
	nameCanary    = "use-application-dns.net" // Firefox asks for it before it uses DNS over HTTPS of its own
	nameDiscovery = "resolver.arpa"           // RFC 9462 section 4: browsers ask for _dns.resolver.arpa
)

// local answers what nobody has to be asked for.
func (s *Server) local(q *query) (outcome, bool) {
	switch {
	case q.class != classIN:
		return refusal(q, rcodeRefused), true
	case q.kind == dns.TypeAXFR || q.kind == dns.TypeIXFR || q.kind == typeOPT || q.kind == dns.TypeTSIG:
		return refusal(q, rcodeNotImp), true
	case q.kind == dns.TypeANY:
		return q.records(&dns.HINFO{Cpu: "RFC8482", Hdr: dns.RR_Header{Ttl: localTTL}}), true
	}
	name := q.text()
	switch {
	case within(name, nameLocalhost):
		switch q.kind {
		case typeA:
			return q.records(&dns.A{A: net.IPv4(127, 0, 0, 1), Hdr: dns.RR_Header{Ttl: localTTL}}), true
		case typeAAAA:
			return q.records(&dns.AAAA{AAAA: net.IPv6loopback, Hdr: dns.RR_Header{Ttl: localTTL}}), true
		}
		return q.nothing(rcodeSuccess, localTTL), true
	case within(name, nameOnion), within(name, nameInvalid):
		return q.nothing(rcodeNXDomain, localTTL), true
	case s.config.AllowPrivateDNS:
	case within(name, nameCanary):
		return q.nothing(rcodeNXDomain, localTTL), true
	case within(name, nameDiscovery):
		return q.nothing(rcodeSuccess, localTTL), true
	}
	if s.config.Fake != nil && q.kind == typePTR {
		if address, ok := reversed(name); ok && s.config.Fake.Contains(address) {
			return s.fakeName(q, address), true
		}
	}
	return outcome{}, false
}

// within reports whether a name is a zone's or below it.
func within(name, zone string) bool {
	rest, ok := strings.CutSuffix(name, zone)
	return ok && (rest == "" || strings.HasSuffix(rest, "."))
}

// fake answers with addresses that stand for the name.
func (s *Server) fake(q *query) outcome {
	if s.config.Fake == nil {
		return refusal(q, rcodeRefused)
	}
	name := q.text()
	if q.kind != typeA && q.kind != typeAAAA {
		// No address is spent on it: a name of which only other types are asked for is
		// not connected to.
		o := q.nothing(rcodeSuccess, fakeTTL)
		o.from = fake
		return o
	}
	if within(name, "arpa") { // RFC 3172: no hosts are there
		return q.nothing(rcodeNXDomain, fakeTTL)
	}
	ipv4, ipv6, err := s.config.Fake.Lookup(name)
	if err != nil {
		o := q.nothing(rcodeNXDomain, fakeTTL)
		o.err = err
		return o
	}
	var o outcome
	switch {
	case q.kind == typeA && ipv4.IsValid():
		o = q.records(&dns.A{A: ipv4.AsSlice(), Hdr: dns.RR_Header{Ttl: fakeTTL}})
	case q.kind == typeAAAA && ipv6.IsValid():
		o = q.records(&dns.AAAA{AAAA: ipv6.AsSlice(), Hdr: dns.RR_Header{Ttl: fakeTTL}})
	default:
		o = q.nothing(rcodeSuccess, fakeTTL)
	}
	o.from = fake
	return o
}

// fakeName answers with the name that an address stands for.
func (s *Server) fakeName(q *query, address netip.Addr) outcome {
	o := q.nothing(rcodeNXDomain, fakeTTL)
	if name, ok := s.config.Fake.Name(address); ok {
		o = q.records(&dns.PTR{Ptr: dns.Fqdn(name), Hdr: dns.RR_Header{Ttl: fakeTTL}})
	}
	o.from = fake
	return o
}

// refusal is an answer without records.
func refusal(q *query, rcode int) outcome {
	return outcome{answer: q.bare(rcode), rcode: rcode, why: noEDE, from: local}
}

// records is an answer with one record for the name that was asked for.
func (q *query) records(rr dns.RR) outcome {
	header := rr.Header()
	header.Name, header.Class = ".", classIN
	header.Rrtype = typeOf(rr)
	packed := make([]byte, 512)
	end, err := dns.PackRR(rr, packed, 0, nil, false)
	if err != nil {
		return refusal(q, rcodeServFail) // a name from the store that is none
	}
	answer := q.bare(rcodeSuccess)
	answer[7] = 1
	// The owner is the question's name, by a pointer, in place of the root.
	answer = append(answer, 0xc0, headerSize)
	return outcome{answer: append(answer, packed[1:end]...), rcode: rcodeSuccess, why: noEDE, from: local}
}

// typeOf is the type of one of the records that are made here.
func typeOf(rr dns.RR) uint16 {
	switch rr.(type) {
	case *dns.A:
		return dns.TypeA
	case *dns.AAAA:
		return dns.TypeAAAA
	case *dns.PTR:
		return dns.TypePTR
	case *dns.SOA:
		return dns.TypeSOA
	}
	return dns.TypeHINFO
}

// nothing says that there is no such name, or nothing of this type, and for how many
// seconds that may be kept (RFC 2308 section 3).
func (q *query) nothing(rcode int, ttl uint32) outcome {
	soa := &dns.SOA{
		Hdr: dns.RR_Header{Name: ".", Class: classIN, Rrtype: dns.TypeSOA, Ttl: ttl},
		Ns:  ".", Mbox: ".", Serial: 1, Refresh: localTTL, Retry: localTTL, Expire: localTTL, Minttl: ttl,
	}
	packed := make([]byte, 64)
	end, err := dns.PackRR(soa, packed, 0, nil, false)
	if err != nil {
		return refusal(q, rcodeServFail)
	}
	answer := q.bare(rcode)
	answer[9] = 1
	return outcome{answer: append(answer, packed[:end]...), rcode: rcode, why: noEDE, from: local}
}
