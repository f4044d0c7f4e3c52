package netfilter

import (
	"slices"
	"testing"

	"github.com/google/nftables"
)

// guardStands reports whether there is a standing guard.
func guardStands(t *testing.T) bool {
	t.Helper()
	sets, err := (&nftables.Conn{}).GetSets(table{name: guardName("transproxy")}.library())
	return err == nil && slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == standingSet })
}

func mustGuard(t *testing.T, c Config) {
	t.Helper()
	if err := Guard(c); err != nil {
		t.Fatal(err)
	}
}

// TestGuardStands through whatever programs come and go that are closed, until CleanUp or one that is open.
func TestGuardStands(t *testing.T) {
	closed := testConfig()
	closed.FailClosed = true
	within(t, func() {
		for _, end := range []func(){
			func() {
				if err := CleanUp("transproxy"); err != nil {
					t.Fatal(err)
				}
			},
			func() {
				h := mustOpen(t)
				if !h.Standing() {
					t.Error("the guard is not seen to stand")
				}
				mustApply(t, h, testConfig())
				wantTables(t, "transproxy")
				if err := h.Close(); err != nil {
					t.Fatal(err)
				}
			},
		} {
			mustGuard(t, testConfig())
			mustGuard(t, testConfig())
			h := mustOpen(t)
			mustApply(t, h, closed)
			mustApply(t, h, closed)
			if err := h.Drain(); err != nil {
				t.Fatal(err)
			}
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			wantTables(t, "transproxy_guard")
			h = mustOpen(t)
			mustApply(t, h, closed)
			die(t, h)
			eventually(t, func() bool { return slices.Equal(tables(t), []string{"transproxy_guard"}) })
			if !guardStands(t) {
				t.Error("the guard does not stand")
			}
			end()
			wantTables(t)
		}
	})
}

// TestGuardBesideAnInstance makes the instance's own guard a standing one, and keeps it so whatever others do to it.
func TestGuardBesideAnInstance(t *testing.T) {
	closed := testConfig()
	closed.FailClosed = true
	within(t, func() {
		h := mustOpen(t)
		mustApply(t, h, testConfig())
		if err := Guard(testConfig()); err == nil {
			t.Error("there is no guard beside an instance that is open, and no error")
		}
		mustApply(t, h, closed)
		watch(t, h)
		mustGuard(t, testConfig())
		eventually(t, h.Standing)
		vandalise(t, func(conn *nftables.Conn) { conn.DelTable(guardTable(&closed).library()) })
		eventually(t, func() bool { return guardStands(t) })
		other := testConfig()
		other.Table = "other"
		wantInUse(t, Guard(other))
	})
}

// TestGuardRefuses all sources, but those that are named if any are, and nothing that is for this host, its published ports
// included.
func TestGuardRefuses(t *testing.T) {
	l := newLab(t)
	c := testConfig()
	c.Clients = nil // no address was known
	inGateway := func(f func() error) {
		t.Helper()
		if err := l.gateway.Do(f); err != nil && !t.Skipped() {
			t.Fatal(err)
		}
	}
	inGateway(func() error {
		nft(t, "add table ip published")
		nft(t, "add chain ip published in { type nat hook prerouting priority dstnat; }")
		nft(t, "add rule ip published in ip daddr 10.2.0.1 tcp dport 443 dnat to 192.0.2.2:443")
		return Guard(c)
	})
	published := func() {
		t.Helper()
		if _, got := l.dial(l.client, "10.2.0.1:443"); got != "origin 192.0.2.2:443" {
			t.Errorf("a published port is answered: %s", got)
		}
	}
	l.want(l.client, "192.0.2.2:80", "refused")
	l.want(l.client, "[2001:db8::2]:80", "refused")
	l.want(l.router, "192.0.2.2:80", "refused")
	l.want(l.client, "192.0.2.2:5000", "origin")
	l.want(l.client, "198.51.100.7:80", "origin")
	l.want(l.client, "10.2.0.1:80", "gateway")
	l.want(l.origin, "10.1.0.2:80", "client")
	published()

	l.capture()
	h := l.open()
	applied := testConfig()
	applied.FailClosed = true
	mustApply(t, h, applied)
	l.want(l.client, "192.0.2.2:80", "captured")
	l.want(l.router, "192.0.2.2:80", "origin") // no client of the program
	published()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	l.want(l.client, "192.0.2.2:80", "refused")
	l.want(l.router, "192.0.2.2:80", "refused")
	published()

	c.GuardClients = prefixes("10.1.0.0/24", "fd01::/64")
	inGateway(func() error { return Guard(c) })
	l.want(l.client, "192.0.2.2:80", "refused")
	l.want(l.router, "192.0.2.2:80", "origin")
}
