package netfilter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
	"golang.org/x/sys/unix"
)

// maxDatagram is the most that is sent here, in bytes: three fragments.
const maxDatagram = 3500

// newDNSLab is a lab with DNS servers on all hosts but the router; that of the gateway holds port 53 without SO_REUSEADDR.
func newDNSLab(t *testing.T) *lab {
	t.Helper()
	l := newLab(t)
	for _, setting := range []struct {
		ns         *netns.NS
		key, value string
	}{
		// Each error is to be heard, however many there are.
		{l.gateway, "net.ipv4.icmp_ratelimit", "0"},
		{l.gateway, "net.ipv6.icmp.ratelimit", "0"},
		// The origin answers from addresses that it has by routes alone.
		{l.origin, "net.ipv6.ip_nonlocal_bind", "1"},
	} {
		if err := setting.ns.Sysctl(setting.key, setting.value); err != nil {
			t.Fatal(err)
		}
	}
	for name, ns := range map[string]*netns.NS{"origin": l.origin, "gateway": l.gateway, "client": l.client} {
		serve(t, ns, "[::]:53", name)
		for _, port := range []string{"53", "5000"} {
			serveUDP(t, ns, "0.0.0.0:"+port, name)
			serveUDP(t, ns, "[::]:"+port, name)
		}
	}
	return l
}

// captureDNS starts the transparent listeners, and returns what closes those for DNS.
func (l *lab) captureDNS() (stop func()) {
	l.t.Helper()
	l.capture()
	var closers []func() error
	for _, address := range dnsConfig().DNS.Listen {
		closers = append(closers, serve(l.t, l.gateway, address.String(), "dns").Close,
			serveUDP(l.t, l.gateway, address.String(), "dns").Close)
	}
	return func() {
		l.t.Helper()
		for _, closer := range closers {
			if err := closer(); err != nil {
				l.t.Fatal(err)
			}
		}
	}
}

// datagrams is a UDP socket that answers from the address that was asked.
type datagrams struct{ *net.UDPConn }

// listenUDP opens the socket; one that is named dns is what the program's are.
func listenUDP(t *testing.T, ns *netns.NS, address, name string) datagrams {
	t.Helper()
	network, level, option := "udp4", unix.SOL_IP, unix.IP_RECVORIGDSTADDR
	if strings.HasPrefix(address, "[") {
		network, level, option = "udp6", unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR
	}
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if name == "dns" {
			err = setTransparent(raw, address)
		}
		return errors.Join(err, raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), level, option, 1)
			if name == "dns" {
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(testConfig().Exempt)))
			}
		}), err)
	}}
	var conn net.PacketConn
	if err := ns.Do(func() (err error) {
		conn, err = config.ListenPacket(context.Background(), network, address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return datagrams{conn.(*net.UDPConn)}
}

// receive returns a datagram, who sent it, and the destination that it had on the wire.
func (d datagrams) receive() (datagram []byte, from, asked netip.AddrPort, err error) {
	datagram = make([]byte, maxDatagram)
	control := make([]byte, 128)
	n, controlled, _, from, err := d.ReadMsgUDPAddrPort(datagram, control)
	if err != nil {
		return nil, from, asked, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:controlled])
	if err != nil {
		return nil, from, asked, err
	}
	for _, message := range messages {
		address, err := unix.ParseOrigDstAddr(&message)
		if err != nil {
			return nil, from, asked, err
		}
		switch address := address.(type) {
		case *unix.SockaddrInet4:
			asked = netip.AddrPortFrom(netip.AddrFrom4(address.Addr), uint16(address.Port))
		case *unix.SockaddrInet6:
			asked = netip.AddrPortFrom(netip.AddrFrom16(address.Addr), uint16(address.Port))
		}
	}
	return datagram[:n], from, asked, nil
}

// answer sends from the address asked or, if that is a group's, from one of the host's own.
func (d datagrams) answer(datagram []byte, to, asked netip.AddrPort) error {
	var source []byte
	switch address := asked.Addr(); {
	case address.IsMulticast() || address == netip.MustParseAddr("10.2.0.255"):
	case address.Is4():
		source = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: address.As4()})
	default:
		source = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: address.As16()})
	}
	_, _, err := d.WriteMsgUDPAddrPort(datagram, source, to)
	return err
}

// serveUDP answers each datagram with the name and the address that was asked, filled up to as many bytes as the datagram
// asks for.
func serveUDP(t *testing.T, ns *netns.NS, address, name string) datagrams {
	t.Helper()
	socket := listenUDP(t, ns, address, name)
	go func() {
		for {
			datagram, from, asked, err := socket.receive()
			if err != nil {
				return
			}
			answer := fmt.Appendf(nil, "%s %s\n", name, asked)
			if size, err := strconv.Atoi(string(bytes.TrimSpace(datagram))); err == nil && size > len(answer) {
				answer = append(answer, bytes.Repeat([]byte{'.'}, size-len(answer))...)
			}
			_ = socket.answer(answer, from, asked) // the client says what it did not get
		}
	}()
	return socket
}

// ask sends a datagram of size bytes, and returns who answers as many: dns, origin, gateway or client if that was asked at
// the address, else what went wrong.
func (l *lab) ask(from *netns.NS, address string, size int) string {
	conn, err := from.Dial(context.Background(), "udp", address)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	return asked(conn, address, size)
}

// asked is ask by a connected socket, which hears the address alone that it asked. (A failure to send tells of an earlier
// ICMP error.)
func asked(conn net.Conn, address string, size int) string {
	_ = conn.SetDeadline(time.Now().Add(2 * time.Second))
	query := bytes.Repeat([]byte{' '}, size)
	copy(query, strconv.Itoa(size))
	answer := make([]byte, maxDatagram+1)
	_, err := conn.Write(query)
	if err == nil {
		var n int
		n, err = conn.Read(answer)
		answer = answer[:n]
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "silence"
	case errors.Is(err, unix.ECONNREFUSED):
		return "unreachable"
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EHOSTUNREACH): // what IPv6 and IPv4 make of the ICMP error
		return "prohibited"
	case err != nil:
		return err.Error()
	case len(answer) != size:
		return fmt.Sprintf("%d bytes of %d", len(answer), size)
	}
	line, _, _ := strings.Cut(string(answer), "\n")
	name, where, _ := strings.Cut(line, " ")
	if where != address {
		return line
	}
	return name
}

func (l *lab) wantUDP(from *netns.NS, address, want string) {
	l.t.Helper()
	for _, size := range []int{64, maxDatagram} {
		if got := l.ask(from, address, size); got != want {
			l.t.Errorf("%s was asked with %d bytes and answered: %s; want %s", address, size, got, want)
		}
	}
}
