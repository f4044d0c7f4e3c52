package routing

import (
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

func prefixNet(t *testing.T, text string) *net.IPNet {
	t.Helper()
	_, network, err := net.ParseCIDR(text)
	if err != nil {
		t.Fatal(err)
	}
	return network
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func prefixes(texts ...string) (list []netip.Prefix) {
	for _, text := range texts {
		list = append(list, netip.MustParsePrefix(text))
	}
	return list
}

// look returns what Look says, and its interface of the given name.
func look(t *testing.T, name string) (Host, Interface) {
	t.Helper()
	host, err := Look()
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(host.Interfaces, func(i Interface) bool { return i.Name == name })
	if at < 0 {
		t.Fatalf("no interface %s in %+v", name, host)
	}
	return host, host.Interfaces[at]
}

// withoutLinkLocal drops the addresses that the kernel makes from the hardware's.
func withoutLinkLocal(i Interface) Interface {
	i.Addrs = slices.DeleteFunc(i.Addrs, netip.Addr.IsLinkLocalUnicast)
	return i
}

func TestLookTwoArmed(t *testing.T) {
	router(t)
	link, err := netlink.LinkByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	addAddr(t, link, "192.0.2.9/24")
	addAddr(t, link, "169.254.7.1/16")
	far := &netlink.Addr{IPNet: prefixNet(t, "10.9.0.1/32"), Peer: prefixNet(t, "10.9.0.2/32")}
	if err := netlink.AddrAdd(link, far); err != nil {
		t.Fatal(err)
	}
	host, lan := look(t, "lan0")
	if !slices.ContainsFunc(lan.Addrs, func(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }) {
		t.Errorf("no IPv6 link-local address in %v", lan.Addrs)
	}
	lan.Addrs = slices.DeleteFunc(lan.Addrs, func(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() })
	want := Interface{
		Name: "lan0", Index: link.Attrs().Index, Up: true,
		Addrs:    addrs("10.9.0.1", "169.254.7.1", "192.0.2.1", "192.0.2.9", "2001:db8:1::1"),
		Prefixes: prefixes("10.9.0.2/32", "192.0.2.0/24", "2001:db8:1::/64"),
	}
	if !reflect.DeepEqual(lan, want) {
		t.Errorf("got  %+v\nwant %+v", lan, want)
	}
	if want := []string{"wan0"}; !slices.Equal(host.Uplinks, want) {
		t.Errorf("uplinks %q, want %q", host.Uplinks, want)
	}
	_, lo := look(t, "lo")
	wantLo := Interface{
		Name: "lo", Index: loopbackIndex, Loopback: true, Up: true,
		Addrs: addrs("127.0.0.1", "::1"), Prefixes: prefixes("127.0.0.0/8", "::1/128"),
	}
	if !reflect.DeepEqual(lo, wantLo) {
		t.Errorf("got  %+v\nwant %+v", lo, wantLo)
	}
}

func TestLookOneArmed(t *testing.T) {
	namespace(t)
	link := addLink(t, "eth0", "192.0.2.10/24")
	addDefault(t, link, "192.0.2.1")
	host, eth := look(t, "eth0")
	want := Interface{
		Name: "eth0", Index: link.Attrs().Index, Up: true,
		Addrs: addrs("192.0.2.10"), Prefixes: prefixes("192.0.2.0/24"),
	}
	if got := withoutLinkLocal(eth); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if want := []string{"eth0"}; !slices.Equal(host.Uplinks, want) {
		t.Errorf("uplinks %q, want %q", host.Uplinks, want)
	}
}

func TestLookUplinks(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, a, b netlink.Link)
		want   []string
	}{
		"none": {change: func(*testing.T, netlink.Link, netlink.Link) {}},
		"IPv6 only": {
			change: func(t *testing.T, a, b netlink.Link) { addDefault(t, b, "2001:db8:2::9") },
			want:   []string{"b0"},
		},
		"one a family": {
			change: func(t *testing.T, a, b netlink.Link) {
				addDefault(t, b, "198.51.100.9")
				addDefault(t, a, "2001:db8:1::9")
			},
			want: []string{"a0", "b0"},
		},
		"several next hops": {
			change: func(t *testing.T, a, b netlink.Link) {
				route := &netlink.Route{Dst: prefixNet(t, "0.0.0.0/0"), MultiPath: []*netlink.NexthopInfo{
					{LinkIndex: b.Attrs().Index, Gw: net.ParseIP("198.51.100.9")},
					{LinkIndex: a.Attrs().Index, Gw: net.ParseIP("192.0.2.9")},
				}}
				if err := netlink.RouteAdd(route); err != nil {
					t.Fatal(err)
				}
			},
			want: []string{"a0", "b0"},
		},
		"in another table": {
			change: func(t *testing.T, a, b netlink.Link) {
				route := &netlink.Route{Dst: prefixNet(t, "0.0.0.0/0"), Table: 99, LinkIndex: a.Attrs().Index}
				if err := netlink.RouteAdd(route); err != nil {
					t.Fatal(err)
				}
			},
		},
		"ours": {change: func(t *testing.T, a, b netlink.Link) { applied(t, testConfig) }},
		"a way out that is closed": {
			change: func(t *testing.T, a, b netlink.Link) {
				route := &netlink.Route{Dst: prefixNet(t, "::/0"), Type: 7, LinkIndex: loopbackIndex} // RTN_UNREACHABLE
				if err := netlink.RouteAdd(route); err != nil {
					t.Fatal(err)
				}
			},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			namespace(t)
			a := addLink(t, "a0", "192.0.2.1/24", "2001:db8:1::1/64")
			b := addLink(t, "b0", "198.51.100.1/24", "2001:db8:2::1/64")
			test.change(t, a, b)
			if host, _ := look(t, "a0"); !slices.Equal(host.Uplinks, test.want) {
				t.Errorf("uplinks %q, want %q", host.Uplinks, test.want)
			}
		})
	}
}

func TestLookInEmptyNamespace(t *testing.T) {
	emptyNamespace(t)
	host, lo := look(t, "lo")
	want := Interface{Name: "lo", Index: loopbackIndex, Loopback: true}
	if !reflect.DeepEqual(lo, want) || host.Uplinks != nil {
		t.Errorf("got %+v, want only %+v", host, want)
	}
}

func TestInterfaceTo(t *testing.T) {
	namespace(t)
	addLink(t, "a0", "192.0.2.1/24", "2001:db8:1::1/64")
	for addr, want := range map[string]string{
		"192.0.2.7":        "a0",
		"::ffff:192.0.2.7": "a0",
		"2001:db8:1::7":    "a0",
		"192.0.2.1":        "lo",
		"127.0.0.1":        "lo",
	} {
		if got, err := InterfaceTo(netip.MustParseAddr(addr)); got != want || err != nil {
			t.Errorf("to %s: %q, %v, want %q", addr, got, err, want)
		}
	}
	for _, addr := range []string{"203.0.113.1", "2001:db8:9::1"} {
		_, err := InterfaceTo(netip.MustParseAddr(addr))
		wantError(t, err, addr, "unreachable")
	}
	if _, err := InterfaceTo(netip.Addr{}); err == nil {
		t.Error("no error for no address")
	}
}

func TestNeighbour(t *testing.T) {
	tests := []struct {
		own, prefix, want string // want "" for none
	}{
		{"192.0.2.1", "192.0.2.0/24", "192.0.2.2"},
		{"192.0.2.9", "192.0.2.0/24", "192.0.2.1"},
		{"192.0.2.0", "192.0.2.0/31", "192.0.2.1"},
		{"192.0.2.1", "192.0.2.0/31", "192.0.2.0"},
		{"192.0.2.1", "192.0.2.1/32", ""},
		{"255.255.255.255", "255.255.255.255/32", ""},
		{"10.9.0.1", "10.9.0.2/32", "10.9.0.2"},
		{"2001:db8::1", "2001:db8::/64", "2001:db8::2"},
		{"2001:db8::1", "2001:db8::1/128", ""},
	}
	for _, test := range tests {
		own := netip.MustParseAddr(test.own)
		i := Interface{Addrs: []netip.Addr{own}, Prefixes: prefixes(test.prefix)}
		got, ok := i.neighbour(own.Is4())
		if ok != (test.want != "") || ok && got.String() != test.want {
			t.Errorf("%s in %s: got %v, %t, want %q", test.own, test.prefix, got, ok, test.want)
		}
		if got, ok := i.neighbour(!own.Is4()); ok {
			t.Errorf("%s in %s: got %v of the other family", test.own, test.prefix, got)
		}
	}
}
