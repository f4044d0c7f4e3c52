package probe_test

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

// socksProxy is a stand-in SOCKS5 proxy, which is the far side of its tunnels as well.
type socksProxy struct {
	password string                 // of user; empty for no authentication
	reply    func(port uint16) byte // nil for 0 to everything
	relays   byte                   // the reply to UDP ASSOCIATE
	far      *tls.Config

	denied atomic.Int64
}

func (p *socksProxy) serve(conn net.Conn) {
	take := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(conn, b); err != nil {
			return make([]byte, n)
		}
		return b
	}
	head := take(2)
	if head[0] != 5 {
		return
	}
	methods := take(int(head[1]))
	switch {
	case p.password == "":
		conn.Write([]byte{5, 0})
	case !slices.Contains(methods, 2):
		conn.Write([]byte{5, 0xff})
		return
	default:
		conn.Write([]byte{5, 2})
		user := take(int(take(2)[1]))
		password := take(int(take(1)[0]))
		if string(user) != "user" || string(password) != p.password {
			if len(user) > 0 {
				p.denied.Add(1)
			}
			conn.Write([]byte{1, 1})
			return
		}
		conn.Write([]byte{1, 0})
	}
	request := take(4)
	var host string
	switch request[3] {
	case 1:
		host = netip.AddrFrom4([4]byte(take(4))).String()
	case 3:
		host = string(take(int(take(1)[0])))
	case 4:
		host = netip.AddrFrom16([16]byte(take(16))).String()
	}
	port := binary.BigEndian.Uint16(take(2))
	code := byte(0)
	switch {
	case request[1] == 3:
		code = p.relays
	case p.reply != nil:
		code = p.reply(port)
	}
	conn.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0x9c, 0x40}) // of an association: where the proxy is, port 40000
	if code == 0 && request[1] == 1 {
		farSide(conn, conn, net.JoinHostPort(host, fmt.Sprint(port)), p.far, 0)
	}
}

func TestSOCKS5(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	p := &socksProxy{far: far, relays: 7, reply: func(port uint16) byte {
		return map[uint16]byte{443: 0, 80: 2, 22: 5}[port]
	}}
	r := ask(t, "socks5://user:unused@%s", serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
	want(t, r, map[probe.Check]probe.Verdict{
		probe.Protocol: yes, probe.Authentication: yes, name443: yes, address443: yes, sixth443: yes, "connect_80_name": no, "connect_22_name": unclear,
		probe.AbsoluteForm: skipped, probe.UDPAssociate: no, probe.IntactTLS: yes, probe.TCPDNS: yes,
	})
	wantProof(t, r, probe.Authentication, "the credential is not asked for")
	wantProof(t, r, "connect_80_name", "reply 2 Connection not allowed by ruleset")
	wantProof(t, r, probe.UDPAssociate, "reply 7")
	if !r.Usable {
		t.Error("it is not usable")
	}

	p.relays = 0
	r = ask(t, "socks5://%s", serve(t, p.serve), nil)
	want(t, r, map[probe.Check]probe.Verdict{probe.UDPAssociate: yes, probe.Authentication: yes})
}

func TestSOCKS5Password(t *testing.T) {
	t.Parallel()
	far, roots := certify(t, host, "Public Root", true)
	for _, test := range []struct {
		url     string
		verdict probe.Verdict
		proof   string
		denied  int64
	}{
		{"socks5://user:right@%s", yes, "accepts those given", 0},
		{"socks5://user:wr0ng@%s", no, "refuses those given", 1},
		{"socks5://%s", no, "none was given", 0},
	} {
		p := &socksProxy{password: "right", far: far}
		r := ask(t, test.url, serve(t, p.serve), func(c *probe.Config) { c.Roots = roots })
		want(t, r, map[probe.Check]probe.Verdict{probe.Authentication: test.verdict})
		wantProof(t, r, probe.Authentication, test.proof)
		if p.denied.Load() != test.denied || r.Usable != (test.verdict == yes) {
			t.Errorf("%s: %d refused, usable %t", test.url, p.denied.Load(), r.Usable)
		}
	}
}
