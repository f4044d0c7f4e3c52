//go:build interop

package interop

import (
	"crypto"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// bigText is the data of a TXT record of 808 bytes: more than a UDP answer holds
// for a client that says nothing of its size (RFC 1035 section 2.3.4).
var bigText = text("x", 100, 8)

// hugeText is more than a UDP answer holds for clients of today.
var hugeText = text("y", 200, 20)

// text is the data of a TXT record, in the syntax of zone files and of dig.
func text(letter string, length, count int) string {
	return strings.Join(slices.Repeat([]string{`"` + strings.Repeat(letter, length) + `"`}, count), " ")
}

// asArgument is the same in the syntax of dnsmasq.
func asArgument(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(text, `"`, ""), " ", ",")
}

// publicZones are what the public server knows. The label tells two servers apart.
func publicZones(label string) map[string]string {
	zones := map[string]string{
		"public.test": `
www     A         203.0.113.80
www     AAAA      2001:db8:3::80
label   TXT       "` + label + `"
big     TXT       ` + bigText + `
huge    TXT       ` + hugeText + `
odd     TYPE65280 \# 4 01020304
`,
		// Ends in the letters of the private zone, and is not below it.
		"notcorp.test": `
@       A         203.0.113.81
www     A         203.0.113.82
`,
		"113.0.203.in-addr.arpa": `
80      PTR       www.public.test.
`,
		reverseZone("2001:db8:3::"): `
` + reverseName("2001:db8:3::80") + `. PTR www.public.test.
`,
		// Every other name does not exist.
		"": "",
		// What the public server must never be asked for: it would answer.
		"corp.test": `
@       A         203.0.113.66
*       A         203.0.113.66
`,
	}
	for name, text := range zones {
		zones[name] = head(name) + text
	}
	return zones
}

func head(zone string) string {
	return "$ORIGIN " + zone + ".\n$TTL 300\n@ SOA ns.public.test. admin.public.test. 1 3600 600 86400 60\n@ NS ns.public.test.\n"
}

// privateRecords are what the private server knows, as arguments of dnsmasq.
var privateRecords = []string{
	"--local=/corp.test/",
	"--local=/100.51.198.in-addr.arpa/",
	"--local=/" + reverseZone("2001:db8:2::") + "/",
	"--host-record=corp.test,198.51.100.79",
	"--host-record=www.corp.test,198.51.100.80,2001:db8:2::80",
	"--txt-record=big.corp.test," + asArgument(bigText),
	"--txt-record=huge.corp.test," + asArgument(hugeText),
	"--dns-rr=odd.corp.test,65280,01020304",
}

// reverseName is the name of an address in ip6.arpa or in-addr.arpa.
func reverseName(address string) string {
	name, err := dns.ReverseAddr(netip.MustParseAddr(address).String())
	if err != nil {
		panic(err)
	}
	return strings.TrimSuffix(name, ".")
}

// reverseZone is that of a /64.
func reverseZone(address string) string { return reverseName(address)[2*16:] }

// signedZone makes a zone with DNSSEC (RFC 4034) and its key as a trust anchor in
// the syntax of delv. Only what exists is signed.
func signedZone(t *testing.T, name string) (zone, anchor string) {
	t.Helper()
	key := &dns.DNSKEY{
		Hdr:   dns.RR_Header{Name: name + ".", Rrtype: dns.TypeDNSKEY, Class: dns.ClassINET, Ttl: 300},
		Flags: dns.ZONE | dns.SEP, Protocol: 3, Algorithm: dns.ECDSAP256SHA256,
	}
	private, err := key.Generate(256)
	must(t, err)
	sets := map[string][]dns.RR{"DNSKEY": {key}}
	parser := dns.NewZoneParser(strings.NewReader(head(name)+"www A 203.0.113.83\nwww A 203.0.113.84\n"), "", "")
	for record, more := parser.Next(); more; record, more = parser.Next() {
		set := record.Header().Name + dns.TypeToString[record.Header().Rrtype]
		sets[set] = append(sets[set], record)
	}
	must(t, parser.Err())
	var text strings.Builder
	for _, set := range slices.Sorted(maps.Keys(sets)) {
		signature := &dns.RRSIG{
			Hdr:       dns.RR_Header{Ttl: 300},
			Algorithm: key.Algorithm, KeyTag: key.KeyTag(), SignerName: name + ".",
			Inception: uint32(time.Now().Add(-time.Hour).Unix()), Expiration: uint32(time.Now().Add(24 * time.Hour).Unix()),
		}
		must(t, signature.Sign(private.(crypto.Signer), sets[set]))
		for _, record := range append(sets[set], signature) {
			fmt.Fprintln(&text, record)
		}
	}
	return text.String(), fmt.Sprintf("trust-anchors { %q static-key %d %d %d %q; };\n", name+".", key.Flags, key.Protocol, key.Algorithm, key.PublicKey)
}
