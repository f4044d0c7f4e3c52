package netfilter

import (
	"context"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// watch runs Watch until the test's end and fails the test if it ends before.
func watch(t *testing.T, h *Handle) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- h.Watch(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("watch: %v", err)
		}
	})
}

// vandalise does to the table, which is there or not, what another program may.
func vandalise(t *testing.T, f func(*nftables.Conn)) {
	t.Helper()
	conn := &nftables.Conn{}
	f(conn)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestWatchRestores(t *testing.T) {
	for _, owned := range []bool{true, false} {
		within(t, func() {
			h := mustOpen(t)
			if !owned {
				if err := h.Close(); err != nil {
					t.Fatal(err)
				}
				var err error
				if h, err = openFaulty(t, faulty{change: owner(unix.EOPNOTSUPP)}); err != nil {
					t.Fatal(err)
				}
				if h.events, err = subscribe(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { h.Close() })
			}
			c := watchedConfig()
			mustApply(t, h, c)
			watch(t, h)

			intact := func() bool {
				capture, err1 := h.kernel.intact(captureTable(&c))
				guard, err2 := h.kernel.intact(guardTable(&c))
				if err1 != nil || err2 != nil {
					t.Fatal(err1, err2)
				}
				return capture && guard
			}
			var victims []table
			victims = append(victims, guardTable(&c))
			if !owned {
				victims = append(victims, captureTable(&c))
			}
			for _, victim := range victims {
				for name, damage := range damages(victim) {
					vandalise(t, damage)
					func() {
						defer func() {
							if t.Failed() {
								t.Logf("after %s of %s", name, victim.name)
							}
						}()
						eventually(t, func() bool { h.mutex.Lock(); defer h.mutex.Unlock(); return intact() })
					}()
				}
			}
		})
	}
}

// damages are what another program may do to a table.
func damages(victim table) map[string]func(*nftables.Conn) {
	library := victim.library()
	all := map[string]func(*nftables.Conn){
		"flush ruleset": func(conn *nftables.Conn) { conn.FlushRuleset() },
		"delete table":  func(conn *nftables.Conn) { conn.DelTable(library) },
		"flush table":   func(conn *nftables.Conn) { conn.FlushTable(library) },
		"flush set":     func(conn *nftables.Conn) { conn.FlushSet(&nftables.Set{Table: library, Name: "clients4"}) },
	}
	for _, c := range victim.chains {
		all["flush chain "+c.name] = func(conn *nftables.Conn) {
			conn.FlushChain(&nftables.Chain{Table: library, Name: c.name})
		}
	}
	return all
}

// watchedConfig has all chains.
func watchedConfig() Config {
	c := dnsConfig()
	c.Always = prefixes("198.18.0.0/15")
	c.FailClosed = true
	return c
}

func TestIntactSeesDamage(t *testing.T) {
	c := watchedConfig()
	for name, damage := range damages(guardTable(&c)) {
		t.Run(name, func(t *testing.T) {
			within(t, func() {
				h := mustOpen(t)
				mustApply(t, h, c)
				wantIntact(t, h, c)
				vandalise(t, damage)
				if intact, err := h.kernel.intact(guardTable(&c)); intact || err != nil {
					t.Errorf("intact: %v, %v", intact, err)
				}
				if err := h.restore(); err != nil {
					t.Fatal(err)
				}
				wantIntact(t, h, c)
			})
		})
	}
}

func TestWatchFollowsApply(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		watch(t, h)
		c := testConfig()
		c.FailClosed = true
		mustApply(t, h, c)
		vandalise(t, func(conn *nftables.Conn) { conn.DelTable(guardTable(&c).library()) })
		eventually(t, func() bool { return len(tables(t)) == 2 })

		c.FailClosed = false
		mustApply(t, h, c)
		time.Sleep(3 * settle)
		wantTables(t, "transproxy")
	})
}

func TestWatchGivesUp(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the attempts")
	}
	within(t, func() {
		h := mustOpen(t)
		c := testConfig()
		c.FailClosed = true
		mustApply(t, h, c)
		h.kernel = faulty{kernel: h.kernel, change: always(unix.ENOMEM)}
		vandalise(t, func(conn *nftables.Conn) { conn.DelTable(guardTable(&c).library()) })
		ctx, cancel := context.WithTimeout(context.Background(), 2*maxFailures*retryInterval)
		defer cancel()
		if err := h.Watch(ctx); err == nil || ctx.Err() != nil {
			t.Errorf("watch: %v", err)
		}
	})
}
