package lab

import (
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// answer remembers a question and makes its answers: none when it is to be silent,
// several with the right one at the end when it is to forge.
func (n *Nameserver) answer(query *dns.Msg, transport string, source netip.AddrPort) ([]*dns.Msg, Trick) {
	reply := new(dns.Msg).SetReply(query)
	reply.RecursionAvailable = true
	if len(query.Question) != 1 {
		return []*dns.Msg{reply.SetRcodeFormatError(query)}, Trick{}
	}
	question := query.Question[0]
	asked := Question{
		Name:      strings.TrimSuffix(strings.ToLower(question.Name), "."),
		Type:      dns.Type(question.Qtype).String(),
		Transport: transport,
		Source:    netip.AddrPortFrom(source.Addr().Unmap(), source.Port()),
	}
	n.mutex.Lock()
	n.asked = append(n.asked, asked)
	trick := n.Tricks[asked.Name]
	n.mutex.Unlock()
	switch {
	case trick.Silent:
		return nil, trick
	case trick.Rcode != 0:
		return []*dns.Msg{reply.SetRcode(query, trick.Rcode)}, trick
	}
	n.fill(reply, question)
	size := dns.MinMsgSize
	if options := query.IsEdns0(); options != nil {
		reply.SetEdns0(edns0Size, options.Do())
		size = max(size, int(options.UDPSize()))
	}
	if transport == TransportUDP {
		reply.Truncate(size)
	}
	if trick.Forge {
		return append(forgeries(query), reply), trick
	}
	return []*dns.Msg{reply}, trick
}

// edns0Size is the size of UDP messages that the server takes: that of DNS Flag Day 2020.
const edns0Size = 1232

// fill puts the table's records into a reply, those behind CNAMEs included.
func (n *Nameserver) fill(reply *dns.Msg, question dns.Question) {
	name := question.Name
	for next := name; next != "" && len(reply.Answer) < 16; { // against loops of CNAMEs
		name, next = next, ""
		records, exists := n.find(name)
		if !exists {
			reply.Rcode = dns.RcodeNameError
		}
		for _, record := range records {
			alias, isAlias := record.(*dns.CNAME)
			if record.Header().Rrtype != question.Qtype && !isAlias {
				continue
			}
			record = dns.Copy(record)
			record.Header().Name = name // as asked: in its case, and in place of a wildcard
			reply.Answer = append(reply.Answer, record)
			if isAlias && question.Qtype != dns.TypeCNAME {
				next = alias.Target
			}
		}
	}
	if len(reply.Answer) == 0 { // what says how long this may be remembered (RFC 2308)
		reply.Ns = []dns.RR{&dns.SOA{
			Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 60},
			Ns:  "ns.", Mbox: "hostmaster.", Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: 60,
		}}
	}
}

// find finds the records of a name, or of the nearest wildcard above it.
func (n *Nameserver) find(name string) (records []dns.RR, exists bool) {
	owner := strings.ToLower(name)
	if records, exists = n.table[owner]; exists {
		return records, true
	}
	for _, start := range dns.Split(owner) {
		_, parent, _ := strings.Cut(owner[start:], ".")
		if records, exists = n.table["*."+parent]; exists {
			return records, true
		}
	}
	return nil, false
}

// forgeries are what an attacker sends ahead of the right answer: all with the
// address 192.0.2.99.
func forgeries(query *dns.Msg) []*dns.Msg {
	otherID := new(dns.Msg).SetReply(query)
	otherID.Id++
	otherQuestion := new(dns.Msg).SetReply(query)
	otherQuestion.Question[0].Name = "other." + query.Question[0].Name
	for _, forgery := range []*dns.Msg{otherID, otherQuestion} {
		forgery.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: forgery.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
			A:   net.IPv4(192, 0, 2, 99),
		}}
	}
	return []*dns.Msg{otherID, otherQuestion}
}
