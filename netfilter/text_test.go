package netfilter

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// textConfigs are the configurations of the golden files.
func textConfigs() map[string]Config {
	plain := testConfig()

	closed := testConfig()
	closed.FailClosed = true

	uplinks := testConfig()
	uplinks.Table = "gate"
	uplinks.Interfaces, uplinks.Uplinks = nil, []string{"wan1", "wan0", "wan1"}
	uplinks.Listen = uplinks.Listen[1:]
	uplinks.Clients = prefixes("::/0", "0.0.0.0/0")
	uplinks.Bypass = prefixes("240.0.0.0/4", "ff00::/8", "192.0.2.1/32", "192.0.2.2/31", "::1/128")
	uplinks.Ports = []PortRange{{1, 65535}}

	empty := testConfig()
	empty.Listen = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15001")}
	empty.Interfaces, empty.Clients, empty.Bypass, empty.Ports = nil, nil, nil, nil
	empty.FailClosed = true

	dns := dnsConfig()
	dns.Neighbours = prefixes("10.2.0.0/24", "fd02::/64")
	dns.Always = prefixes("198.18.0.0/15", "fd0f:a4e1:b0d5:c0de::/64")
	dns.FailClosed = true

	udp := dnsConfig()
	udp.Listen, udp.DNS.Listen, udp.DNS.TCP = udp.Listen[:1], udp.DNS.Listen[:1], false

	tcp := dnsConfig()
	tcp.DNS.UDP = false
	tcp.Neighbours = prefixes("10.2.0.0/24")
	tcp.FailClosed = true

	always := testConfig()
	always.Always = prefixes("198.18.0.0/15")

	quic := testConfig()
	quic.RefusedUDP, quic.DroppedUDP = []PortRange{{443, 443}}, []PortRange{{8000, 8100}}
	quic.FailClosed = true

	router := testConfig()
	router.Router = true

	output := dns
	output.RefusedUDP = quic.RefusedUDP
	output.Output = Output{Mark: 0x02000000, Users: []uint32{1000, 65534}, Groups: []uint32{27}}

	carried := testConfig()
	carried.CapturedUDP = []PortRange{{443, 443}, {3478, 3497}}

	carriedAll := output
	carriedAll.DroppedUDP, carriedAll.CapturedUDP = quic.DroppedUDP, carried.CapturedUDP
	carriedAll.RefusedUDP = []PortRange{{19302, 19302}}

	steered := output
	steered.Steered = true

	return map[string]Config{
		"steered": steered, "carried": carried, "carried-all": carriedAll,
		"quic": quic, "output": output, "router": router,
		"plain": plain, "closed": closed, "uplinks": uplinks, "empty": empty,
		"dns": dns, "dns-udp": udp, "dns-tcp": tcp, "always": always,
	}
}

func TestText(t *testing.T) {
	for name, c := range textConfigs() {
		t.Run(name, func(t *testing.T) {
			golden := filepath.Join("testdata", name+".nft")
			got := Text(c)
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s is different (go test -update writes it anew); got:\n%s", golden, got)
			}
			for _, table := range []table{captureTable(&c), drainedTable(&c), guardTable(&c)} {
				for _, chain := range table.chains {
					for _, rule := range chain.rules {
						if rule.comment == "" || len(rule.comment) > maxComment {
							t.Errorf("a comment of %d bytes: %q", len(rule.comment), rule.comment)
						}
					}
				}
			}
		})
	}
}

// TestNeighboursAloneAreBypassed has nothing that Bypass does not exempt.
func TestNeighboursAloneAreBypassed(t *testing.T) {
	c := testConfig()
	want := Text(c)
	c.Neighbours, c.Bypass = c.Bypass[:1], c.Bypass[1:]
	if got := Text(c); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// TestTextIsWhatApplyInstalls compares what nft lists after nft -f and after Apply.
func TestTextIsWhatApplyInstalls(t *testing.T) {
	for name, c := range textConfigs() {
		t.Run(name, func(t *testing.T) {
			within(t, func() {
				want := []string{c.Table}
				if c.FailClosed {
					want = append(want, guardName(c.Table))
				}
				list := func() string {
					var text strings.Builder
					for _, table := range want {
						text.WriteString(nft(t, "list", "table", "inet", table))
					}
					return text.String()
				}

				file := filepath.Join(t.TempDir(), "rules.nft")
				if err := os.WriteFile(file, []byte(Text(c)), 0o600); err != nil {
					t.Fatal(err)
				}
				nft(t, "-f", file)
				nft(t, "-f", file)
				wantTables(t, want...)
				loaded := list()

				// Such tables are ours: they are taken over like a leftover.
				h, err := Open(c.Table)
				if err != nil {
					t.Fatal(err)
				}
				defer h.Close()
				mustApply(t, h, c)
				wantTables(t, want...)
				head, rest, _ := strings.Cut(list(), "\n")
				rest, owner := strings.CutPrefix(rest, "\tflags owner\n\n")
				if !owner {
					t.Fatalf("no owner in\n%s\n%s", head, rest)
				}
				if applied := "table inet " + c.Table + " {\n" + rest; applied != loaded {
					t.Errorf("nft -f:\n%s\nApply:\n%s", loaded, applied)
				}
			})
		})
	}
}
