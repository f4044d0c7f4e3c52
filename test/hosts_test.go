package test

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// hostState is something that a gateway's host may be like.
type hostState struct {
	name string
	// prepare makes it so, before the program starts.
	prepare func(w *worldOfHosts) error
	// bridgeNF says that packets of bridges pass the IP hooks, so that the kernel takes
	// away the socket that tproxy gave them: only sk_lookup serves containers then.
	bridgeNF bool
	oneArmed bool
}

func hostStates() []hostState {
	sysctls := func(values ...string) func(*worldOfHosts) error {
		return func(w *worldOfHosts) error {
			for i := 0; i < len(values); i += 2 {
				if err := w.Gateway.Sysctl(values[i], values[i+1]); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return []hostState{
		{name: "nothing special"},
		{name: "bridge-nf-call-iptables=1, bridge-nf-call-ip6tables=1", bridgeNF: true, prepare: sysctls(
			"net.bridge.bridge-nf-call-iptables", "1", "net.bridge.bridge-nf-call-ip6tables", "1")},
		{name: "nf_call_iptables=1, nf_call_ip6tables=1 of the bridge alone", bridgeNF: true, prepare: (*worldOfHosts).callFromBridge},
		{name: "src_valid_mark=1", prepare: sysctls("net.ipv4.conf.all.src_valid_mark", "1")},
		{name: "src_valid_mark=1, rp_filter=1", prepare: sysctls("net.ipv4.conf.all.src_valid_mark", "1", "net.ipv4.conf.all.rp_filter", "1")},
		{name: "rp_filter=1", prepare: sysctls("net.ipv4.conf.all.rp_filter", "1")},
		{name: "rp_filter=2", prepare: sysctls("net.ipv4.conf.all.rp_filter", "2")},
		{name: "ip_forward=0", prepare: sysctls("net.ipv4.ip_forward", "0", "net.ipv6.conf.all.forwarding", "0")},
		{name: "tcp_early_demux=0, udp_early_demux=0", prepare: sysctls("net.ipv4.tcp_early_demux", "0", "net.ipv4.udp_early_demux", "0")},
		{name: "ip rules of Tailscale and wg-quick", prepare: (*worldOfHosts).ruleOthers},
		{name: "another resolver on 0.0.0.0:53 and [::]:53", prepare: (*worldOfHosts).holdPort53},
		{name: "one network card", oneArmed: true},
		{name: "clients on a macvlan interface", prepare: (*worldOfHosts).macvlan},
		{name: "clients on an interface of a VRF", prepare: (*worldOfHosts).vrf},
	}
}

// errNotHere says that this kernel has not what a state is made of.
var errNotHere = errors.New("not in this kernel")

// TestHosts tries every kind of traffic on every kind of host. With HOSTS_WRITE it writes the
// table into that file. Where tproxy cannot serve containers it needs the initial user
// namespace: make test-hosts.
func TestHosts(t *testing.T) {
	var table bytes.Buffer
	var columns []traffic
	for _, source := range []string{"container", "LAN client", "own program"} {
		for _, kind := range []string{"TCP", "DNS", "QUIC"} {
			columns = append(columns, traffic{source, kind})
		}
	}
	table.WriteString("| the host | engine |")
	for _, column := range columns {
		fmt.Fprintf(&table, " %s, %s |", column.source, column.kind)
	}
	table.WriteString("\n|---|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, state := range hostStates() {
		t.Run(state.name, func(t *testing.T) {
			if state.bridgeNF && !initialUserNamespace() {
				t.Skip("sk_lookup needs root in the initial user namespace: make test-hosts")
			}
			w := newWorldOfHosts(t, state.oneArmed)
			if state.prepare != nil {
				if err := state.prepare(w); errors.Is(err, errNotHere) {
					fmt.Fprintf(&table, "| %s | not in this kernel |%s\n", state.name, strings.Repeat(" |", len(columns)))
					t.Skip(err)
				} else {
					must(t, err)
				}
			}
			flags := []string{"--output", "--public-dns", public4.String()}
			if state.oneArmed {
				flags = append(flags, "--interface", "eth0,"+bridgeName) // which is not the only interface
			}
			g := w.gateway(flags...)
			fmt.Fprintf(&table, "| %s | %s |", state.name, engineOf(g))
			for _, column := range columns {
				cell := ""
				for _, family := range []string{"IPv4", "IPv6"} {
					outcome := "✓"
					if err := w.try(column, family); err != nil {
						t.Errorf("%s of a %s over %s: %v", column.kind, column.source, family, err)
						outcome = "✗"
					}
					cell += outcome
				}
				fmt.Fprintf(&table, " %s |", cell)
			}
			table.WriteString("\n")
			if err := w.neighbours(); err != nil {
				t.Errorf("from container to container: %v", err)
			}
			if sources := w.direct.Sources(); len(sources) > 0 {
				t.Errorf("%v went past the proxy", sources)
			}
			w.wantNothingPast()
			g.stop()
		})
	}
	if file := os.Getenv("HOSTS_WRITE"); file != "" && !t.Failed() {
		writeHosts(t, file, table.Bytes())
	}
}

// traffic is a column of the table.
type traffic struct{ source, kind string }

// worldOfHosts is a gateway with everything that a host may have: clients on a card, and
// containers on a bridge.
type worldOfHosts struct {
	*dnsWorld
	container, other *netns.NS
}

// The network of the containers.
const (
	bridgeName                     = "br0"
	bridge4, container4, other4    = "10.88.0.1", "10.88.0.2", "10.88.0.3"
	bridge6, container6, other6    = "2001:db8:88::1", "2001:db8:88::2", "2001:db8:88::3"
	containers4, containers6       = "10.88.0.0/24", "2001:db8:88::/64"
	containerBits4, containerBits6 = "/24", "/64"
)

func newWorldOfHosts(t *testing.T, oneArmed bool) *worldOfHosts {
	t.Helper()
	w := new(worldOfHosts)
	back4, back6 := lab.Uplink4, lab.Uplink6
	if oneArmed {
		w.dnsWorld = newOneArmedDNSWorld(t)
		back4, back6 = lab.Gateway4, lab.Gateway6
	} else {
		w.dnsWorld = newDNSWorld(t)
	}
	w.container, w.other = newHost(t), newHost(t)
	must(t,
		netns.Connect(w.Gateway, "veth1", w.container, "eth0"),
		netns.Connect(w.Gateway, "veth2", w.other, "eth0"),
		w.Gateway.Bridge(bridgeName, "veth1", "veth2"),
		w.Gateway.Addr(bridgeName, bridge4+containerBits4, bridge6+containerBits6),
		w.container.Addr("eth0", container4+containerBits4, container6+containerBits6),
		w.other.Addr("eth0", other4+containerBits4, other6+containerBits6),
		w.container.Route("0.0.0.0/0", bridge4), w.container.Route("::/0", bridge6),
		w.Router.Route(containers4, back4.String()), w.Router.Route(containers6, back6.String()),
	)
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		// A new namespace has 1.
		if err := w.Gateway.Sysctl("net.bridge."+name, "0"); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return w
}

func newHost(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	must(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

// try sends one kind of traffic over one family and wants what the program does with it.
func (w *worldOfHosts) try(what traffic, family string) error {
	from := map[string]*netns.NS{"container": w.container, "LAN client": w.Client, "own program": w.Gateway}[what.source]
	address, server := lab.Origin4, anywhere[0]
	record, want := "A", fromPublic4
	if family == "IPv6" {
		address, server, record, want = lab.Origin6, anywhere[1], "AAAA", fromPublic6
	}
	switch what.kind {
	case "TCP":
		if got, err := banner(w.t, from, address, 22); got != lab.Banner {
			return fmt.Errorf("%q, %w", got, cmp.Or(err, errors.New("another server answers")))
		}
		return nil
	case "DNS":
		for _, network := range networks {
			answer, err := ask(w.t, from, network, server, "some.public.test", record)
			if err != nil {
				return err
			}
			if got := data(answer); got != want {
				return fmt.Errorf("over %s: %q", network, got)
			}
		}
		return nil
	}
	return w.refused(from, netip.AddrPortFrom(address, 443))
}

// refused sends a datagram and wants it to be refused at once.
func (w *worldOfHosts) refused(from *netns.NS, to netip.AddrPort) error {
	conn, err := from.Dial(w.t.Context(), "udp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	if _, err = conn.Write([]byte("hello")); err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	// What this host's own program sends the kernel does not even send.
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("it is not refused: %w", err)
	}
	return nil
}

// neighbours has one container talk to the other, on ports that are captured elsewhere.
func (w *worldOfHosts) neighbours() error {
	for _, address := range []string{other4, other6} {
		listener, err := w.other.Listen("tcp", net.JoinHostPort(address, "443"))
		if err != nil {
			return err
		}
		go func() {
			if conn, err := listener.Accept(); err == nil {
				fmt.Fprint(conn, conn.RemoteAddr().(*net.TCPAddr).IP)
				conn.Close()
			}
		}()
		conn, err := w.container.Dial(w.t.Context(), "tcp", listener.Addr().String())
		if err != nil {
			listener.Close()
			return err
		}
		conn.SetDeadline(time.Now().Add(2 * time.Second))
		var seen [64]byte
		n, err := conn.Read(seen[:])
		conn.Close()
		listener.Close()
		if from := string(seen[:n]); from != container4 && from != container6 {
			return fmt.Errorf("%s saw %q, %w", address, from, err)
		}
	}
	return nil
}

// callFromBridge has the one bridge call the hooks, where the others do not.
func (w *worldOfHosts) callFromBridge() error {
	return w.Gateway.Do(func() error {
		link, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		message := nl.NewIfInfomsg(unix.AF_UNSPEC)
		message.Index = int32(link.Attrs().Index)
		request.AddData(message)
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
		bridge := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
		bridge.AddRtAttr(nl.IFLA_BR_NF_CALL_IPTABLES, nl.Uint8Attr(1))
		bridge.AddRtAttr(nl.IFLA_BR_NF_CALL_IP6TABLES, nl.Uint8Attr(1))
		request.AddData(info)
		_, err = request.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
}

// ruleOthers adds the ip rules of two programs that are often there, and a table of a tunnel
// that is down.
func (w *worldOfHosts) ruleOthers() error {
	return w.Gateway.Do(func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			tailscale := netlink.NewRule()
			tailscale.Family, tailscale.Priority, tailscale.Mark, tailscale.Table = family, 5210, 0x80000, unix.RT_TABLE_MAIN
			mask := uint32(0xff0000)
			tailscale.Mask = &mask
			wireguard := netlink.NewRule()
			wireguard.Family, wireguard.Priority, wireguard.Table, wireguard.SuppressPrefixlen = family, 32764, unix.RT_TABLE_MAIN, 0
			for _, rule := range []*netlink.Rule{tailscale, wireguard} {
				if err := netlink.RuleAdd(rule); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// holdPort53 takes port 53 of all addresses, without letting others have it.
func (w *worldOfHosts) holdPort53() error {
	return w.Gateway.Do(func() error {
		for _, network := range []string{"udp4", "udp6"} {
			conn, err := net.ListenPacket(network, ":53")
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { conn.Close() })
		}
		for _, network := range []string{"tcp4", "tcp6"} {
			listener, err := net.Listen(network, ":53")
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { listener.Close() })
		}
		return nil
	})
}

// macvlan has the clients' network on an interface on top of the card.
func (w *worldOfHosts) macvlan() error {
	return w.Gateway.Do(func() error {
		parent, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		link := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mac0", ParentIndex: parent.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}
		if err := netlink.LinkAdd(link); errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("macvlan: %w", errNotHere)
		} else if err != nil {
			return err
		}
		for _, prefix := range []string{lab.Gateway4.String() + "/24", lab.Gateway6.String() + "/64"} {
			address, err := netlink.ParseAddr(prefix)
			if err != nil {
				return err
			}
			address.Flags = unix.IFA_F_NODAD
			if err := errors.Join(netlink.AddrDel(parent, address), netlink.AddrAdd(link, address)); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
}

// vrf puts the clients' interface into a VRF.
func (w *worldOfHosts) vrf() error {
	return w.Gateway.Do(func() error {
		link := &netlink.Vrf{LinkAttrs: netlink.LinkAttrs{Name: "vrf0"}, Table: 100}
		if err := netlink.LinkAdd(link); errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("VRF: %w", errNotHere)
		} else if err != nil {
			return err
		}
		lan, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(link), netlink.LinkSetMaster(lan, link))
	})
}

// initialUserNamespace reports whether the test runs in it (user_namespaces(7)).
func initialUserNamespace() bool {
	mapping, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(mapping)), " ") == "0 0 4294967295"
}

// engineOf is what delivers captured packets, by the program's own word.
func engineOf(g *gateway) string {
	for line := range strings.Lines(g.output.String()) {
		if _, after, ok := strings.Cut(line, `"engine":"`); ok {
			engine, _, _ := strings.Cut(after, `"`)
			return engine
		}
	}
	return "tproxy"
}

// writeHosts puts the table into its section of a Markdown file.
func writeHosts(t *testing.T, file string, table []byte) {
	t.Helper()
	const begin, end = "<!-- begin: written by make test-hosts -->\n", "<!-- end: written by make test-hosts -->"
	text, err := os.ReadFile(file)
	must(t, err)
	before, rest, ok := bytes.Cut(text, []byte(begin))
	_, after, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		t.Fatalf("%s has no section between %q and %q", file, begin, end)
	}
	var kernel unix.Utsname
	must(t, unix.Uname(&kernel))
	release := string(bytes.TrimRight(kernel.Release[:], "\x00"))
	section := fmt.Sprintf("`make test-hosts`, Linux %s, %s. Each cell is IPv4, then IPv6.\n\n%s", release, time.Now().Format(time.DateOnly), table)
	must(t, os.WriteFile(file, bytes.Join([][]byte{before, []byte(begin), []byte(section), []byte(end), after}, nil), 0o644))
}
