package probe_test

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/probe"
)

func TestAnswersOfNameServers(t *testing.T) {
	t.Parallel()
	query := dnsmessage.Message{Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName("host.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
	}}}
	packed, err := query.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for proof, test := range map[string]struct {
		code      dnsmessage.RCode
		addresses [][4]byte
		verdict   probe.Verdict
	}{
		"answered 192.0.2.7":                               {0, [][4]byte{{192, 0, 2, 7}}, yes},
		"answered NXDOMAIN":                                {3, nil, no},
		"answered SERVFAIL":                                {2, nil, no},
		"answered with code 9":                             {9, nil, no},
		"answered without an address":                      {0, nil, no},
		"answered 10.1.2.3, which is no public address":    {0, [][4]byte{{10, 1, 2, 3}}, no},
		"answered 127.0.0.1, which is no public address":   {0, [][4]byte{{127, 0, 0, 1}}, no},
		"answered 0.0.0.0, which is no public address":     {0, [][4]byte{{0, 0, 0, 0}}, no},
		"answered 169.254.1.1, which is no public address": {0, [][4]byte{{169, 254, 1, 1}}, no},
	} {
		answer, err := answerTo(packed, test.code, test.addresses...)
		if err != nil {
			t.Fatal(err)
		}
		if verdict, got := probe.Judge(answer); verdict != test.verdict || got != proof {
			t.Errorf("%s: %q, want %q", verdict, got, proof)
		}
	}
}

// FuzzAnswer: whatever a name server says.
func FuzzAnswer(f *testing.F) {
	query := dnsmessage.Message{Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName("host.test."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
	}}}
	packed, err := query.Pack()
	if err != nil {
		f.Fatal(err)
	}
	answer, err := answerTo(packed, 0, [4]byte{192, 0, 2, 7})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Add(answer)
	f.Fuzz(func(t *testing.T, answer []byte) {
		if verdict, proof := probe.Judge(answer); verdict != yes && verdict != no || proof == "" {
			t.Errorf("%s: %q", verdict, proof)
		}
	})
}

// FuzzProxy: whatever a proxy says to everything, it is shown in printable characters,
// and nothing takes longer than it may.
func FuzzProxy(f *testing.F) {
	urls := []string{"http://user:right@%s", "http://%s", "socks5://user:right@%s", "socks5://%s"}
	f.Add(uint8(0), "HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x, NTLM\r\nServer: a\x1b[31m\r\n\r\n")
	f.Add(uint8(1), "HTTP/1.1 200 OK\r\nLocation: http://\x00/\r\nVia: \u202eevil\r\n\r\nHTTP/1.1 302 x\r\n\r\n")
	f.Add(uint8(1), "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 x\r\n\r\n")
	f.Add(uint8(2), "\x05\x02\x01\x01")
	f.Add(uint8(3), "\x05\x00\x05\x00\x00\x03\xff")
	f.Add(uint8(3), "\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00")
	f.Fuzz(func(t *testing.T, which uint8, says string) {
		start := time.Now()
		r := ask(t, urls[int(which)%len(urls)], serve(t, func(conn net.Conn) {
			io.WriteString(conn, says)
			conn.(*net.TCPConn).CloseWrite()
			conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			io.Copy(io.Discard, conn)
		}), nil)
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("it took %s", took)
		}
		for _, finding := range r.Findings {
			if strings.ContainsFunc(finding.Proof, func(r rune) bool { return !unicode.IsPrint(r) }) || len(finding.Proof) > 1000 {
				t.Errorf("%s: %q", finding.Check, finding.Proof)
			}
			if strings.Contains(finding.Proof, "right") && !strings.Contains(says, "right") {
				t.Errorf("%s shows the password: %q", finding.Check, finding.Proof)
			}
		}
		if r.Usable {
			t.Error("it is usable")
		}
	})
}
