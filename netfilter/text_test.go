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

	return map[string]Config{"plain": plain, "closed": closed, "uplinks": uplinks, "empty": empty}
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
			for _, table := range []table{captureTable(&c), guardTable(&c)} {
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
