package exchange_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/exchange"
)

// web is a stand-in server of HTTPS on loopback.
type web struct {
	*httptest.Server
	client   *tls.Config
	accepted atomic.Int64
	asked    atomic.Int64
}

// startWeb serves until the test ends. handle is called with the query in a request.
func startWeb(t testing.TB, http2 bool, handle func(w http.ResponseWriter, r *http.Request, query []byte)) *web {
	t.Helper()
	s := new(web)
	server, client := certificate(t, "dns.test")
	s.client = client
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		query, err := io.ReadAll(r.Body)
		if err == nil {
			handle(w, r, query)
		}
	}))
	s.EnableHTTP2 = http2
	s.TLS = server
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.accepted.Add(1)
		}
	}
	s.StartTLS()
	t.Cleanup(s.Server.Close)
	return s
}

func (s *web) dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", s.Listener.Addr().String())
}

// server returns a Server that asks s and is closed before it.
func (s *web) server(t testing.TB, config exchange.Config) exchange.Server {
	endpoint, err := url.Parse("https://user:secret@dns.test/secret/dns-query")
	if err != nil {
		t.Fatal(err)
	}
	return closed(t, exchange.NewHTTPS(endpoint, s.dial, s.client, config))
}

// respond answers a query as RFC 8484 says.
func respond(w http.ResponseWriter, _ *http.Request, query []byte) {
	w.Header().Set("Content-Type", "application/dns-message")
	w.Write(answer(query, 0))
}

func TestHTTPS(t *testing.T) {
	wantGoroutines(t)
	s := startWeb(t, true, func(w http.ResponseWriter, r *http.Request, query []byte) {
		if r.Method != http.MethodPost || r.ProtoMajor != 2 || r.URL.Path != "/secret/dns-query" || r.Host != "dns.test" || query[0] != 0 || query[1] != 0 ||
			r.Header.Get("Content-Type") != "application/dns-message" || r.Header.Get("Accept") != "application/dns-message" ||
			r.Header.Get("User-Agent") != "" || r.Header.Get("Authorization") != "" || r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("%s %s %s %s %x %v", r.Proto, r.Method, r.Host, r.URL, query, r.Header)
		}
		respond(w, r, query)
	})
	server := s.server(t, exchange.Config{})
	for range 3 {
		if err := errors.Join(askAll(server, t.Context(), 50, number)...); err != nil {
			t.Fatal(err)
		}
	}
	if s.accepted.Load() != 1 {
		t.Errorf("%d connections", s.accepted.Load())
	}
	if server.String() != "https://dns.test" {
		t.Errorf("the name is %s", server)
	}
}

// TestHTTP1: proxies that look into TLS speak nothing newer.
func TestHTTP1(t *testing.T) {
	wantGoroutines(t)
	s := startWeb(t, false, func(w http.ResponseWriter, r *http.Request, query []byte) {
		time.Sleep(5 * time.Millisecond)
		respond(w, r, query)
	})
	server := s.server(t, exchange.Config{})
	for range 2 {
		if err := errors.Join(askAll(server, t.Context(), 200, number)...); err != nil {
			t.Fatal(err)
		}
	}
	if accepted := s.accepted.Load(); accepted < 4 || accepted > 40 {
		t.Errorf("%d connections", accepted)
	}
}

// endless writes until the client has enough.
func endless(w http.ResponseWriter) {
	for chunk := make([]byte, 16<<10); ; {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

// TestBadHTTPAnswer: each is an error of its question, and no other's concern.
func TestBadHTTPAnswer(t *testing.T) {
	dns := func(change func(query []byte) []byte) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, _ *http.Request, query []byte) {
			w.Header().Set("Content-Type", "application/dns-message")
			w.Write(change(query))
		}
	}
	for name, test := range map[string]struct {
		does func(w http.ResponseWriter, r *http.Request, query []byte)
		says string
	}{
		"status 500": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			http.Error(w, "no", http.StatusInternalServerError)
		}, "HTTP status 500"},
		"redirect": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			http.Redirect(w, r, "/other", http.StatusTemporaryRedirect)
		}, "HTTP status 307"},
		"web page": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.Write(answer(q, 0))
		}, `content type is "text/html; charset=utf-8"`},
		"no type": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			w.Header()["Content-Type"] = nil
			w.Write(answer(q, 0))
		}, "content type"},
		"long body": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			w.Header().Set("Content-Length", "65536")
			dns(func(q []byte) []byte { return make([]byte, 65536) })(w, r, q)
		}, "65536 bytes"},
		"endless body": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			w.Header().Set("Content-Type", "application/dns-message")
			endless(w)
		}, "more than 65535 bytes"},
		"stuck body": {func(w http.ResponseWriter, r *http.Request, q []byte) {
			w.Header().Set("Content-Type", "application/dns-message")
			w.Write(answer(q, 0))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, "no answer within"},
		"never":            {func(w http.ResponseWriter, r *http.Request, q []byte) { <-r.Context().Done() }, "no answer within"},
		"aborted":          {func(w http.ResponseWriter, r *http.Request, q []byte) { panic(http.ErrAbortHandler) }, ""},
		"empty":            {dns(func(q []byte) []byte { return nil }), "malformed"},
		"garbage":          {dns(func(q []byte) []byte { return bytes.Repeat([]byte{0xc0}, 100) }), "another question"},
		"another id":       {dns(func(q []byte) []byte { q[1] = 1; return answer(q, 0) }), "another question"},
		"another question": {dns(func(q []byte) []byte { q[13] = 'x'; return answer(q, 0) }), "another question"},
		"cut":              {dns(func(q []byte) []byte { return answer(q, 0)[:30] }), "malformed"},
		"more than it":     {dns(func(q []byte) []byte { return append(answer(q, 0), 0) }), "malformed"},
	} {
		for _, http2 := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				wantGoroutines(t)
				s := startWeb(t, http2, func(w http.ResponseWriter, r *http.Request, query []byte) {
					if firstLabel(query) == "bad" {
						test.does(w, r, query)
					} else {
						respond(w, r, query)
					}
				})
				server := s.server(t, exchange.Config{Timeout: 2 * time.Second})
				bad := make(chan error)
				go func() { bad <- ask(server, t.Context(), "bad.test") }()
				for range 3 {
					if err := errors.Join(askAll(server, t.Context(), 20, number)...); err != nil {
						t.Error(err)
					}
				}
				err := <-bad
				if err == nil || !strings.HasPrefix(err.Error(), "ask https://dns.test: ") || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), "secret") {
					t.Error(err)
				}
			})
		}
	}
}

func TestHTTPSConnectionLost(t *testing.T) {
	wantGoroutines(t)
	for _, http2 := range []bool{true, false} {
		s := startWeb(t, http2, respond)
		server := s.server(t, exchange.Config{})
		for i := range 30 {
			if err := ask(server, t.Context(), number(i)); err != nil {
				t.Fatal(err)
			}
			s.CloseClientConnections()
		}
		s.Server.Close()
		within(t, 2*time.Second, "the error", func() {
			if err := ask(server, t.Context(), "a.test"); err == nil || !strings.Contains(err.Error(), "https://dns.test: connect: ") {
				t.Error(err)
			}
		})
	}
}

func TestHTTPSServerIsAuthenticated(t *testing.T) {
	wantGoroutines(t)
	s := startWeb(t, true, respond)
	endpoint := &url.URL{Scheme: "https", Host: "other.test", Path: "/dns-query"}
	client := s.client.Clone()
	client.ServerName = ""
	server := closed(t, exchange.NewHTTPS(endpoint, s.dial, client, exchange.Config{}))
	if err := ask(server, t.Context(), "a.test"); err == nil || !strings.Contains(err.Error(), "not other.test") {
		t.Error(err)
	}
	if s.asked.Load() > 0 {
		t.Error("the question was told")
	}
}

// TestTimeInHTTPCacheCounts: 10 seconds of a TTL of 256.
func TestTimeInHTTPCacheCounts(t *testing.T) {
	wantGoroutines(t)
	s := startWeb(t, true, func(w http.ResponseWriter, r *http.Request, query []byte) {
		w.Header().Set("Age", "10")
		respond(w, r, query)
	})
	q := query("a.test")
	got, err := s.server(t, exchange.Config{}).Exchange(t.Context(), q)
	want := answer(q, 0)
	want[len(want)-8], want[len(want)-7] = 0, 246
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v", got, err)
	}
}

func TestHTTPSCloseEndsQuestions(t *testing.T) {
	wantGoroutines(t)
	s := startWeb(t, true, func(w http.ResponseWriter, r *http.Request, query []byte) { <-r.Context().Done() })
	server := s.server(t, exchange.Config{})
	var asking sync.WaitGroup
	for range 10 {
		asking.Go(func() {
			if err := ask(server, t.Context(), "a.test"); !errors.Is(err, exchange.ErrClosed) {
				t.Error(err)
			}
		})
	}
	for s.asked.Load() < 10 {
		time.Sleep(time.Millisecond)
	}
	within(t, time.Second, "Close", server.Close)
	asking.Wait()
}
