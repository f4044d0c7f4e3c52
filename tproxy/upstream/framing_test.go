package upstream

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// FuzzReplyFraming: the end of a body is the same in every cut, and where it is found net/http
// finds it at the same place.
func FuzzReplyFraming(f *testing.F) {
	for _, seed := range []string{"Content-Length: 3\r\n\r\nabcrest", "Transfer-Encoding: chunked\r\n\r\n3;x\r\nabc\r\n0\r\na: b\r\n\r\nrest"} {
		f.Add(seed, 1)
	}
	f.Fuzz(func(t *testing.T, text string, cut int) {
		head, body, found := strings.Cut(text, "\r\n\r\n")
		if !found || len(text) > maxReplyBody {
			return
		}
		read := func(size int) (rest string, done bool, err error) {
			r := replyFraming{minor: 1}
			for line := range strings.SplitSeq(head, "\r\n") {
				if name, value, found := strings.Cut(line, ":"); found {
					r.readField([]byte(name), []byte(value))
				}
			}
			if err := r.begin(); err != nil {
				return "", false, err
			}
			if r.empty() {
				return body, true, nil
			}
			for in := []byte(body); len(in) > 0; {
				n := min(size, len(in))
				rest, done, err := r.skip(in[:n])
				if done || err != nil {
					return string(rest) + string(in[n:]), done, err
				}
				in = in[n:]
			}
			return "", false, nil
		}
		rest, done, err := read(len(body) + 1)
		rest2, done2, err2 := read(max(1, min(cut, len(body)+1)))
		if done != done2 || done && rest != rest2 || (err == nil) != (err2 == nil) || err != nil && !errors.Is(err, errUnframed) {
			t.Fatalf("whole %q %t %v, cut %q %t %v", rest, done, err, rest2, done2, err2)
		}
		if !done {
			return
		}
		reader := bufio.NewReader(strings.NewReader("HTTP/1.1 407 No\r\n" + head + "\r\n\r\n" + body))
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return // it is stricter about names and values
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return // and about chunks
		}
		left, _ := io.ReadAll(reader)
		if !response.Close && !bytes.Equal(left, []byte(rest)) {
			t.Fatalf("rest %q, net/http's %q", rest, left)
		}
	})
}
