package upstream_test

import (
	"bufio"
	"bytes"
	"errors"
	"net/http"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// FuzzConnectReply: no panic, the same end however the bytes are cut and whoever
// drives, and agreement with net/http wherever that takes the reply.
func FuzzConnectReply(f *testing.F) {
	for _, s := range connectScripts() {
		f.Add([]byte(s.stream()), uint16(len(s.stream())/2), uint16(7))
	}
	e := startEngine(f)
	f.Fuzz(func(t *testing.T, reply []byte, cut, second uint16) {
		got := e.sameEverywhere(t, httpProxy, reply, int(cut), int(second))
		status, oracleRest, ok := oracle(reply)
		var refused *upstream.RefusedError
		switch {
		case ok && status/100 == 2 && (!got.done || got.rest != oracleRest):
			t.Fatalf("net/http: status %d, rest %q; got %+v", status, oracleRest, got)
		case ok && status/100 != 2 && (!errors.As(got.err, &refused) || refused.Code != status):
			t.Fatalf("net/http: status %d; got %+v", status, got)
		case !ok && got.done:
			// net/http is stricter about fields, not about the status line.
			line, _, _ := bytes.Cut(reply, []byte{'\n'})
			if _, _, ok := oracle(append(bytes.TrimSuffix(line, []byte{'\r'}), "\r\n\r\nHTTP/1.1 200\r\n\r\n"...)); !ok {
				t.Fatalf("net/http does not take the status line %q", line)
			}
		}
	})
}

// oracle reads a reply as net/http does, interim ones skipped. ok is false where
// that takes none, or more than a handshake does.
func oracle(reply []byte) (status int, rest string, ok bool) {
	source := bytes.NewReader(reply)
	reader := bufio.NewReaderSize(source, 64<<10)
	for range 6 {
		response, err := http.ReadResponse(reader, &http.Request{Method: http.MethodConnect})
		if err != nil || response.ProtoMajor != 1 || response.StatusCode < 100 {
			return 0, "", false
		}
		buffered, _ := reader.Peek(reader.Buffered())
		after := len(buffered) + source.Len()
		if len(reply)-after > 16<<10 {
			return 0, "", false
		}
		if status := response.StatusCode; status >= 200 || status == http.StatusSwitchingProtocols {
			return status, string(reply[len(reply)-after:]), true
		}
	}
	return 0, "", false
}
