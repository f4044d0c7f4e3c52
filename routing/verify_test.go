package routing

import (
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// router makes a host with a LAN, an uplink and default routes.
func router(t *testing.T) {
	t.Helper()
	namespace(t)
	addLink(t, "lan0", "192.0.2.1/24", "2001:db8:1::1/64")
	wan := addLink(t, "wan0", "203.0.113.2/24", "2001:db8:2::2/64")
	addDefault(t, wan, "203.0.113.1")
	addDefault(t, wan, "2001:db8:2::1")
}

func TestVerify(t *testing.T) {
	mask := testConfig.Mask
	tests := map[string]struct {
		change func(t *testing.T)
		want   []string // words of the error; none if there is to be none
	}{
		"as applied": {change: func(t *testing.T) {}},
		"strict reverse path with marks": {change: func(t *testing.T) {
			writeSysctl(t, "net/ipv4/conf/all/src_valid_mark", "1")
			writeSysctl(t, "net/ipv4/conf/all/rp_filter", "1")
		}},
		"forwarding": {change: func(t *testing.T) {
			writeSysctl(t, "net/ipv4/ip_forward", "1")
			writeSysctl(t, "net/ipv6/conf/all/forwarding", "1")
		}},
		"a rule without preference": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Table = unix.RT_TABLE_MAIN }))
			},
			want: []string{"ip route get 198.51.100.1 mark 0x2000000", "ip rule pref 4217 lookup main", "--rule-priority"},
		},
		"a rule without preference, IPv6": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET6, func(r *netlink.Rule) { r.Table = unix.RT_TABLE_MAIN }))
			},
			want: []string{"ip -6 route get 2001:db8:ffff::1 mark 0x2000000", "ip -6 rule pref 4217 lookup main"},
		},
		"a rule for one interface": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET6, func(r *netlink.Rule) { r.Table, r.IifName = unix.RT_TABLE_MAIN, "lan0" }))
			},
			want: []string{"iif lan0 mark 0x1000000", "ip -6 rule pref 4217 iif lan0 lookup main"},
		},
		"a rule for a source": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) {
					r.Table, r.Src = unix.RT_TABLE_MAIN, prefixNet(t, "192.0.2.0/24")
				}))
			},
			want: []string{"from 192.0.2.2 iif lan0", "ip rule pref 4217 from 192.0.2.0/24 lookup main"},
		},
		"a rule that prohibits": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Type = 10, unix.RTN_PROHIBIT }))
			},
			want: []string{"198.51.100.1", "permission denied", "ip rule pref 10;"},
		},
		"a rule for another interface": {change: func(t *testing.T) {
			addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Table, r.IifName = unix.RT_TABLE_MAIN, "wan0" }))
		}},
		"innocent rules ahead of the guilty": {
			change: func(t *testing.T) {
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 1, 99 }))
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table, r.IifName = 2, unix.RT_TABLE_MAIN, "wan0" }))
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table, r.Mark, r.Mask = 3, unix.RT_TABLE_MAIN, 0x0400_0000, &mask }))
				addRule(t, rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 4, unix.RT_TABLE_MAIN }))
			},
			want: []string{"by a rule ahead of ours: ip rule pref 4 lookup main;"},
		},
		"a missing rule": {
			change: func(t *testing.T) {
				delRule(t, desired(testConfig)[2].rule)
			},
			want: []string{"missing: ip rule pref 4219"},
		},
		"an interface that is down": {change: func(t *testing.T) {
			writeSysctl(t, "net/ipv4/conf/all/rp_filter", "1") // no way back to its clients
			setLink(t, "lan0", false)
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			router(t)
			h := applied(t, testConfig)
			defer h.Close()
			test.change(t)
			err := h.Verify("lan0", "gone0")
			if test.want != nil {
				wantError(t, err, test.want...)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

func TestVerifyWithoutApply(t *testing.T) {
	namespace(t)
	h := open(t)
	defer h.Close()
	wantError(t, h.Verify(), "no rules are applied")
}
