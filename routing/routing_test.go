package routing

import (
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func TestApplyAndCloseRestoreState(t *testing.T) {
	for name, families := range map[string][2]bool{"both": {true, true}, "IPv4": {true, false}, "IPv6": {false, true}} {
		t.Run(name, func(t *testing.T) {
			namespace(t)
			before := snapshot(t)
			c := testConfig
			c.IPv4, c.IPv6 = families[0], families[1]
			h := applied(t, c)

			owned, err := h.owned(c)
			if err != nil {
				t.Fatal(err)
			}
			if missing, leftover := without(desired(c), owned), without(owned, desired(c)); len(missing)+len(leftover) > 0 {
				t.Errorf("missing %v, too much %v", missing, leftover)
			}
			if got, want := len(owned), len(desired(c)); got != want {
				t.Errorf("%d entries of ours, want %d", got, want)
			}
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			if after := snapshot(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

func TestCloseWithoutApplyLeavesOthers(t *testing.T) {
	namespace(t)
	defer applied(t, testConfig).Close()
	before := snapshot(t)
	if err := open(t).Close(); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestApplyTwiceKeeps listens for the kernel's notices: removing and adding a rule cuts connections, even if the lists look
// the same afterwards.
func TestApplyTwiceKeeps(t *testing.T) {
	namespace(t)
	first := applied(t, testConfig)
	defer first.Close()
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()

	for _, h := range []*Handle{first, applied(t, testConfig)} {
		if err := h.Apply(testConfig); err != nil {
			t.Fatal(err)
		}
	}
	got, err := receive(socket, 100*time.Millisecond, first.config)
	if err != nil || got != (notice{}) {
		t.Errorf("notices %+v, %v, want none", got, err)
	}
	// The socket does hear of a change.
	addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 9, 99 }))
	if got, err := receive(socket, time.Second, first.config); err != nil || !got.changed {
		t.Errorf("notice of another rule %+v, %v", got, err)
	}
}

// leftovers are what processes with other settings may have left behind.
func addLeftovers(t *testing.T) {
	t.Helper()
	old := testConfig
	old.Table, old.Priority, old.Mask, old.LAN, old.Local = 77, 900, 0x70, 0x10, 0x20
	applied(t, old) // and never closed

	mask := uint32(0xff)
	addRule(t, rule(unix.AF_INET6, func(r *netlink.Rule) {
		r.Priority, r.Table, r.Mark, r.Mask, r.Protocol = testConfig.Priority, 78, 1, &mask, testConfig.Protocol
	}))
	// In the place of our route is one of another kind.
	route := &netlink.Route{
		Dst: everywhere(unix.AF_INET), Table: testConfig.Table, Type: unix.RTN_BLACKHOLE,
		Protocol: netlink.RouteProtocol(testConfig.Protocol),
	}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
}

// addForeign adds what must survive: a rule of another program's, and a route that has our protocol number by accident.
func addForeign(t *testing.T) {
	t.Helper()
	addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 5000, 100 }))
	_, network, _ := net.ParseCIDR("203.0.113.0/24")
	route := &netlink.Route{
		Dst: network, Table: 100, Type: unix.RTN_UNREACHABLE,
		Protocol: netlink.RouteProtocol(testConfig.Protocol),
	}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
}

func TestApplySweepsLeftovers(t *testing.T) {
	namespace(t)
	addForeign(t)
	before := snapshot(t)
	h := applied(t, testConfig)
	want := snapshot(t)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}

	addLeftovers(t)
	h = applied(t, testConfig)
	if got := snapshot(t); got != want {
		t.Errorf("after a sweep:\n%s\nwithout one:\n%s", got, want)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestCleanUp(t *testing.T) {
	namespace(t)
	addForeign(t)
	before := snapshot(t)
	addLeftovers(t)
	c := Config{Table: testConfig.Table, Protocol: testConfig.Protocol}
	for range 2 { // the second finds nothing
		if err := CleanUp(c); err != nil {
			t.Fatal(err)
		}
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}

	c.Protocol = unix.RTPROT_KERNEL
	wantError(t, CleanUp(c), "protocol 2")
	if after := snapshot(t); after != before {
		t.Errorf("a clean-up of the kernel's rules was refused, and yet:\n%s", after)
	}
}

func TestApplyOtherSettings(t *testing.T) {
	namespace(t)
	before := snapshot(t)
	h := applied(t, testConfig)
	c := testConfig
	c.Priority, c.Table, c.IPv6 = 300, 301, false
	if err := h.Apply(c); err != nil {
		t.Fatal(err)
	}
	owned, err := h.owned(c)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(owned), len(desired(c)); got != want {
		t.Errorf("%d entries of ours, want %d: %v", got, want, owned)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// otherKernel answers some requests with an error of its own.
type otherKernel struct {
	kernel
	ruleList func(family int) error
	ruleAdd  func(*netlink.Rule) error
}

func (k otherKernel) RuleList(family int) ([]netlink.Rule, error) {
	if k.ruleList != nil {
		if err := k.ruleList(family); err != nil {
			return nil, err
		}
	}
	return k.kernel.RuleList(family)
}

func (k otherKernel) RuleAdd(r *netlink.Rule) error {
	if k.ruleAdd != nil {
		if err := k.ruleAdd(r); err != nil {
			return err
		}
	}
	return k.kernel.RuleAdd(r)
}

// only returns errno for rules of one family.
func only(family int, errno syscall.Errno) func(int) error {
	return func(asked int) error {
		if asked == family {
			return errno
		}
		return nil
	}
}

func TestKernelWithoutRules(t *testing.T) {
	tests := map[string]struct {
		kernel otherKernel
		want   []string
	}{
		"no policy routing": {
			kernel: otherKernel{ruleAdd: func(*netlink.Rule) error { return unix.EOPNOTSUPP }},
			want:   []string{"CONFIG_IP_MULTIPLE_TABLES"},
		},
		"no rules to list": {
			kernel: otherKernel{ruleList: only(unix.AF_INET, unix.EAFNOSUPPORT)},
			want:   []string{"CONFIG_IP_MULTIPLE_TABLES"},
		},
		"no IPv6": {
			kernel: otherKernel{ruleList: only(unix.AF_INET6, unix.EAFNOSUPPORT)},
			want:   []string{"without IPv6"},
		},
		"the last rule is refused": {
			kernel: otherKernel{ruleAdd: func(r *netlink.Rule) error {
				if r.Family == unix.AF_INET6 && r.Priority == testConfig.Priority+2 {
					return unix.ENOBUFS
				}
				return nil
			}},
			want: []string{"add ip -6 rule pref 4220", "no buffer space"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			namespace(t)
			before := snapshot(t)
			h := open(t)
			defer h.Close()
			test.kernel.kernel = h.kernel
			h.kernel = test.kernel
			wantError(t, h.Apply(testConfig), test.want...)
			if after := snapshot(t); after != before {
				t.Errorf("before:\n%s\nafter the error:\n%s", before, after)
			}
		})
	}
}

func TestKernelWithoutIPv6ServesIPv4(t *testing.T) {
	namespace(t)
	h := open(t)
	defer h.Close()
	h.kernel = otherKernel{kernel: h.kernel, ruleList: only(unix.AF_INET6, unix.EAFNOSUPPORT)}
	c := testConfig
	c.IPv6 = false
	if err := h.Apply(c); err != nil {
		t.Fatal(err)
	}
}

func TestInterruptedListIsAskedForAgain(t *testing.T) {
	namespace(t)
	h := open(t)
	defer h.Close()
	interruptions := dumpAttempts - 1
	h.kernel = otherKernel{kernel: h.kernel, ruleList: func(int) error {
		interruptions--
		if interruptions >= 0 {
			return netlink.ErrDumpInterrupted
		}
		return nil
	}}
	if err := h.Apply(testConfig); err != nil {
		t.Fatal(err)
	}
	interruptions = 1 << 20
	wantError(t, h.Check(testConfig), "list ip rules")
	interruptions = 0
}

// dropCapabilities takes them from the calling test, whose thread ends with it.
func dropCapabilities(t *testing.T) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
}

func TestWithoutCapability(t *testing.T) {
	namespace(t)
	before := snapshot(t)
	h := open(t)
	defer h.Close()
	dropCapabilities(t)
	if err := h.Check(testConfig); err != nil {
		t.Errorf("check: %v", err)
	}
	wantError(t, h.Apply(testConfig), "add ip route local default dev lo table 4219", "operation not permitted", "CAP_NET_ADMIN")
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter the error:\n%s", before, after)
	}
}

func TestCleanUpWithoutCapability(t *testing.T) {
	namespace(t)
	applied(t, testConfig)
	before := snapshot(t)
	dropCapabilities(t)
	wantError(t, CleanUp(testConfig), "remove ip -6 rule pref 4220", "operation not permitted", "CAP_NET_ADMIN")
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter the error:\n%s", before, after)
	}
}

func TestLoopbackDown(t *testing.T) {
	emptyNamespace(t)
	h := open(t)
	defer h.Close()
	onlyIPv4 := testConfig
	onlyIPv4.IPv6 = false
	for _, c := range []Config{testConfig, onlyIPv4} {
		wantError(t, h.Apply(c), "ip link set lo up")
	}
	setLink(t, "lo", true)
	if err := h.Apply(testConfig); err != nil {
		t.Error(err)
	}
}

func TestIPv6Disabled(t *testing.T) {
	namespace(t)
	writeSysctl(t, "net/ipv6/conf/lo/disable_ipv6", "1")
	before := snapshot(t)
	h := open(t)
	defer h.Close()
	wantError(t, h.Apply(testConfig), "IPv6 is disabled on lo", "net.ipv6.conf.lo.disable_ipv6=0")
	if after := snapshot(t); after != before {
		t.Errorf("before:\n%s\nafter the error:\n%s", before, after)
	}
	c := testConfig
	c.IPv6 = false
	if err := h.Apply(c); err != nil {
		t.Error(err)
	}
}
