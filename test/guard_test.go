package test

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// recorder counts the packets for the origin's networks that reach the router: what
// goes past the proxy, the gateway's own included.
type recorder struct {
	mutex  sync.Mutex
	known  map[string]bool // flows that began before the guard
	closed bool            // what begins now is not to pass
	passed int
	leaked []string
}

// close has what begins from now on counted as leaked.
func (r *recorder) close() {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.closed = true
}

// counts are the packets that passed, and those that were not to.
func (r *recorder) counts() (passed int, leaked []string) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.passed, slices.Clone(r.leaked)
}

// record starts a recorder, which ends with the test.
func (w *world) record() *recorder {
	w.t.Helper()
	var socket int
	must(w.t, w.Router.Do(func() error {
		link, err := net.InterfaceByName("gateway")
		if err != nil {
			return err
		}
		all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all)); err != nil {
			return err
		}
		return unix.Bind(socket, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index})
	}))
	file := os.NewFile(uintptr(socket), "packets at the router")
	r := &recorder{known: make(map[string]bool)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		packet := make([]byte, 1<<16)
		for {
			n, err := file.Read(packet)
			if err != nil {
				return
			}
			r.see(packet[:n])
		}
	}()
	w.t.Cleanup(func() {
		file.Close()
		<-ended
	})
	return r
}

// see counts a TCP or UDP packet if its destination is one of the origin's networks.
func (r *recorder) see(packet []byte) {
	const header4, header6 = 20, 40 // RFC 791 section 3.1, RFC 8200 section 3: both addresses are the last of them
	var addresses, ports []byte
	var protocol byte
	switch {
	case len(packet) >= header4+4 && packet[0]>>4 == 4:
		protocol, addresses, ports = packet[9], packet[header4-8:header4], packet[header4:header4+4]
	case len(packet) >= header6+4 && packet[0]>>4 == 6:
		protocol, addresses, ports = packet[6], packet[header6-32:header6], packet[header6:header6+4]
	}
	if protocol != unix.IPPROTO_TCP && protocol != unix.IPPROTO_UDP {
		return // such as an ICMP error about an answer that came too late
	}
	destination, _ := netip.AddrFromSlice(addresses[len(addresses)/2:])
	if !slices.ContainsFunc(originNetworks, func(network netip.Prefix) bool { return network.Contains(destination) }) {
		return
	}
	flow := string(addresses) + string(ports)
	r.mutex.Lock()
	defer r.mutex.Unlock()
	switch {
	case !r.closed:
		r.known[flow] = true
		r.passed++
	case !r.known[flow]:
		r.leaked = append(r.leaked, fmt.Sprintf("protocol %d to %v: % x", protocol, destination, packet[:min(len(packet), 80)]))
	}
}

var originNetworks = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:3::/48")}

// keepOpening opens flows from a host all along, TCP and UDP, over both families, until
// the test ends.
func keepOpening(t *testing.T, from *netns.NS) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	open := func(network string, address netip.Addr, port uint16) {
		for ; ctx.Err() == nil; time.Sleep(2 * time.Millisecond) {
			attempt, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			conn, err := from.Dial(attempt, network, netip.AddrPortFrom(address, port).String())
			cancel()
			if err != nil {
				continue
			}
			// A DNS query for a.public.test, or what may be anything else.
			conn.Write([]byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x06public\x04test\x00\x00\x01\x00\x01"))
			time.Sleep(time.Millisecond)
			conn.Close()
		}
	}
	for i, address := range both {
		for _, port := range []uint16{22, 80, 443} {
			running.Go(func() { open("tcp", address, port) })
		}
		running.Go(func() { open("udp", address, 443) })
		running.Go(func() { open("udp", anywhere[i], 53) })
		running.Go(func() { open("tcp", anywhere[i], 53) })
	}
	t.Cleanup(func() {
		stop()
		running.Wait()
	})
}

// guard runs the command of that name.
func (w *world) guard(arguments ...string) {
	w.t.Helper()
	if output, err := w.run(program(append([]string{"guard"}, arguments...)...)); err != nil || output != "" {
		w.t.Fatalf("guard: %v: %s", err, output)
	}
}

// TestNothingLeaks: from `guard` to cleanup, whatever is started, stopped or killed in
// between, no packet passes of flows that are opened all along.
func TestNothingLeaks(t *testing.T) {
	const dwell = 150 * time.Millisecond // some 100 attempts
	for _, output := range []bool{false, true} {
		t.Run(fmt.Sprintf("output=%v", output), func(t *testing.T) {
			w := newDNSWorld(t)
			flags := []string{"--interface", "lan0", "--public-dns", public4.String(), "--drain-timeout", "100ms"}
			from := w.Client
			if output {
				flags, from = append(flags, "--output"), w.Gateway
			}
			closed := append([]string{"--fail", "closed"}, flags...)
			r := w.record()
			keepOpening(t, from)
			if !within(5*time.Second, func() bool { passed, _ := r.counts(); return passed > 50 }) {
				t.Fatal("flows are not opened, or not seen: the test is blind")
			}
			w.guard(append(flags, "--upstream", upstream())...)
			time.Sleep(50 * time.Millisecond) // for what was on its way
			r.close()
			carried := len(w.proxy.Targets())
			stays := func(step string) {
				t.Helper()
				time.Sleep(dwell)
				if _, leaked := r.counts(); len(leaked) > 0 {
					t.Fatalf("%s: %d packets leaked, the first: %s", step, len(leaked), leaked[0])
				}
			}
			stays("guard")
			g := w.gateway(closed...)
			stays("start")
			if len(w.proxy.Targets()) == carried {
				t.Error("a started gateway carries nothing")
			}
			g.stop()
			stays("stop")
			w.gateway(closed...).kill()
			stays("kill")
			w.guard(flags...)
			stays("guard once more")
			g = w.gateway(closed...)
			stays("start after a kill")
			w.guard(flags...)
			stays("guard beside a running gateway")
			for i := range 3 {
				g.stop()
				g = w.gateway(closed...)
				stays(fmt.Sprint("restart ", i))
				g.kill()
				g = w.gateway(closed...)
				stays(fmt.Sprint("kill and restart ", i))
			}
			g.stop()
			stays("the last stop")
			w.cleanUp()
			if !within(5*time.Second, func() bool { _, leaked := r.counts(); return len(leaked) > 0 }) {
				t.Error("after cleanup nothing passes")
			}
		})
	}
}

// TestGuardBeforeTheNetwork: neither the interface nor its addresses are there yet.
func TestGuardBeforeTheNetwork(t *testing.T) {
	w := newWorld(t)
	w.guard("--interface", "late0")
	if body, err := w.get("http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("another interface: %q, %v", body, err)
	}
	late, err := netns.New()
	must(t, err)
	t.Cleanup(func() { late.Close() })
	must(t,
		netns.Connect(late, "eth0", w.Gateway, "late0"),
		late.Addr("eth0", "192.0.3.2/24", "2001:db8:4::2/64"),
		w.Gateway.Addr("late0", "192.0.3.1/24", "2001:db8:4::1/64"),
		late.Route("0.0.0.0/0", "192.0.3.1"), late.Route("::/0", "2001:db8:4::1"),
		w.Router.Route("192.0.3.0/24", lab.Uplink4.String()), w.Router.Route("2001:db8:4::/64", lab.Uplink6.String()),
	)
	for _, address := range both {
		if _, err := banner(t, late, address, 22); err == nil || !strings.Contains(err.Error(), syscall.ECONNREFUSED.Error()) {
			t.Errorf("%s: %v, want: refused", address, err)
		}
	}
	// What is not to be captured passes, and the host's own services are reached.
	conn, err := late.Dial(t.Context(), "tcp", netip.AddrPortFrom(lab.Origin4, lab.PortEcho).String())
	if err != nil {
		t.Errorf("a port that is not captured: %v", err)
	} else {
		conn.Close()
	}
	listener, err := w.Gateway.Listen("tcp", "[::]:443")
	must(t, err)
	defer listener.Close()
	for _, own := range []string{"192.0.3.1:443", "[2001:db8:4::1]:443", "[" + lab.Uplink6.String() + "]:443"} {
		conn, err := late.Dial(t.Context(), "tcp", own)
		if err != nil {
			t.Errorf("the host's own service at %s: %v", own, err)
			continue
		}
		conn.Close()
	}
	g := w.gateway("--interface", "late0", "--fail", "closed")
	for _, address := range both {
		if got, err := banner(t, late, address, 22); got != lab.Banner || len(w.direct.Sources()) > 2 {
			t.Errorf("with the program: %q, %v, %v", got, err, w.direct.Sources())
		}
	}
	g.stop()
	// A network that came later than the program is not forwarded either.
	must(t, late.Addr("eth0", "192.0.4.2/24"), w.Gateway.Addr("late0", "192.0.4.1/24"), w.Router.Route("192.0.4.0/24", lab.Uplink4.String()))
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("192.0.4.2")}, Timeout: time.Second}
	must(t, late.Do(func() error {
		conn, err := dialer.Dial("tcp", netip.AddrPortFrom(lab.Origin4, 22).String())
		if err == nil {
			conn.Close()
			t.Error("after the stop a new network passes")
		}
		return nil
	}))
	w.cleanUp()
	if got, err := banner(t, late, lab.Origin4, 22); got != lab.Banner {
		t.Errorf("after cleanup: %q, %v", got, err)
	}
}

// TestGuardIsTakenAway by a run that is to be open, which says so.
func TestGuardIsTakenAway(t *testing.T) {
	w := newWorld(t)
	w.guard()
	if body, err := w.get("http://origin.test/"); err == nil {
		t.Errorf("guarded: %q", body)
	}
	g := w.gateway()
	g.waitFor("--fail closed keeps it")
	g.stop()
	if body, err := w.get("http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("after a run with --fail open: %q, %v", body, err)
	}
}

// TestGuardOfOthers: what a guard with more flags had does not outlive the next one, or
// a run that takes it over.
func TestGuardOfOthers(t *testing.T) {
	w := newWorld(t)
	served := http.Server{Handler: http.NotFoundHandler()}
	listener, err := w.Gateway.Listen("tcp", "[::]:80")
	must(t, err)
	go served.Serve(listener)
	t.Cleanup(func() { served.Close() })

	w.guard("--output", "--public-dns", "203.0.113.50", "--udp", "other=drop")
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err == nil {
		t.Errorf("the host's own: %q", body)
	}
	if _, err := w.fetch(w.Gateway, "http://"+lab.Uplink4.String()+"/"); err != nil {
		t.Errorf("a service of the host's own, asked by itself: %v", err)
	}
	w.guard()
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("the host's own after a guard of clients alone: %q, %v", body, err)
	}
	w.guard("--output")
	g := w.gateway("--fail", "closed")
	if body, err := w.fetch(w.Gateway, "http://origin.test/"); err != nil || !strings.HasPrefix(body, "direct ") {
		t.Errorf("the host's own beside a run without --output: %q, %v", body, err)
	}
	g.stop()
}

// TestGuardMistakes: each is one line that names what to do.
func TestGuardMistakes(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		arguments, names []string
	}{
		{[]string{"--explicit-proxy-only"}, []string{"--explicit-proxy-only", "nothing to guard"}},
		{[]string{"--disable-iptables"}, []string{"--disable-iptables", "rules --fail closed"}},
		{[]string{"--nft-table", "a b"}, []string{"--nft-table", "a b"}},
		{[]string{"--interface", "lo"}, []string{"lo", "--interface"}},
	} {
		output, err := w.run(program(append([]string{"guard"}, test.arguments...)...))
		if err == nil {
			t.Errorf("%v: it succeeded", test.arguments)
		}
		wantOneLine(t, output, test.names...)
	}
	w.gateway()
	output, err := w.run(program("guard"))
	if err == nil {
		t.Error("beside a run that is open it succeeded")
	}
	wantOneLine(t, output, "--fail closed", "transproxy")
	empty, err := netns.New()
	must(t, err)
	defer empty.Close()
	command := program("guard")
	var text []byte
	must(t, empty.Do(func() error {
		text, err = command.CombinedOutput()
		return nil
	}))
	if err == nil {
		t.Error("without an interface it succeeded")
	}
	wantOneLine(t, string(text), "--interface")
}

// TestStraySegments: what is sent in the middle of a flow that nobody knows, such as the
// rest of one that was cut, does not pass a closed gateway.
func TestStraySegments(t *testing.T) {
	for _, row := range []struct {
		flags  []string
		passes bool
	}{
		{[]string{"--fail", "open", "--output"}, true},
		{[]string{"--fail", "closed", "--output"}, false},
	} {
		t.Run(row.flags[1], func(t *testing.T) {
			w := newWorld(t)
			w.gateway(row.flags...)
			r := w.record()
			r.close()
			const push, none = 0x18, 0x00
			for from, source := range map[*netns.NS]netip.Addr{w.Client: lab.Client4, w.Gateway: lab.Uplink4} {
				for _, flags := range []byte{push, none} {
					if from == w.Gateway && flags == push {
						continue // captured, as the first packet of a flow is
					}
					sendSegment(t, from, source, flags)
				}
			}
			time.Sleep(100 * time.Millisecond)
			if _, leaked := r.counts(); len(leaked) > 0 != row.passes {
				t.Errorf("%q passed", leaked)
			}
		})
	}
}

// sendSegment sends four bytes to the origin's port 80 as if there were a connection.
func sendSegment(t *testing.T, from *netns.NS, source netip.Addr, flags byte) {
	t.Helper()
	segment := []byte{0x9c, 0x40, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0, 'l', 'e', 'a', 'k'}
	pseudo := slices.Concat(source.AsSlice(), lab.Origin4.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(segment))}, segment)
	var sum uint32 // RFC 1071
	for i := 0; i < len(pseudo); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(pseudo[i:]))
	}
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(segment[16:], ^uint16(sum))
	must(t, from.Do(func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		return unix.Sendto(socket, segment, 0, &unix.SockaddrInet4{Addr: lab.Origin4.As4()})
	}))
}
