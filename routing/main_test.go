package routing

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// testConfig has the program's defaults.
var testConfig = Config{
	Table: 4219, Priority: 4218, Protocol: 219,
	Mask: 0x0700_0000, LAN: 0x0100_0000, Local: 0x0200_0000,
	IPv4: true, IPv6: true,
}

func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

// emptyNamespace gives the calling test, not those that it starts, a network namespace in which there is only lo, which is
// down. The test's own calls of netlink are then inside.
func emptyNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the test, and the namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// namespace gives the calling test a network namespace with lo up, and the sysctls that matter the same on every machine:
// the kernel copies them from the host's.
func namespace(t *testing.T) {
	t.Helper()
	emptyNamespace(t)
	for _, file := range []string{"ip_forward", "conf/all/rp_filter", "conf/default/rp_filter", "conf/all/src_valid_mark"} {
		writeSysctl(t, "net/ipv4/"+file, "0")
	}
	setLink(t, "lo", true)
}

// inSameNamespace runs f on another thread, in the calling test's namespace.
func inSameNamespace(t *testing.T, f func()) {
	t.Helper()
	file, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer file.Close()
		runtime.LockOSThread()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
}

func setLink(t *testing.T, name string, up bool) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil && up {
		err = netlink.LinkSetUp(link)
	} else if err == nil {
		err = netlink.LinkSetDown(link)
	}
	if err != nil {
		t.Fatalf("set %s up=%t: %v", name, up, err)
	}
}

// writeSysctl sets a sysctl of the test's own namespace.
func writeSysctl(t *testing.T, file, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/"+file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// addLink makes an interface with addresses, up, as one end of a veth pair.
func addLink(t *testing.T, name string, addrs ...string) netlink.Link {
	t.Helper()
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "-peer"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	setLink(t, name, true)
	setLink(t, name+"-peer", true)
	for _, addr := range addrs {
		addAddr(t, veth, addr)
	}
	return veth
}

func addAddr(t *testing.T, link netlink.Link, text string) {
	t.Helper()
	addr, err := netlink.ParseAddr(text)
	if err != nil {
		t.Fatal(err)
	}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		t.Fatalf("add %s: %v", text, err)
	}
}

// addDefault adds a default route in the main table.
func addDefault(t *testing.T, link netlink.Link, gateway string) {
	t.Helper()
	family := unix.AF_INET
	if netip.MustParseAddr(gateway).Is6() {
		family = unix.AF_INET6
	}
	route := &netlink.Route{Dst: everywhere(family), Gw: net.ParseIP(gateway), LinkIndex: link.Attrs().Index}
	if err := netlink.RouteAdd(route); err != nil {
		t.Fatalf("add default via %s: %v", gateway, err)
	}
}

// rule makes a rule that change has completed.
func rule(family int, change func(*netlink.Rule)) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = family
	change(r)
	return r
}

func addRule(t *testing.T, r *netlink.Rule) {
	t.Helper()
	if err := netlink.RuleAdd(r); err != nil {
		t.Fatalf("add rule %s: %v", ruleText(r), err)
	}
}

// snapshot lists all rules and all routes of the namespace.
func snapshot(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	for _, family := range allFamilies {
		rules, err := netlink.RuleList(family)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			text.WriteString(entry{rule: &r}.String() + "\n")
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			fmt.Fprintf(&text, "%v type %d\n", r, r.Type)
		}
	}
	return text.String()
}

func open(t *testing.T) *Handle {
	t.Helper()
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// applied opens a handle and applies c.
func applied(t *testing.T, c Config) *Handle {
	t.Helper()
	h := open(t)
	if err := h.Apply(c); err != nil {
		t.Fatal(err)
	}
	return h
}

// wantError checks that err is one line with all the words.
func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q lacks %q", err, word)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("error %q has more than one line", err)
	}
}
