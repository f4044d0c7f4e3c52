package forward

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// asking is a proxy that wants Digest or NTLM. It looks at the form of a proof and leaves
// its arithmetic to the tests of package auth.
type asking struct {
	scheme string
	closes bool // after each 407
	silent bool // and does not say so
	wrong  bool // the password

	mutex  sync.Mutex
	nonce  int
	known  map[int]bool // NTLM: connections that are authenticated
	proofs int
}

// ntlmChallenge is the second message of [MS-NLMP] section 4.2.4.3.
const ntlmChallenge = "TlRMTVNTUAACAAAADAAMADgAAAAzgoriASNFZ4mrze8AAAAAAAAAACQAJABEAAAABgBwFwAAAA9TAGUAcgB2AGUAcgACAAwARABvAG0AYQBpAG4AAQAMAFMAZQByAHYAZQByAAAAAAA="

func (a *asking) answer(conn net.Conn, number int, request *http.Request) bool {
	io.Copy(io.Discard, request.Body)
	a.mutex.Lock()
	defer a.mutex.Unlock()
	proof := request.Header.Get("Proxy-Authorization")
	challenge, okayed := "", false
	switch a.scheme {
	case "Digest":
		nonce := fmt.Sprintf("nonce=\"n%d\"", a.nonce)
		proven := strings.HasPrefix(proof, "Digest ")
		okayed = proven && strings.Contains(proof, nonce) && strings.Contains(proof, fmt.Sprintf("uri=%q", request.RequestURI))
		if proven {
			a.proofs++
		}
		stale := ""
		if proven && !okayed {
			stale = ", stale=true"
		}
		if okayed = okayed && !a.wrong; !okayed {
			a.nonce++
		}
		challenge = fmt.Sprintf("Digest realm=r, nonce=\"n%d\", qop=\"auth\"%s", a.nonce, stale)
	case "NTLM":
		message, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(proof, "NTLM "))
		challenge = "NTLM"
		switch {
		case a.known[number] && proof == "":
			okayed = true
		case len(message) > 8 && message[8] == 1:
			challenge += " " + ntlmChallenge
		case len(message) > 8 && message[8] == 3:
			a.proofs++
			okayed = !a.wrong
			a.known[number] = okayed
		}
	}
	if okayed {
		_, err := io.WriteString(conn, okay)
		return err == nil
	}
	end := ""
	if a.closes && !a.silent {
		end = "Connection: close\r\n"
	}
	_, err := fmt.Fprintf(conn, "HTTP/1.1 407 No\r\nProxy-Authenticate: %s\r\nContent-Length: 4\r\n%s\r\nbody", challenge, end)
	return err == nil && !a.closes
}

func newAsking(t *testing.T, scheme string) (*asking, *world) {
	t.Helper()
	a := &asking{scheme: scheme, known: make(map[int]bool)}
	w := newWorld(t, answering(t, a.answer), "u:p@", nil)
	if err := w.proxy.Login(nil, auth.Auto); err != nil {
		t.Fatal(err)
	}
	return a, w
}

const post = "POST /%d HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"

// TestLogin: requests without a body are sent again, those with one once.
func TestLogin(t *testing.T) {
	for _, c := range []struct {
		name, scheme string
		closes       bool
		silent       bool
		saw          string
	}{
		{"Digest", "Digest", false, false, "0 GET http://a.test/1|0 GET http://a.test/1|0 GET http://a.test/2|" +
			"0 OPTIONS http://a.test|0 POST http://a.test/3|0 OPTIONS http://a.test|0 POST http://a.test/4|"},
		{"NTLM", "NTLM", false, false, "0 GET http://a.test/1|0 GET http://a.test/1|0 GET http://a.test/1|0 GET http://a.test/2|0 POST http://a.test/3|0 POST http://a.test/4|"},
		{"closed", "Digest", true, false, "0 GET http://a.test/1|1 GET http://a.test/1|1 GET http://a.test/2|1 OPTIONS http://a.test|2 POST http://a.test/3|2 OPTIONS http://a.test|3 POST http://a.test/4|"},
		{"closed in silence", "Digest", true, true, "0 GET http://a.test/1|1 GET http://a.test/1|1 GET http://a.test/2|"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, w := newAsking(t, c.scheme)
			a.closes, a.silent = c.closes, c.silent
			client := w.client(t, Captured)
			reader := bufio.NewReader(client)
			requests := []string{fmt.Sprintf(get, 1, "a.test"), fmt.Sprintf(get, 2, "a.test"), fmt.Sprintf(post, 3), fmt.Sprintf(post, 4)}
			if c.silent { // a body may be gone before the end of the connection is seen
				requests = requests[:2]
			}
			for i, request := range requests {
				response, body := exchangeText(t, client, reader, request)
				if response.StatusCode != 200 || body != "ok" {
					t.Errorf("request %d: %d %q (%v)", i, response.StatusCode, body, w.record(t, i).Err)
				}
			}
			w.peer.expect(t, c.saw)
		})
	}
}

// TestLoginRefused: one proof, and nothing more.
func TestLoginRefused(t *testing.T) {
	for _, scheme := range []string{"Digest", "NTLM"} {
		for _, request := range []string{fmt.Sprintf(get, 1, "a.test"), fmt.Sprintf(post, 1)} {
			a, w := newAsking(t, scheme)
			a.wrong = true
			for i := range 5 {
				client := w.client(t, Captured)
				response, _ := exchangeText(t, client, bufio.NewReader(client), request)
				if response.StatusCode != 502 || w.record(t, i).Err == nil {
					t.Errorf("%s: %d, %v", scheme, response.StatusCode, w.record(t, i).Err)
				}
			}
			if a.proofs != 1 {
				t.Errorf("%s, %.4s: %d proofs", scheme, request, a.proofs)
			}
		}
	}
}
