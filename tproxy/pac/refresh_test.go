//go:build !nopac

package pac

import (
	"bytes"
	"compress/gzip"
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// text is a script that answers with one name.
func text(answer string) string {
	return "function FindProxyForURL(url, host) { alert('asked'); return 'PROXY " + answer + ":1'; }"
}

// log collects lines; a test reads them while they are written.
type log struct {
	mutex sync.Mutex
	lines bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.lines.Write(p)
}

func (l *log) String() string {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.lines.String()
}

// eventually waits for the script to give an answer.
func eventually(t *testing.T, s *Script, want string, within time.Duration) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		choices, err := s.Find(t.Context(), "https", "www.example", 443)
		if err == nil && show(choices) == want {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("got %v, %v, want %s", choices, err, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestFileIsReadAgain(t *testing.T) {
	file := write(t, text("one"))
	logged := new(log)
	config := configure(file, new(resolver))
	config.Logger = zerolog.New(logged)
	s, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := s.Serve(ctx); err != nil {
			t.Error(err)
		}
	})
	defer func() {
		cancel()
		serving.Wait()
		s.Close()
	}()
	eventually(t, s, "http://one:1", time.Second)

	replace := func(with string) {
		if err := os.WriteFile(file+".new", []byte(with), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	replace(text("two"))
	eventually(t, s, "http://two:1", 2*filePoll)
	replace("function FindProxyForURL(url, host) {")
	for end := time.Now().Add(2 * filePoll); !strings.Contains(logged.String(), "the old one stays in use"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("nothing is said of a bad script: %s", logged)
		}
	}
	eventually(t, s, "http://two:1", 0)
	replace(text("three"))
	eventually(t, s, "http://three:1", 2*filePoll)
	for _, line := range []string{"proxy.pac:1:38: ", "the PAC script is there again", "the PAC script has changed and is in use", "pac alert: asked"} {
		if !strings.Contains(logged.String(), line) {
			t.Errorf("the log lacks %q:\n%s", line, logged)
		}
	}
}

func TestURLIsFetchedAgain(t *testing.T) {
	var answer atomic.Pointer[string]
	set := func(s string) { answer.Store(&s) }
	set(text("one"))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if *answer.Load() == "" {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		_, _ = w.Write([]byte(*answer.Load()))
	}))
	defer server.Close()
	s := open(t, server.URL)
	eventually(t, s, "http://one:1", 0)
	set(text("two"))
	if err := s.renew(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, s, "http://two:1", 0)
	for _, bad := range []string{"", "<html>", "for(;;);"} {
		set(bad)
		if err := s.renew(t.Context()); err == nil {
			t.Errorf("%q was taken", bad)
		}
		eventually(t, s, "http://two:1", 0)
	}
}

// TestFetch holds what a server can do to who fetches a script.
func TestFetch(t *testing.T) {
	script := text("fetched")
	mux := http.NewServeMux()
	mux.HandleFunc("/good", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(script)) })
	mux.HandleFunc("/user", func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "u" || password != "secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write([]byte(script))
	})
	mux.HandleFunc("/latin", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-ns-proxy-autoconfig; charset=ISO-8859-1")
		_, _ = w.Write([]byte("var \xe9 = 'PROXY fetched:1'; function FindProxyForURL() { return \xe9; }"))
	})
	mux.HandleFunc("/hop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/good", http.StatusFound) })
	mux.HandleFunc("/loop", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/loop", http.StatusFound) })
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
	})
	mux.HandleFunc("/missing", http.NotFound)
	mux.HandleFunc("/endless", func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<16)); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/bomb", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		packed := gzip.NewWriter(w)
		for range 1 << 10 {
			if _, err := packed.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	address := strings.TrimPrefix(server.URL, "http://")
	_, port, _ := strings.Cut(address, ":")

	for location, want := range map[string]string{
		server.URL + "/good":                           "",
		"http://script.example:" + port + "/good#part": "",
		"http://u:secret@" + address + "/user":         "",
		server.URL + "/latin":                          "",
		server.URL + "/hop":                            "",
		server.URL + "/loop":                           "more than 5 redirects",
		server.URL + "/file":                           "from http:// or https://",
		server.URL + "/missing":                        "404 Not Found",
		"http://u:wrongsecret@" + address + "/user":    "401 Unauthorized",
		server.URL + "/endless":                        "more than 1024 KiB",
		server.URL + "/bomb":                           "more than 1024 KiB",
	} {
		controlled := false
		config := configure(location, new(resolver))
		config.Control = func(string, string, syscall.RawConn) error {
			controlled = true
			return nil
		}
		s, err := Open(t.Context(), config)
		if !controlled {
			t.Errorf("%s: the socket was not marked", location)
		}
		if err != nil {
			if want == "" || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v, want %q", location, err, want)
			}
			continue
		}
		if want != "" {
			t.Errorf("%s was taken", location)
		}
		eventually(t, s, "http://fetched:1", 0)
		s.Close()
	}

	// A server that does not answer is waited for as long as the context allows.
	silent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, configure(silent.URL, new(resolver))); err == nil {
		t.Error("a silent server gave a script")
	}
}

func TestRedirectFromHTTPSToHTTPIsRefused(t *testing.T) {
	first, _ := http.NewRequest(http.MethodGet, "https://a.example/p.pac", nil)
	next, _ := http.NewRequest(http.MethodGet, "http://a.example/p.pac", nil)
	if err := checkRedirect(next, []*http.Request{first}); err == nil {
		t.Error("it is followed")
	}
}
