package upstream_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	netproxy "golang.org/x/net/proxy"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// The proxies of the scripts, and what they are told.
const (
	socks5Proxy = "socks5://us%20er:p%40ss@proxy"
	socks5Open  = "socks5://proxy"

	socks5Offer     = "\x05\x02\x00\x02"
	socks5OfferNone = "\x05\x01\x00"
	socks5Password  = "\x01\x05us er\x04p@ss"
	socks5Request   = "\x05\x01\x00\x03\x0bexample.org\x01\xbb"

	socks5Granted = "\x05\x00\x00\x01\xc0\x00\x02\x01\x04\x38"
)

// socks5Scripts are conversations with SOCKS5 proxies.
func socks5Scripts() []script {
	// What the proxy says to the methods, to the password and to the request.
	signedIn := func(reply string) []leg {
		return []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x01\x00"}, {socks5Request, reply}}
	}
	unasked := func(reply string) []leg { return []leg{{socks5Offer, "\x05\x00"}, {socks5Request, reply}} }
	open := func(reply string) []leg { return []leg{{socks5OfferNone, "\x05\x00"}, {socks5Request, reply}} }
	long := strings.Repeat("x", 255)

	scripts := []script{
		{name: "password", legs: signedIn(socks5Granted), after: isAccepted},
		{name: "password and early bytes", legs: signedIn(socks5Granted + "SSH-2.0-OpenSSH\r\n"), rest: "SSH-2.0-OpenSSH\r\n", after: isAccepted},
		{name: "password not asked for", legs: unasked(socks5Granted + "early"), rest: "early", after: isNotNeeded},
		{name: "no password", legs: open(socks5Granted + "early"), rest: "early"},
		{name: "early bytes like a reply", legs: open(socks5Granted + socks5Granted), rest: socks5Granted},
		{name: "bound to IPv6", legs: open("\x05\x00\x00\x04" + long[:16] + "\x04\x38early"), rest: "early"},
		{name: "bound to a name", legs: open("\x05\x00\x00\x03\x0bexample.org\x04\x38early"), rest: "early"},
		{name: "bound to the longest name", legs: open("\x05\x00\x00\x03\xff" + long + "\x04\x38early"), rest: "early"},
		{name: "bound to no name", legs: open("\x05\x00\x00\x03\x00\x04\x38early"), rest: "early"},
		{name: "reserved octet", legs: open("\x05\x00\xff" + socks5Granted[3:] + "early"), rest: "early"},
		{name: "other version of the verdict", legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x05\x00"}, {socks5Request, socks5Granted}}, after: isAccepted},

		{
			name: "password refused", legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x01\x01"}},
			refused: 1, reason: "Authentication failure", denied: true, says: "refuses the user name or the password", after: isRefused,
		},
		{
			name: "password refused in another version", legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x05\xff"}},
			refused: 255, reason: "Authentication failure", denied: true, says: "socks5://user:password@host:port", after: isRefused,
		},
		{
			name: "password and methods refused", legs: []leg{{socks5Offer, "\x05\xff"}},
			refused: 255, reason: "No acceptable methods", says: "neither a user name and a password nor", after: isUnknown,
		},
		{
			name: "password wanted", proxy: socks5Open, legs: []leg{{socks5OfferNone, "\x05\xff"}},
			refused: 255, reason: "No acceptable methods", says: "give a user name and a password as socks5://user:password@host:port",
		},
		// What was said about the password counts, whatever becomes of the request.
		{name: "password, then no tunnel", legs: signedIn("\x05\x05\x00\x01" + long[:6]), refused: 5, reason: "Connection refused", says: "port and state", after: isAccepted},
		{name: "unasked, then no tunnel", legs: unasked("\x05\x02\x00\x01" + long[:6]), refused: 2, reason: "Connection not allowed by ruleset", says: "no_proxy", after: isNotNeeded},
		{name: "password, then the end", legs: signedIn(""), incomplete: true, after: isAccepted},

		{name: "failure", legs: open("\x05\x01\x00\x01" + long[:6]), refused: 1, reason: "General SOCKS server failure", says: "does not say why"},
		{name: "not allowed", legs: open("\x05\x02\x00\x01" + long[:6]), refused: 2, reason: "Connection not allowed by ruleset", says: "forbids this destination or port"},
		{name: "no network", legs: open("\x05\x03\x00\x01" + long[:6]), refused: 3, reason: "Network unreachable", says: "cannot reach the destination"},
		{name: "no host", legs: open("\x05\x04\x00\x04" + long[:18]), refused: 4, reason: "Host unreachable", says: "cannot reach the destination"},
		{name: "refused", legs: open("\x05\x05\x00\x03\x00" + long[:2]), refused: 5, reason: "Connection refused", says: "the destination refused"},
		{name: "too far", legs: open("\x05\x06\x00\x01" + long[:6]), refused: 6, reason: "TTL expired", says: "cannot reach the destination"},
		{name: "no CONNECT", legs: open("\x05\x07\x00\x01" + long[:6]), refused: 7, reason: "Command not supported", says: "SOCKS5 proxy?"},
		{name: "no such addresses", legs: open("\x05\x08\x00\x01" + long[:6]), refused: 8, reason: "Address type not supported", says: "IPv6"},
		{name: "unassigned", legs: open("\x05\x09\x00\x01" + long[:6]), refused: 9, says: "no tunnel was opened"},
		{name: "refused and closed at once", legs: open("\x05\x02"), refused: 2, reason: "Connection not allowed by ruleset"},
		{name: "refused with nonsense", legs: open("\x05\xff" + long), refused: 255},

		{name: "another protocol", legs: []leg{{socks5OfferNone, "SSH-2.0-OpenSSH\r\n"}}, says: "not SOCKS5"},
		{name: "HTTP", legs: []leg{{socks5Offer, "HTTP/1.1 400 Bad Request\r\n\r\n"}}, says: "not SOCKS5", after: isUnknown},
		{name: "SOCKS4", legs: []leg{{socks5OfferNone, "\x00\x5b" + long[:6]}}, says: "not SOCKS5"},
		{name: "endless garbage", legs: []leg{{socks5OfferNone, strings.Repeat("x", 32<<10)}}, says: "not SOCKS5"},
		{name: "one wrong octet", legs: []leg{{socks5OfferNone, "\x04"}}, says: "not SOCKS5"},
		{name: "one wrong octet of the reply", legs: open("\x04"), says: "not SOCKS5"},
		{name: "GSSAPI", legs: []leg{{socks5Offer, "\x05\x01"}}, says: "method 1, which was not offered", after: isUnknown},
		{name: "password that was not offered", proxy: socks5Open, legs: []leg{{socks5OfferNone, "\x05\x02"}}, says: "method 2, which was not offered"},
		{name: "bound to nothing", legs: open("\x05\x00\x00\x00"), says: "unknown type 0"},
		{name: "bound to something", legs: open("\x05\x00\x00\x7f"), says: "unknown type 127"},

		{name: "nothing", legs: []leg{{socks5OfferNone, ""}}, incomplete: true},
		{name: "nothing to the offer of a password", legs: []leg{{socks5Offer, ""}}, incomplete: true, after: isUnknown},
		{name: "half a method", legs: []leg{{socks5OfferNone, "\x05"}}, incomplete: true},
		{name: "no verdict", legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, ""}}, incomplete: true, after: isUnknown},
		{name: "half a verdict", legs: []leg{{socks5Offer, "\x05\x02"}, {socks5Password, "\x01"}}, incomplete: true, after: isUnknown},
		{name: "no reply", legs: open(""), incomplete: true},
		{name: "half a reply", legs: open("\x05\x00\x00"), incomplete: true},
		{name: "no length", legs: open("\x05\x00\x00\x03"), incomplete: true},
		{name: "half a name", legs: open("\x05\x00\x00\x03\xff" + long), incomplete: true},
		{name: "half a port", legs: open(socks5Granted[:len(socks5Granted)-1]), incomplete: true},
	}
	for i := range scripts {
		s := &scripts[i]
		s.name = "socks5/" + s.name
		if s.proxy = socks5Proxy; s.legs[0].hears == socks5OfferNone {
			s.proxy, s.after = socks5Open, isNotNeeded
		}
	}
	return scripts
}

func TestSOCKS5Request(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 62)+".", 4) // 252 bytes
	for _, test := range []struct {
		target upstream.Target
		want   string
	}{
		{upstream.Target{Host: "example.org", Port: 443}, socks5Request},
		{upstream.Target{Host: "a_b.example.org.", Port: 22}, "\x05\x01\x00\x03\x10a_b.example.org.\x00\x16"},
		{upstream.Target{Host: long + "a.", Port: 256}, "\x05\x01\x00\x03\xfe" + long + "a.\x01\x00"},
		{upstream.Target{Host: "192.0.2.1", Port: 65535}, "\x05\x01\x00\x01\xc0\x00\x02\x01\xff\xff"},
		{upstream.Target{Host: "2001:db8::1", Port: 80}, "\x05\x01\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x50"},
		{upstream.Target{Host: "::ffff:192.0.2.1", Port: 80}, "\x05\x01\x00\x01\xc0\x00\x02\x01\x00\x50"},
	} {
		handshake, err := parse(t, socks5Open).Handshake(test.target, nil)
		if err != nil {
			t.Errorf("%+v: %v", test.target, err)
			continue
		}
		if out, _, _, err := handshake.Feed([]byte("\x05\x00")); err != nil || string(out) != test.want {
			t.Errorf("%+v: %v\n got %q\nwant %q", test.target, err, out, test.want)
		}
	}
}

// TestSOCKS5NotAsked: flows to a proxy that does not ask for the password do not
// wait for one another, and one that asks later costs one flow.
func TestSOCKS5NotAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		proxy, first, handshake := begin(t, socks5Proxy)
		waiting := make(chan *upstream.Lease, 10)
		for range cap(waiting) {
			go func() {
				lease, err := proxy.Acquire(t.Context())
				if err != nil {
					t.Error(err)
				}
				waiting <- lease
			}()
		}
		synctest.Wait()
		if len(waiting) > 0 {
			t.Fatal("they do not wait while the first flow asks")
		}
		start := time.Now()
		if _, _, _, err := handshake.Feed([]byte("\x05\x00")); err != nil {
			t.Fatal(err)
		}
		for range cap(waiting) {
			if lease := <-waiting; lease != nil {
				t.Error("they offer the password one after the other")
			}
		}
		if time.Since(start) > 0 {
			t.Error("they wait for the answer to the request")
		}
		first.Settle(nil) // a tunnel that says nothing about the password

		later, err := proxy.Handshake(target, nil)
		if err != nil {
			t.Fatal(err)
		}
		if hello := string(later.Hello()); hello != socks5OfferNone {
			t.Errorf("it offers %q", hello)
		}
		if _, _, _, err = later.Feed([]byte("\x05\xff")); err == nil || !strings.Contains(err.Error(), "the next flow sends them") || upstream.Denied(err) {
			t.Errorf("error %v", err)
		}
		lease := acquire(t, proxy)
		if lease == nil {
			t.Fatal("the next flow does not send it")
		}
		wantWait(t, proxy) // untried: one at a time
		lease.Settle(errDenied)
		wantRefused(t, proxy)
	})
}

// TestSOCKS5MixedMethods: a proxy that once asked is offered the password always,
// also after it was content without.
func TestSOCKS5MixedMethods(t *testing.T) {
	proxy, _, handshake := begin(t, socks5Proxy)
	if _, _, _, err := handshake.Feed([]byte("\x05\x02\x01\x00")); err != nil {
		t.Fatal(err)
	}
	standing := acquire(t, proxy)
	other, err := proxy.Handshake(target, standing)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := other.Feed([]byte("\x05\x00")); err != nil {
		t.Fatal(err)
	}
	if lease, ok := proxy.Standing(); !ok || lease != standing {
		t.Errorf("it is not offered any more: %v, %v", lease, ok)
	}
}

// TestSOCKS5Reset: SIGHUP has a password offered again that was not asked for.
func TestSOCKS5Reset(t *testing.T) {
	proxy, _, handshake := begin(t, socks5Proxy)
	if _, _, _, err := handshake.Feed([]byte("\x05\x00")); err != nil {
		t.Fatal(err)
	}
	if lease := acquire(t, proxy); lease != nil {
		t.Error("it is offered")
	}
	proxy.Reset()
	if lease := acquire(t, proxy); lease == nil {
		t.Error("it is not offered")
	}
}

// TestSOCKS5Pipelining: nothing is said before its turn, so that proxies that drop
// early bytes are understood.
func TestSOCKS5Pipelining(t *testing.T) {
	for _, url := range []string{socks5Open, socks5Proxy} {
		_, _, handshake := begin(t, url)
		if hello := string(handshake.Hello()); hello != socks5Offer && hello != socks5OfferNone {
			t.Errorf("%s: %q", url, hello)
		}
		if out, _, _, err := handshake.Feed([]byte{5}); len(out) > 0 || err != nil {
			t.Errorf("%s: %q, %v", url, out, err)
		}
	}
}

// FuzzSOCKS5Reply: no panic, the same end however the bytes are cut and whoever
// drives, and agreement with golang.org/x/net wherever that opens a tunnel or tells
// of a refusal.
func FuzzSOCKS5Reply(f *testing.F) {
	for _, s := range socks5Scripts() {
		f.Add(s.proxy == socks5Proxy, []byte(s.stream()), uint16(len(s.stream())/2), uint16(7))
	}
	e := startEngine(f)
	f.Fuzz(func(t *testing.T, password bool, stream []byte, cut, second uint16) {
		url := socks5Open
		if password {
			url = socks5Proxy
		}
		got := e.sameEverywhere(t, url, stream, int(cut), int(second))
		if got.done && got.err != nil {
			t.Fatalf("%+v", got)
		}
		if !password && len(stream) > 1 && stream[1] != 0 && stream[1] != 0xff {
			return // x/net goes on with a method that it did not offer
		}
		sent, rest, err := socks5Oracle(password, stream)
		var refused *upstream.RefusedError
		switch {
		case err == nil && (!got.done || got.sent != sent || got.rest != rest):
			t.Fatalf("x/net: sent %q, rest %q; got %+v", sent, rest, got)
		case err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		case strings.Contains(err.Error(), "unknown error") || strings.Contains(err.Error(), "no acceptable") || strings.Contains(err.Error(), "authentication failed"):
			if !errors.As(got.err, &refused) || refused.Denied != strings.Contains(err.Error(), "authentication failed") {
				t.Fatalf("x/net: %v; got %+v", err, got)
			}
		case got.done && !strings.Contains(err.Error(), "reserved field") && !strings.Contains(err.Error(), "password version"):
			// x/net is stricter about these two octets.
			t.Fatalf("x/net: %v; got %+v", err, got)
		}
	})
}

// socks5Oracle runs a handshake as golang.org/x/net does.
func socks5Oracle(password bool, stream []byte) (sent, rest string, err error) {
	var auth *netproxy.Auth
	if password {
		auth = &netproxy.Auth{User: "us er", Password: "p@ss"}
	}
	conn := &replay{answers: bytes.NewReader(stream)}
	dialer, err := netproxy.SOCKS5("tcp", "proxy:1080", auth, conn)
	if err != nil {
		return "", "", err
	}
	if _, err = dialer.Dial("tcp", "example.org:443"); err != nil {
		return "", "", err
	}
	after, err := io.ReadAll(conn.answers)
	return conn.sent.String(), string(after), err
}

// replay is a connection to a proxy whose answers are given beforehand.
type replay struct {
	net.Conn
	answers *bytes.Reader
	sent    bytes.Buffer
}

func (r *replay) Dial(string, string) (net.Conn, error)                         { return r, nil }
func (r *replay) DialContext(context.Context, string, string) (net.Conn, error) { return r, nil }
func (r *replay) Read(b []byte) (int, error)                                    { return r.answers.Read(b) }

func (r *replay) Write(b []byte) (int, error) { return r.sent.Write(b) }
func (r *replay) Close() error                { return nil }
