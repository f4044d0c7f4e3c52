package test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// What becomes of a datagram.
const (
	passes  = "passes"
	refused = "is refused"
	dropped = "is dropped"
)

// TestUDP sends datagrams of a client past the gateway.
func TestUDP(t *testing.T) {
	for _, row := range []struct {
		flags []string
		fates map[int]string
	}{
		{nil, map[int]string{443: refused, 123: passes, 53: passes}},
		{[]string{"--fail", "closed"}, map[int]string{443: refused, 123: passes}},
		{[]string{"--udp", "443=direct"}, map[int]string{443: passes, 123: passes}},
		{[]string{"--udp", "443=drop,8000-8100=reject"}, map[int]string{443: dropped, 8050: refused, 123: passes}},
		{[]string{"--udp", "other=drop,123=direct"}, map[int]string{443: refused, 8050: dropped, 123: passes, 53: passes}},
		{[]string{"--no-proxy", "203.0.113.0/24,2001:db8:3::/64"}, map[int]string{443: passes}},
		{[]string{"--private-dns", "198.51.100.99"}, map[int]string{443: refused, 123: passes}},
	} {
		t.Run(fmt.Sprint(row.flags), func(t *testing.T) {
			w := newWorld(t)
			g := w.gateway(row.flags...)
			for _, address := range both {
				for port, want := range row.fates {
					if got := w.fate(address, port); got != want {
						t.Errorf("UDP to %s port %d %s, want: it %s", address, port, got, want)
					}
				}
			}
			g.stop()
			if got := w.fate(lab.Origin4, 443); got != passes {
				t.Errorf("after the stop UDP to port 443 %s", got)
			}
		})
	}
}

// TestUDPOfNeighbours is left alone whatever the port: with bridge-nf-call-iptables the
// rules see it.
func TestUDPOfNeighbours(t *testing.T) {
	w := newWorld(t)
	w.gateway("--udp", "other=reject")
	var server net.PacketConn
	must(t, w.Server.Do(func() (err error) {
		server, err = net.ListenPacket("udp", ":443")
		return err
	}))
	defer server.Close()
	client, err := w.Client.Dial(t.Context(), "udp", netip.AddrPortFrom(lab.Server4, 443).String())
	must(t, err)
	defer client.Close()
	_, err = client.Write([]byte("hello"))
	must(t, err, server.SetReadDeadline(time.Now().Add(2*time.Second)))
	if _, _, err := server.ReadFrom(make([]byte, 10)); err != nil {
		t.Error(err)
	}
}

// fate sends a datagram from the client to an address behind the router.
func (w *world) fate(address netip.Addr, port int) string {
	w.t.Helper()
	var server net.PacketConn
	must(w.t, w.Router.Do(func() (err error) {
		server, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	}))
	defer server.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), 3*time.Second)
	defer cancel()
	client, err := w.Client.Dial(ctx, "udp", netip.AddrPortFrom(address, uint16(port)).String())
	must(w.t, err)
	defer client.Close()
	_, err = client.Write([]byte("hello"))
	must(w.t, err)
	must(w.t, client.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	_, err = client.Read(make([]byte, 10))
	must(w.t, server.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	_, _, arrival := server.ReadFrom(make([]byte, 10))
	switch {
	case arrival == nil:
		return passes
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, os.ErrDeadlineExceeded):
		return dropped
	}
	return fmt.Sprint("ends in ", err)
}
