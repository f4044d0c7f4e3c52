package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestWrkIsRead(t *testing.T) {
	const good = `Running 1s test @ http://203.0.113.7/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     2.14ms    1.21ms  16.77ms   81.27%
    Req/Sec    29.43k     2.17k   32.15k    72.73%
  Latency Distribution
     50%    1.80ms
     75%    2.66ms
     90%    3.71ms
     99%    6.23ms
  32219 requests in 1.10s, 36.56MB read
Requests/sec:  29290.45
Transfer/sec:     33.24MB
`
	a, err := parse(good)
	if err != nil || a != (answered{32219, 29290.45, 6230 * time.Microsecond}) {
		t.Errorf("%v, %+v", err, a)
	}
	for text, want := range map[string]time.Duration{"99%  845.00us": 845 * time.Microsecond, "99%    1.02s": 1020 * time.Millisecond, "99%    1.50m": 90 * time.Second} {
		if a, err := parse(strings.Replace(good, "99%    6.23ms", text, 1)); err != nil || a.p99 != want {
			t.Errorf("%s: %v, %v", text, err, a.p99)
		}
	}
	for name, text := range map[string]string{
		"socket errors": strings.Replace(good, "Requests/sec", "  Socket errors: connect 0, read 3, write 0, timeout 0\nRequests/sec", 1),
		"refusals":      strings.Replace(good, "Requests/sec", "  Non-2xx or 3xx responses: 12\nRequests/sec", 1),
		"no request":    strings.Replace(good, "  32219 requests", "  0 requests", 1),
		"no latency":    strings.Replace(good, "99%", "98%", 1),
		"no statistics": good[:100],
	} {
		if a, err := parse(text); err == nil {
			t.Errorf("%s: %+v", name, a)
		}
	}
}

func TestStatIsRead(t *testing.T) {
	const line = "42 (a (b) c) S 7 42 42 0 -1 4194560 123 0 0 0 10 20 3 4 20 0 1 0 100 1000 100 18446744073709551615"
	s, err := parseStat([]byte(line))
	if err != nil || s != (stat{parent: 7, cpu: 370 * time.Millisecond}) {
		t.Errorf("%v, %+v", err, s)
	}
	if s, err := parseStat([]byte(strings.Replace(line, ") S", ") Z", 1))); err != nil || !s.ended {
		t.Errorf("an ended process: %v, %+v", err, s)
	}
	if _, err := parseStat([]byte(line[:40])); err == nil {
		t.Error("half a line is read")
	}
}

func TestProcessesAreMeasured(t *testing.T) {
	before, err := measure(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("cat")
	hold, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	with, err := measure(os.Getpid())
	hold.Close()
	child.Wait()
	// Its standard input, output and error, and here the other end of the first.
	if err != nil || with.descriptors < before.descriptors+4 {
		t.Errorf("%v: %+v, and with a child %+v", err, before, with)
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if after, err := measure(os.Getpid()); err != nil || after.cpu > with.cpu {
			return
		}
	}
	t.Error("five seconds of work do not count")
}

func TestStandInAnswers(t *testing.T) {
	s := newStandIn(proxyServer, "GET http://"+originName)
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		s.serve(server)
		server.Close()
		close(done)
	}()
	const request = "GET http://origin.example/ HTTP/1.1\r\nHost: origin.example\r\n"
	reader := bufio.NewReader(client)
	for _, text := range []string{request + "\r\n", request + "Connection: keep-alive\r\n\r\n", request + "connection: close\r\n\r\n"} {
		go io.WriteString(client, text)
		answer, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		body, err := io.ReadAll(answer.Body)
		if err != nil || len(body) != bodySize || answer.Header.Get("Server") != proxyServer || answer.Close != strings.Contains(text, "close") {
			t.Errorf("%q: %v, %+v", text, err, answer)
		}
	}
	<-done
	for _, text := range []string{"GET / HTTP/1.1\r\nHost: origin.example\r\n\r\n", "CONNECT origin.example:80 HTTP/1.1\r\n\r\n"} {
		if answer, more := s.answer([]byte(text)); more || !strings.HasPrefix(string(answer), "HTTP/1.1 501 ") {
			t.Errorf("%q is answered: %q", text, answer)
		}
	}
}

func TestReverseProxyForwardsInAbsoluteForm(t *testing.T) {
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.RequestURI) }))
	defer upstream.Close()
	address, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	answer := httptest.NewRecorder()
	request := httptest.NewRequest(http.MethodGet, "/path?query", nil)
	request.Host = originName
	newReverseProxy(address).ServeHTTP(answer, request)
	if got := answer.Body.String(); got != "http://origin.example/path?query" {
		t.Errorf("the proxy was asked for %q", got)
	}
}

func TestVersionsAreFound(t *testing.T) {
	for output, want := range map[string]string{
		"wrk debian/4.1.0-3+b2 [epoll] Copyright (C) 2012 Will Glozer\nUsage: wrk": "wrk 4.1.0-3+b2",
		"wrk 4.2.0 [epoll] Copyright (C) 2012 Will Glozer":                         "wrk 4.2.0",
		"": "wrk",
	} {
		if got := firstVersion("wrk", output); got != want {
			t.Errorf("%q: %q", output, got)
		}
	}
	if got := firstVersion("squid", "Squid Cache: Version 5.7\nService Name: squid"); got != "squid 5.7" {
		t.Errorf("squid: %q", got)
	}
}

func TestSectionIsReplaced(t *testing.T) {
	const hand = "# Figures\n\nBy hand.\n"
	first := string(replaceSection([]byte(hand), "one\n"))
	if want := hand + "\n## Plain HTTP\n\n" + sectionBegin + "one\n" + sectionEnd; first != want {
		t.Errorf("added: %q", first)
	}
	second := string(replaceSection([]byte(first+"After.\n"), "two\n"))
	if want := hand + "\n## Plain HTTP\n\n" + sectionBegin + "two\n" + sectionEnd + "After.\n"; second != want {
		t.Errorf("replaced: %q", second)
	}
}

func TestFiguresAreReadable(t *testing.T) {
	for value, want := range map[float64]string{0.1234: "0.123", 15.31: "15.3", 1234: "1,230", 50_666: "50,700", 1_234_567: "1,230,000", 99.97: "100"} {
		if got := readable(value); got != want {
			t.Errorf("%v is %s and not %s", value, got, want)
		}
	}
}
