package sklookup

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs the test on a thread that has a network namespace of its own, which ends with it.
func inNamespace(t *testing.T) {
	t.Helper()
	mapping, err := os.ReadFile("/proc/self/uid_map")
	if err != nil || strings.Join(strings.Fields(string(mapping)), " ") != "0 0 4294967295" || os.Geteuid() != 0 {
		t.Skip("sk_lookup programs need root in the initial user namespace: make test-hosts")
	}
	runtime.LockOSThread() // and never unlocked: the thread is not used again
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// listening makes the sockets of one family as the gateway has them.
type listening struct{ tcp, dnsTCP, dnsUDP int }

func listen(t *testing.T, family int) listening {
	t.Helper()
	open := func(kind int) int {
		socket, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(socket) })
		var address unix.Sockaddr = new(unix.SockaddrInet4)
		if family == unix.AF_INET6 {
			address = new(unix.SockaddrInet6)
		}
		if err := unix.Bind(socket, address); err != nil {
			t.Fatal(err)
		}
		if kind == unix.SOCK_STREAM {
			if err := unix.Listen(socket, 1); err != nil {
				t.Fatal(err)
			}
		}
		return socket
	}
	return listening{open(unix.SOCK_STREAM), open(unix.SOCK_STREAM), open(unix.SOCK_DGRAM)}
}

func cookie(t *testing.T, socket int) uint64 {
	t.Helper()
	value, err := unix.GetsockoptUint64(socket, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// TestProgram asks the program, on the real kernel, about every kind of packet.
func TestProgram(t *testing.T) {
	inNamespace(t)
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	const captured, uplink = 0, 7
	ask := func(name string, protocol int, destination string, verdict uint32, socket uint64) {
		t.Helper()
		got, assigned, err := h.ask(uint32(protocol), netip.MustParseAddrPort(destination))
		if err != nil {
			t.Fatal(err)
		}
		if got != verdict || assigned != socket {
			t.Errorf("%s: verdict %d and socket %d, want %d and %d", name, got, assigned, verdict, socket)
		}
	}
	ask("nothing set", unix.IPPROTO_TCP, "203.0.113.7:443", pass, 0)
	own := []netip.Prefix{
		netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("2001:db8::1/128"),
		netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8"),
	}
	if err := h.Set([]int{captured}, own); err != nil {
		t.Fatal(err)
	}
	ask("no socket", unix.IPPROTO_TCP, "203.0.113.7:443", drop, 0)
	ask("no socket for UDP", unix.IPPROTO_UDP, "203.0.113.7:443", pass, 0)

	four, six := listen(t, unix.AF_INET), listen(t, unix.AF_INET6)
	for _, l := range []listening{four, six} {
		if err := errors.Join(h.Assign(l.tcp, false), h.Assign(l.dnsTCP, true), h.Assign(l.dnsUDP, true)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		of                        listening
		foreign, own, group, edge string
	}{
		{four, "203.0.113.7", "192.0.2.1", "224.0.0.251", "127.1.2.3"},
		{six, "[2001:db8:3::7]", "[2001:db8::1]", "[ff02::fb]", "[2001:db8::1]"},
	} {
		ask("TCP", unix.IPPROTO_TCP, c.foreign+":443", pass, cookie(t, c.of.tcp))
		ask("DNS over TCP", unix.IPPROTO_TCP, c.foreign+":53", pass, cookie(t, c.of.dnsTCP))
		ask("DNS over UDP", unix.IPPROTO_UDP, c.foreign+":53", pass, cookie(t, c.of.dnsUDP))
		ask("other UDP", unix.IPPROTO_UDP, c.foreign+":123", pass, 0)
		for _, port := range []string{":443", ":53"} {
			ask("own address", unix.IPPROTO_TCP, c.own+port, pass, 0)
			ask("own network", unix.IPPROTO_TCP, c.edge+port, pass, 0)
			ask("a group", unix.IPPROTO_UDP, c.group+port, pass, 0)
		}
	}

	// An address that goes, an interface that comes.
	if err := h.Set([]int{uplink}, own[1:]); err != nil {
		t.Fatal(err)
	}
	ask("a former interface", unix.IPPROTO_TCP, "203.0.113.7:443", pass, 0)
	if err := h.Set([]int{uplink, captured}, own[1:]); err != nil {
		t.Fatal(err)
	}
	ask("a former own address", unix.IPPROTO_TCP, "192.0.2.1:443", pass, cookie(t, four.tcp))

	unix.Close(four.dnsTCP)
	ask("DNS over TCP without a socket of its own", unix.IPPROTO_TCP, "203.0.113.7:53", pass, cookie(t, four.tcp))
	if err := h.Refuse(); err != nil {
		t.Fatal(err)
	}
	ask("refused", unix.IPPROTO_TCP, "203.0.113.7:443", drop, 0)
	if err := h.Refuse(); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// TestConnections has the kernel deliver real connections to foreign addresses, and spread them among the sockets that share a
// port.
func TestConnections(t *testing.T) {
	inNamespace(t)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	_, foreign, _ := net.ParseCIDR("203.0.113.0/24")
	route := &netlink.Route{Dst: foreign, LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Table: unix.RT_TABLE_LOCAL}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.RouteAdd(route)); err != nil {
		t.Fatal(err)
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		raw.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
		})
		return err
	}}
	config.SetMultipathTCP(false) // such sockets are in no sockmap
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.Set([]int{lo.Attrs().Index}, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}); err != nil {
		t.Fatal(err)
	}
	var listeners []*net.TCPListener
	for range 2 {
		listener, err := config.Listen(t.Context(), "tcp4", "127.0.0.1:15001")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		listeners = append(listeners, listener.(*net.TCPListener))
	}
	raw, err := listeners[0].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = h.Assign(int(fd), false) })
	if err != nil {
		t.Fatal(err)
	}
	const connections = 40
	for range connections {
		conn, err := net.DialTimeout("tcp4", "203.0.113.7:443", time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	total := 0
	for i, listener := range listeners {
		taken := 0
		for {
			listener.SetDeadline(time.Now().Add(50 * time.Millisecond))
			conn, err := listener.Accept()
			if err != nil {
				break
			}
			if at := conn.LocalAddr().String(); at != "203.0.113.7:443" {
				t.Errorf("accepted at %s", at)
			}
			conn.Close()
			taken++
		}
		if taken == 0 {
			t.Errorf("socket %d of the two got no connection", i)
		}
		total += taken
	}
	if total != connections {
		t.Errorf("%d connections were accepted", total)
	}
}

// TestNothingIsLeft: neither program nor map nor link stays when a handle is closed.
func TestNothingIsLeft(t *testing.T) {
	inNamespace(t)
	before := left(t)
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	if during := left(t); during <= before {
		t.Fatalf("%d objects before, %d with one open: the test sees none", before, during)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if after := left(t); after > before {
		t.Errorf("%d objects before, %d after", before, after)
	}
}

// left counts the programs and maps of these names in the kernel.
func left(t *testing.T) (n int) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
		if program, err := ebpf.NewProgramFromID(id); err == nil {
			if info, err := program.Info(); err == nil && info.Name == "transproxy" {
				n++
			}
			program.Close()
		}
	}
	return n
}

// TestSelfTest: a program that does something else is not attached.
func TestSelfTest(t *testing.T) {
	inNamespace(t)
	h, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.test(); err != nil {
		t.Errorf("once more: %v", err)
	}
	right := h.program
	defer func() { h.program = right }()
	h.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, pass), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer h.program.Close()
	if err := h.test(); err == nil || !strings.Contains(err.Error(), "--engine tproxy") {
		t.Errorf("a program that assigns nothing: %v", err)
	}
}

// TestTooMany: bounds are told, and nothing is changed.
func TestTooMany(t *testing.T) {
	h := new(Handle)
	if err := h.Set(make([]int, maxInterfaces+1), nil); err == nil || !strings.Contains(err.Error(), "4096") {
		t.Error(err)
	}
}
