package routing

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// callHooks writes the sysctl that has all bridges of the namespace call the hooks.
func callHooks(t *testing.T, value string) {
	t.Helper()
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		err := os.WriteFile("/proc/sys/net/bridge/"+name, []byte(value), 0)
		if os.IsNotExist(err) {
			t.Skip("this kernel has no br_netfilter")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFrames: of which interfaces the rules see frames, for all bridges or for one.
func TestFrames(t *testing.T) {
	namespace(t)
	callHooks(t, "0")
	bridge := func(name string) *netlink.Bridge {
		link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
		if err := netlink.LinkAdd(link); err != nil {
			t.Fatal(err)
		}
		return link
	}
	one := bridge("br1")
	bridge("br2")
	upon := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "upon1", ParentIndex: one.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}
	if err := netlink.LinkAdd(upon); err != nil {
		t.Fatal(err)
	}
	frames := func() (names []string) {
		t.Helper()
		host, err := Look()
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range host.Interfaces {
			if i.Frames {
				names = append(names, i.Name)
			}
		}
		slices.Sort(names)
		return names
	}
	if got := frames(); got != nil {
		t.Errorf("none is switched on: %q", got)
	}
	request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = int32(one.Attrs().Index)
	request.AddData(message)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.IFLA_BR_NF_CALL_IP6TABLES, nl.Uint8Attr(1))
	request.AddData(info)
	if _, err := request.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		t.Fatal(err)
	}
	if got, want := frames(), []string{"br1", "upon1"}; !slices.Equal(got, want) {
		t.Errorf("one bridge: %q, want %q", got, want)
	}
	callHooks(t, "1")
	if got, want := frames(), []string{"br1", "br2", "upon1"}; !slices.Equal(got, want) {
		t.Errorf("all: %q, want %q", got, want)
	}
}

// TestLocal: what is delivered here, by an address or by a route.
func TestLocal(t *testing.T) {
	router(t)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	route := &netlink.Route{
		Dst: prefixNet(t, "203.0.113.0/28"), LinkIndex: lo.Attrs().Index,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Table: unix.RT_TABLE_LOCAL,
	}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatal(err)
	}
	host, lan := look(t, "lan0")
	for _, address := range lan.Addrs {
		if !slices.Contains(host.Local, netip.PrefixFrom(address, address.BitLen())) {
			t.Errorf("%s is not among %v", address, host.Local)
		}
	}
	for _, want := range prefixes("127.0.0.0/8", "::1/128", "203.0.113.0/28") {
		if !slices.Contains(host.Local, want) {
			t.Errorf("%s is not among %v", want, host.Local)
		}
	}
	if slices.Contains(host.Local, netip.MustParsePrefix("0.0.0.0/0")) {
		t.Error("all is")
	}
}

// TestFramesAreWatched: the sysctl has no notices, and the change is told all the same.
func TestFramesAreWatched(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as the interval of the poll")
	}
	namespace(t)
	callHooks(t, "0")
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	ctx, cancel := context.WithTimeout(t.Context(), pollInterval+5*time.Second)
	defer cancel()
	changes := 0
	err = h.Watch(ctx, func(event Event) {
		if event.Changed {
			if changes++; changes == 1 {
				callHooks(t, "1")
			} else {
				cancel()
			}
		}
	})
	if err != nil || changes != 2 {
		t.Errorf("told of %d changes, %v", changes, err)
	}
}
