package exchange_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// messages are answers to query("a.test"), good ones and others.
func messages() [][]byte {
	q := query("a.test")
	loop := answer(q, 0)
	loop[len(q)+1] = byte(len(q))
	whole := answer(q, 100)
	opt := append(answer(q, 0), 0, 0, 41, 4, 0, 0, 0, 0x80, 0, 0, 0)
	opt[11] = 1
	repeated := append(answer(q, 0), q[12:]...)
	repeated = append(repeated, 0, 0, 1, 0, 0, 4, 1, 2, 3, 4)
	repeated[9] = 1
	return append([][]byte{whole, loop, opt, repeated, withRcode(q, 2), {0xab, 0xcd, 0x81, 2, 0, 0, 0, 0, 0, 0, 0, 0}, q}, forgeries(q)...)
}

// wantAnswer fails unless got is an answer to q that another parser can read to its
// end, and nothing behind it.
func wantAnswer(t *testing.T, got, q []byte) {
	t.Helper()
	if len(got) < len(q) || !bytes.Equal(got[:2], q[:2]) || got[2]&0x80 == 0 || !bytes.Equal(got[4:6], q[4:6]) || !bytes.Equal(got[12:len(q)], q[12:]) {
		t.Fatalf("%x is no answer to %x", got, q)
	}
	var parser dnsmessage.Parser
	_, err := parser.Start(got)
	for _, skip := range []func() error{parser.SkipAllQuestions, parser.SkipAllAnswers, parser.SkipAllAuthorities, parser.SkipAllAdditionals} {
		if err == nil {
			err = skip()
		}
	}
	if err != nil {
		t.Fatalf("%x: %v", got, err)
	}
}

// FuzzStream: whatever a server sends in a stream, what is returned is an answer, and
// the questions end. The bytes 0xabcd stand for the query's id on the wire.
func FuzzStream(f *testing.F) {
	for _, message := range messages() {
		f.Add(framed(message), uint16(1))
		f.Add(framed(message, answer(query("a.test"), 0)), uint16(20))
		f.Add(announced(len(message)+10, message), uint16(3))
		f.Add(announced(max(len(message)-3, 0), message), uint16(40))
	}
	f.Fuzz(func(t *testing.T, sent []byte, cut uint16) {
		dial := func(context.Context) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				q, err := readQuery(far)
				if err != nil {
					return
				}
				go io.Copy(io.Discard, far) // ends with far
				stream := bytes.ReplaceAll(sent, []byte{0xab, 0xcd}, q[:2])
				first := min(int(cut), len(stream))
				far.Write(stream[:first])
				far.Write(stream[first:])
			}()
			return near, nil
		}
		server := exchange.NewTCP("fuzz", dial, exchange.Config{Timeout: 10 * time.Second})
		defer server.Close()
		q := query("a.test")
		got, err := server.Exchange(t.Context(), q)
		if err == nil {
			wantAnswer(t, got, q)
		} else if strings.Contains(err.Error(), "no answer within") {
			t.Fatal(err)
		}
	})
}

// FuzzHTTPBody: whatever an HTTP server sends, what is returned is an answer.
func FuzzHTTPBody(f *testing.F) {
	for _, message := range messages() {
		f.Add(message, "application/dns-message", "0", 200)
		f.Add(message, "Application/DNS-Message; charset=x", "4294967295", 200)
		f.Add(message, "text/html", "-1", 500)
	}
	f.Fuzz(func(t *testing.T, body []byte, contentType, age string, status int) {
		q := query("a.test")
		response := &http.Response{
			StatusCode:    status,
			Header:        http.Header{"Content-Type": {contentType}, "Age": {age}},
			ContentLength: -1,
			Body:          io.NopCloser(bytes.NewReader(body)),
		}
		got, err := exchange.ReadHTTP(response, q)
		if err != nil {
			return
		}
		if status != 200 || !strings.HasPrefix(strings.ToLower(strings.TrimSpace(contentType)), "application/dns-message") {
			t.Fatalf("taken with status %d, content type %q", status, contentType)
		}
		wantAnswer(t, got, q)
	})
}

// FuzzDatagram: an answer over UDP is taken only if it has the case that was sent, and
// comes out with that of the query, everything else unchanged.
func FuzzDatagram(f *testing.F) {
	for _, message := range messages() {
		f.Add(query("a.test"), message[min(len(message), len(query("a.test"))):])
		f.Add(query("Some.Example.org"), message)
	}
	f.Add(query(""), []byte{})
	f.Fuzz(func(t *testing.T, q, records []byte) {
		disguised, err := exchange.Disguise(q)
		if err != nil {
			return
		}
		if len(disguised) != len(q) || !strings.EqualFold(string(disguised[12:]), string(q[12:])) {
			t.Fatalf("%x became %x", q, disguised)
		}
		sent := append(bytes.Clone(disguised), records...)
		sent[2] |= 0x80
		binary.BigEndian.PutUint16(sent[6:], uint16(min(len(records)/11, 65535)))
		before := bytes.Clone(sent)
		got, ok := exchange.Reveal(sent, disguised, q)
		if !ok {
			return
		}
		if !bytes.Equal(got[:2], q[:2]) || !bytes.EqualFold(got[12:], before[12:len(got)]) {
			t.Fatalf("%x became %x", before, got)
		}
		if end := questionSize(q); !bytes.Equal(got[12:12+end], q[12:12+end]) {
			t.Fatalf("%x has another question than %x", got, q)
		}
		before[13] ^= 0x20
		if before[12] > 0 {
			if _, ok := exchange.Reveal(before, disguised, q); ok {
				t.Fatalf("%x taken with another case", before)
			}
		}
	})
}

// questionSize returns the size of the question in a well-formed query, bytes.
func questionSize(query []byte) int {
	at := 12
	for query[at] != 0 {
		at += 1 + int(query[at])
	}
	return at + 5 - 12
}
