package routing

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// watch runs Watch until the test ends, and passes on what it reports.
func watch(t *testing.T, h *Handle) <-chan Event {
	t.Helper()
	events := make(chan Event, 100)
	ended := make(chan error)
	inSameNamespace(t, func() {
		ended <- h.Watch(t.Context(), func(e Event) { events <- e })
	})
	t.Cleanup(func() { // after the test's context has ended
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("watch: %v", err)
			}
		case <-time.After(2 * time.Second):
			t.Error("watch does not end with its context")
		}
	})
	// It has subscribed when it hears of a change.
	other := rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 20000, 99 })
	addRule(t, other)
	for attempt := 0; len(events) == 0; attempt++ {
		if attempt == 20 {
			t.Fatal("watch hears nothing")
		}
		delRule(t, other)
		addRule(t, other)
		time.Sleep(settle)
	}
	time.Sleep(3 * settle)
	for len(events) > 0 {
		<-events
	}
	return events
}

func delRule(t *testing.T, r *netlink.Rule) {
	t.Helper()
	if err := netlink.RuleDel(r); err != nil {
		t.Fatalf("delete rule %s: %v", ruleText(r), err)
	}
}

// next waits for an event that is wanted, for the second within which repairs are promised.
func next(t *testing.T, events <-chan Event, wanted func(Event) bool) Event {
	t.Helper()
	deadline := time.After(time.Second)
	for {
		select {
		case e := <-events:
			if wanted(e) {
				return e
			}
		case <-deadline:
			t.Fatal("no such event within a second")
		}
	}
}

// quiet checks that nothing is reported for a while.
func quiet(t *testing.T, events <-chan Event) {
	t.Helper()
	select {
	case e := <-events:
		t.Errorf("unexpected event %+v", e)
	case <-time.After(3 * settle):
	}
}

func TestWatchRestores(t *testing.T) {
	// Each takes something away and returns the beginnings of what is to be reported as restored.
	tests := map[string]func(t *testing.T, entries []entry) []string{
		"a rule": func(t *testing.T, entries []entry) []string {
			delRule(t, entries[2].rule)
			return []string{"ip rule pref 4219"}
		},
		"all IPv6 rules": func(t *testing.T, entries []entry) []string {
			for _, e := range entries[5:] {
				delRule(t, e.rule)
			}
			return []string{"ip -6 rule pref 4218", "ip -6 rule pref 4219", "ip -6 rule pref 4220"}
		},
		"the tables": func(t *testing.T, entries []entry) []string {
			for _, e := range []entry{entries[0], entries[4]} {
				if err := netlink.RouteDel(e.route); err != nil {
					t.Fatal(err)
				}
			}
			return []string{"ip route local default dev lo table 4219", "ip -6 route local default dev lo table 4219"}
		},
		"a replaced route": func(t *testing.T, entries []entry) []string {
			route := *entries[0].route
			route.Type, route.LinkIndex, route.Scope, route.Protocol = unix.RTN_BLACKHOLE, 0, netlink.SCOPE_UNIVERSE, 4
			if err := netlink.RouteReplace(&route); err != nil {
				t.Fatal(err)
			}
			return []string{"ip route local default dev lo table 4219"}
		},
	}
	for name, takeAway := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			namespace(t)
			h := applied(t, testConfig)
			events := watch(t, h)
			before := snapshot(t)
			for _, want := range takeAway(t, desired(testConfig)) {
				next(t, events, func(e Event) bool { return strings.HasPrefix(e.Restored, want) })
			}
			if after := snapshot(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			quiet(t, events)
		})
	}
}

func TestWatchRestoresWhatWentBefore(t *testing.T) {
	t.Parallel()
	namespace(t)
	h := applied(t, testConfig)
	delRule(t, desired(testConfig)[1].rule)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	// What has changed between the caller's look and the subscription is unknown.
	var got []Event
	err := h.Watch(ctx, func(e Event) {
		if got = append(got, e); len(got) == 2 {
			cancel()
		}
	})
	want := []Event{{Restored: desired(testConfig)[1].String()}, {Changed: true}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestWatchReportsErrorOnceAndRecovers(t *testing.T) {
	t.Parallel()
	namespace(t)
	h := applied(t, testConfig)
	events := watch(t, h)
	before := snapshot(t)
	setLink(t, "lo", false) // takes the IPv6 route with it
	e := next(t, events, func(e Event) bool { return e.Err != nil })
	wantError(t, e.Err, "add ip -6 route local default", "ip link set lo up")

	// Further attempts fail the same way.
	next(t, events, func(e Event) bool { return e.Changed })
	addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 20001, 99 }))
	if e := next(t, events, func(e Event) bool { return true }); !e.Changed {
		t.Errorf("reported again: %+v", e)
	}
	delRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 20001, 99 }))

	setLink(t, "lo", true)
	next(t, events, func(e Event) bool { return strings.HasPrefix(e.Restored, "ip -6 route local default") })
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestWatchReportsChanges(t *testing.T) {
	t.Parallel()
	namespace(t)
	writeSysctl(t, "net/ipv6/conf/default/disable_ipv6", "1") // else the kernel adds addresses when it pleases
	link := addLink(t, "lan0", "192.0.2.1/24")
	h := applied(t, testConfig)
	events := watch(t, h)
	changed := func(e Event) bool { return e.Changed }

	addAddr(t, link, "198.51.100.1/24")
	next(t, events, changed)
	quiet(t, events)

	addDefault(t, link, "192.0.2.254")
	next(t, events, changed)
	quiet(t, events)

	setLink(t, "lan0", false)
	next(t, events, changed)
	quiet(t, events)

	// Routes to single networks and our own repairs are nobody's business.
	setLink(t, "lan0", true)
	next(t, events, changed)
	quiet(t, events)
	route := &netlink.Route{Dst: prefixNet(t, "203.0.113.0/24"), LinkIndex: link.Attrs().Index}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	quiet(t, events)
	delRule(t, desired(testConfig)[1].rule)
	next(t, events, func(e Event) bool {
		if e.Changed {
			t.Error("a rule of ours was reported as a change")
		}
		return e.Restored != ""
	})
	quiet(t, events)
}

func TestWatchLeavesClosedHandle(t *testing.T) {
	t.Parallel()
	namespace(t)
	h := open(t)
	events := watch(t, h)
	before := snapshot(t)
	if err := h.Apply(testConfig); err != nil {
		t.Fatal(err)
	}
	quiet(t, events) // what the program does itself is no change
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * settle)
	for len(events) > 0 {
		if e := <-events; !e.Changed {
			t.Errorf("unexpected event %+v", e)
		}
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}
