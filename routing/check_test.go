package routing

import (
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// marked completes a rule that matches by mark.
func marked(priority, table int, mark, mask uint32) func(*netlink.Rule) {
	return func(r *netlink.Rule) {
		r.Priority, r.Table, r.Mark, r.Mask = priority, table, mark, &mask
	}
}

func TestCheckNamesClash(t *testing.T) {
	const all = 0xffffffff
	inverted := func(mark, mask uint32) func(*netlink.Rule) {
		return func(r *netlink.Rule) {
			marked(90, 99, mark, mask)(r)
			r.Invert = true
		}
	}
	tests := map[string]struct {
		rule *netlink.Rule
		want []string // words of the error; none if there is to be none
	}{
		"first preference": {
			rule: rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 4218, 99 }),
			want: []string{"ip rule pref 4218 lookup 99", "--rule-priority"},
		},
		"last preference, IPv6": {
			rule: rule(unix.AF_INET6, func(r *netlink.Rule) { r.Priority, r.Table, r.Protocol = 4220, unix.RT_TABLE_MAIN, 42 }),
			want: []string{"ip -6 rule pref 4220 lookup main protocol 42", "--rule-priority"},
		},
		"preference before": {rule: rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 4217, 99 })},
		"preference behind": {rule: rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table = 4221, 99 })},
		"our table": {
			rule: rule(unix.AF_INET, func(r *netlink.Rule) { r.Priority, r.Table, r.IifName = 90, 4219, "eth7" }),
			want: []string{"ip rule pref 90 iif eth7 lookup 4219", "--table"},
		},
		"our bits": {
			rule: rule(unix.AF_INET, marked(90, 99, 0x0100_0000, 0x0f00_0000)),
			want: []string{"ip rule pref 90 fwmark 0x1000000/0xf000000 lookup 99", "--mark"},
		},
		"a whole mark with our bits": {
			rule: rule(unix.AF_INET6, marked(90, 99, 0x0400_0007, all)),
			want: []string{"ip -6 rule pref 90 fwmark 0x4000007 lookup 99", "--mark"},
		},
		"not our bits": {
			rule: rule(unix.AF_INET, inverted(0x0200_0000, 0x0200_0000)),
			want: []string{"ip rule pref 90 not fwmark 0x2000000/0x2000000 lookup 99", "--mark"},
		},
		"no mark at all": {
			rule: rule(unix.AF_INET, marked(90, 99, 0, all)),
			want: []string{"ip rule pref 90 fwmark 0x0 lookup 99", "--mark"},
		},
		"kube-proxy":   {rule: rule(unix.AF_INET, marked(90, 99, 0x4000, 0x4000))},
		"Tailscale":    {rule: rule(unix.AF_INET, marked(5210, unix.RT_TABLE_MAIN, 0x80000, 0xff0000))},
		"wg-quick":     {rule: rule(unix.AF_INET, inverted(0xca6c, all))},
		"a whole mark": {rule: rule(unix.AF_INET, marked(90, 99, 0xca6c, all))},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			namespace(t)
			addRule(t, test.rule)
			before := snapshot(t)
			h := open(t)
			defer h.Close()
			checked, applyErr := h.Check(testConfig), h.Apply(testConfig)
			if test.want == nil {
				if checked != nil || applyErr != nil {
					t.Errorf("check: %v; apply: %v", checked, applyErr)
				}
				return
			}
			wantError(t, checked, test.want...)
			wantError(t, applyErr, test.want...)
			if after := snapshot(t); after != before {
				t.Errorf("before:\n%s\nafter the error:\n%s", before, after)
			}
		})
	}
}

func TestCheckNamesRouteInTable(t *testing.T) {
	namespace(t)
	_, network, _ := net.ParseCIDR("203.0.113.0/24")
	if err := netlink.RouteAdd(&netlink.Route{Dst: network, Table: 4219, LinkIndex: loopbackIndex, Protocol: 4}); err != nil {
		t.Fatal(err)
	}
	h := open(t)
	defer h.Close()
	wantError(t, h.Check(testConfig), "ip route 203.0.113.0/24 dev lo table 4219 proto 4", "--table")
	other := testConfig
	other.Table = 4220
	if err := h.Check(other); err != nil {
		t.Error(err)
	}
}

func TestCheckOfValues(t *testing.T) {
	tests := map[string]struct {
		change func(*Config)
		want   string
	}{
		"no table":         {func(c *Config) { c.Table = 0 }, "--table"},
		"main table":       {func(c *Config) { c.Table = unix.RT_TABLE_MAIN }, "--table"},
		"local table":      {func(c *Config) { c.Table = unix.RT_TABLE_LOCAL }, "--table"},
		"compat table":     {func(c *Config) { c.Table = 252 }, "--table"},
		"huge table":       {func(c *Config) { c.Table = 1 << 32 }, "--table"},
		"preference 0":     {func(c *Config) { c.Priority = 0 }, "--rule-priority"},
		"preference 32764": {func(c *Config) { c.Priority = 32764 }, "--rule-priority"},
		"no LAN mark":      {func(c *Config) { c.LAN = 0 }, "--mark"},
		"one mark":         {func(c *Config) { c.LAN = c.Local }, "--mark"},
		"mark beyond mask": {func(c *Config) { c.Local = 1 }, "--mark"},
		"protocol boot":    {func(c *Config) { c.Protocol = unix.RTPROT_BOOT }, "protocol 3"},

		"small table":      {func(c *Config) { c.Table = 1 }, ""},
		"table 256":        {func(c *Config) { c.Table = 256 }, ""},
		"largest table":    {func(c *Config) { c.Table = 1<<32 - 1 }, ""},
		"preference 1":     {func(c *Config) { c.Priority = 1 }, ""},
		"preference 32763": {func(c *Config) { c.Priority = 32763 }, ""},
		"top bits":         {func(c *Config) { c.Mask, c.LAN, c.Local = 0xe000_0000, 0x2000_0000, 0x8000_0000 }, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			namespace(t)
			before := snapshot(t)
			h := open(t)
			c := testConfig
			test.change(&c)
			err := h.Apply(c)
			if test.want != "" {
				wantError(t, err, test.want)
			} else if err != nil {
				t.Error(err)
			} else if err := h.Verify(); err != nil {
				t.Error(err)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
			if after := snapshot(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}
