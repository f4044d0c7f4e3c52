package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	associateIPv4 = "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"
	associateIPv6 = "\x05\x03\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

// TestAssociateConversation: what is said and heard, however the stream is cut.
func TestAssociateConversation(t *testing.T) {
	const peer = "198.51.100.10"
	unspecified := "\x05\x00\x00\x01\x00\x00\x00\x00\x04\x38"
	for _, test := range []struct {
		name, proxy, peer string
		legs              []leg
		relay             string
		code              int
		says              string
	}{
		{name: "password", proxy: socks5Proxy, legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x01\x00"}, {associateIPv4, socks5Granted}}, relay: "192.0.2.1:1080"},
		{name: "open", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, socks5Granted}}, relay: "192.0.2.1:1080"},
		{name: "over IPv6", peer: "2001:db8::10", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv6, socks5Granted}}, relay: "192.0.2.1:1080"},
		{name: "its own address", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, unspecified}}, relay: peer + ":1080"},
		{name: "its own address, which is IPv6", peer: "fe80::10%eth0", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv6, unspecified}}, relay: "[fe80::10%eth0]:1080"},
		{name: "none in IPv6", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x04" + strings.Repeat("\x00", 16) + "\x04\x38"}}, relay: peer + ":1080"},
		{name: "mapped", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x04" + strings.Repeat("\x00", 10) + "\xff\xff\xc0\x00\x02\x01\x04\x38"}}, relay: "192.0.2.1:1080"},
		{name: "address in writing", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x03\x09192.0.2.1\x04\x38"}}, relay: "192.0.2.1:1080"},
		{name: "loopback of a proxy there", peer: "127.0.0.1", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\x7f\x00\x00\x02\x04\x38"}}, relay: "127.0.0.2:1080"},

		{name: "name", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x03\x05relay\x04\x38"}}, says: `the name "relay"`},
		{name: "no port", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\xc0\x00\x02\x01\x00\x00"}}, says: "192.0.2.1:0"},
		{name: "loopback", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38"}}, says: "127.0.0.1:1080"},
		{name: "group", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\xe0\x00\x00\x01\x04\x38"}}, says: "224.0.0.1:1080"},
		{name: "everybody", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\xff\xff\xff\xff\x04\x38"}}, says: "255.255.255.255:1080"},
		{name: "link-local", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x00\x00\x01\xa9\xfe\xa9\xfe\x04\x38"}}, says: "169.254.169.254:1080"},

		{name: "not supported", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x07\x00\x01"}}, code: 7, says: "UDP ASSOCIATE enabled"},
		{name: "not allowed", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x02\x00\x01"}}, code: 2, says: "UDP ASSOCIATE allowed"},
		{name: "failure", legs: []leg{{socks5OfferNone, "\x05\x00"}, {associateIPv4, "\x05\x01\x00\x01"}}, code: 1, says: "own log"},
		{name: "wrong password", proxy: socks5Proxy, legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x01\x01"}}, code: 1, says: "refuses the user name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.proxy == "" {
				test.proxy = socks5Open
			}
			if test.peer == "" {
				test.peer = peer
			}
			s := script{legs: test.legs}
			stream := s.stream()
			for cut := range len(stream) + 1 {
				proxy := parse(t, test.proxy)
				lease, err := proxy.Acquire(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				address := netip.MustParseAddr(test.peer)
				handshake := upstream.NewAssociating(proxy, address.Is6(), lease)
				said, done, err := converse(handshake, stream[:cut], stream[cut:])
				var relay netip.AddrPort
				if err == nil && done {
					relay, err = handshake.Relay(address)
				}
				var refused *upstream.RefusedError
				errors.As(err, &refused)
				switch {
				case said != s.heard() && (test.code == 0 || !strings.HasPrefix(s.heard(), said)):
					t.Fatalf("cut at %d: the proxy is told\n     %q\nwant %q", cut, said, s.heard())
				case test.relay != "" && (err != nil || relay.String() != test.relay):
					t.Fatalf("cut at %d: %s, %v", cut, relay, err)
				case test.relay == "" && (err == nil || !strings.Contains(err.Error(), test.says)):
					t.Fatalf("cut at %d: %s, %v", cut, relay, err)
				case test.code != 0 && (refused == nil || refused.Code != test.code):
					t.Fatalf("cut at %d: %v", cut, err)
				}
			}
		})
	}
}

// converse says hello and gives the pieces of an answer to a handshake.
func converse(h upstream.Handshake, pieces ...string) (said string, done bool, err error) {
	said = string(h.Hello())
	for _, piece := range pieces {
		if done || piece == "" {
			continue
		}
		var out []byte
		out, _, done, err = h.Feed([]byte(piece))
		said += string(out)
		if err != nil {
			return said, done, err
		}
	}
	return said, done, nil
}

// TestAssociate opens one at a real socket, which stays open.
func TestAssociate(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	closed := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			closed <- err
			return
		}
		defer conn.Close()
		io.ReadFull(conn, make([]byte, len(socks5OfferNone)))
		io.WriteString(conn, "\x05\x00")
		io.ReadFull(conn, make([]byte, len(associateIPv4)))
		io.WriteString(conn, "\x05\x00\x00\x01\x00\x00\x00\x00\x04\x38")
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		closed <- err
	}()
	d := &upstream.Dialer{ConnectTimeout: time.Second, HandshakeTimeout: time.Second}
	association, err := d.Associate(t.Context(), parse(t, "socks5://"+listener.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	if association.Relay.String() != "127.0.0.1:1080" {
		t.Errorf("it relays at %s", association.Relay)
	}
	association.Conn.Close()
	if err := <-closed; err != io.EOF {
		t.Errorf("the connection ended by %v", err)
	}

	if _, err := d.Associate(t.Context(), parse(t, "http://127.0.0.1:1")); err == nil || !strings.Contains(err.Error(), "socks5://host:port") {
		t.Errorf("through an HTTP proxy: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Associate(ctx, parse(t, "socks5://"+listener.Addr().String())); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestDatagramHeader(t *testing.T) {
	for _, test := range []struct{ to, want string }{
		{"192.0.2.1:443", "\x00\x00\x00\x01\xc0\x00\x02\x01\x01\xbb"},
		{"[::ffff:192.0.2.1]:443", "\x00\x00\x00\x01\xc0\x00\x02\x01\x01\xbb"},
		{"[2001:db8::1]:53", "\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x35"},
	} {
		to := netip.MustParseAddrPort(test.to)
		if got := upstream.AppendDatagramHeader(nil, to); string(got) != test.want {
			t.Errorf("%s: %q", to, got)
		}
		if got, err := upstream.AppendDatagramTarget(nil, upstream.Target{Host: to.Addr().String(), Port: to.Port()}); string(got) != test.want || err != nil {
			t.Errorf("%s in writing: %q, %v", to, got, err)
		}
	}
	if got, err := upstream.AppendDatagramTarget([]byte("x"), upstream.Target{Host: "example.org", Port: 443}); string(got) != "x\x00\x00\x00\x03\x0bexample.org\x01\xbb" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	longest := strings.Repeat(strings.Repeat("a", 62)+".", 4) + "a."
	if got, err := upstream.AppendDatagramTarget(nil, upstream.Target{Host: longest, Port: 1}); len(got) > upstream.MaxDatagramHeader || err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for _, host := range []string{"", "a\nb", "1.2.3.4.5", "fe80::1%eth0", longest + "b"} {
		if got, err := upstream.AppendDatagramTarget(nil, upstream.Target{Host: host, Port: 1}); err == nil {
			t.Errorf("%q: %q", host, got)
		}
	}
}

func TestDatagramWithoutAllocation(t *testing.T) {
	to, buffer := netip.MustParseAddrPort("[2001:db8::1]:53"), make([]byte, 0, upstream.MaxDatagramHeader)
	relayed := upstream.AppendDatagramHeader(nil, to)
	if n := testing.AllocsPerRun(100, func() {
		buffer = upstream.AppendDatagramHeader(buffer[:0], to)
		if _, err := upstream.ParseDatagram(relayed); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzDatagram: no panic, and what is parsed is what a header says, byte for byte.
func FuzzDatagram(f *testing.F) {
	for _, seed := range []string{
		"", "\x00\x00\x00", "\x00\x00\x00\x01\xc0\x00\x02\x01\x01\xbbpayload", "\x00\x00\x01\x01\xc0\x00\x02\x01\x01\xbb",
		"\x00\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x35", "\x00\x00\x00\x03\x0bexample.org\x01\xbbx",
		"\x00\x00\x00\x03\x00\x01\xbb", "\x00\x00\x00\x03\xff", "\x00\x00\x00\x02",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, datagram []byte) {
		d, err := upstream.ParseDatagram(datagram)
		switch {
		case err != nil && err != upstream.ErrDatagram && err != upstream.ErrFragment:
			t.Fatal(err)
		case err != nil:
			if (err == upstream.ErrFragment) != (len(datagram) > 3 && datagram[2] != 0) {
				t.Fatalf("%q: %v", datagram, err)
			}
			return
		case d.Name != nil:
			again := fmt.Appendf(nil, "%s\x03%c", datagram[:3], 0)
			again[4] = byte(len(d.Name))
			again = append(append(again, d.Name...), byte(d.From.Port()>>8), byte(d.From.Port()))
			if again = append(again, d.Payload...); !bytes.Equal(again, datagram) {
				t.Fatalf("%q and not %q", again, datagram)
			}
			return
		}
		again := append(upstream.AppendDatagramHeader(nil, d.From), d.Payload...)
		if mapped := len(again) < len(datagram); mapped {
			return // an IPv4 address in the form of IPv6
		}
		if copy(again, datagram[:2]); !bytes.Equal(again, datagram) {
			t.Fatalf("%q and not %q", again, datagram)
		}
	})
}

// FuzzAssociateReply: no panic, the same end however the bytes are cut, and no relay where
// none can be.
func FuzzAssociateReply(f *testing.F) {
	for _, seed := range []string{socks5Granted, "\x05\x07\x00\x01", "\x05\x00\x00\x03\x09192.0.2.1\x04\x38", "\x05\x00\x00\x04" + strings.Repeat("\x00", 18)} {
		f.Add([]byte("\x05\x00"+seed), uint16(5))
	}
	peer := netip.MustParseAddr("198.51.100.10")
	f.Fuzz(func(t *testing.T, reply []byte, cut uint16) {
		end := func(pieces ...string) string {
			handshake := upstream.NewAssociating(parse(t, socks5Open), false, nil)
			said, done, err := converse(handshake, pieces...)
			if err != nil {
				return err.Error() // what was to be said with it is not
			}
			if !done {
				return said
			}
			relay, err := handshake.Relay(peer)
			if err == nil && (relay.Port() == 0 || !relay.IsValid() || relay.Addr().IsLoopback() || relay.Addr().IsMulticast() || relay.Addr().IsUnspecified()) {
				t.Fatalf("it relays at %s", relay)
			}
			return fmt.Sprint(said, relay, err)
		}
		at := min(int(cut), len(reply))
		if one, two := end(string(reply)), end(string(reply[:at]), string(reply[at:])); one != two {
			t.Fatalf("whole: %s\ncut:   %s", one, two)
		}
	})
}

// TestAssociateVia: the first that grants one is taken, whoever refuses.
func TestAssociateVia(t *testing.T) {
	serve := func(reply string) *upstream.Proxy {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			io.ReadFull(conn, make([]byte, len(socks5OfferNone)))
			io.WriteString(conn, "\x05\x00")
			io.ReadFull(conn, make([]byte, len(associateIPv4)))
			io.WriteString(conn, reply)
		}()
		t.Cleanup(func() {
			listener.Close()
			<-ended
		})
		return parse(t, "socks5://"+listener.Addr().String())
	}
	d := &upstream.Dialer{ConnectTimeout: time.Second, HandshakeTimeout: time.Second}
	second := serve(socks5Granted)
	association, err := d.AssociateVia(t.Context(), []*upstream.Proxy{
		parse(t, "http://127.0.0.1:1"), serve("\x05\x07\x00\x01"), second, serve(socks5Granted),
	})
	if err != nil || association.Proxy != second {
		t.Fatalf("%+v, %v", association, err)
	}
	association.Conn.Close()
	var refused *upstream.RefusedError
	if _, err := d.AssociateVia(t.Context(), []*upstream.Proxy{serve("\x05\x07\x00\x01")}); !errors.As(err, &refused) || refused.Code != upstream.CommandNotSupported {
		t.Errorf("%v", err)
	}
	if _, err := d.AssociateVia(t.Context(), nil); err != upstream.ErrAllDown {
		t.Errorf("%v", err)
	}
}
