package test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// portScripted is where a scripted peer of a test is.
const portScripted = 8081

// scripted answers every request on a port with the same bytes, and closes.
func scripted(t *testing.T, ns *netns.NS, answer string) {
	t.Helper()
	listener, err := ns.Listen("tcp", fmt.Sprintf("[::]:%d", portScripted))
	must(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			conn.Read(make([]byte, 4096))
			io.WriteString(conn, lines(answer))
			conn.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-ended })
}

// TestPagesNameTheCause: each failure has its status and its word of RFC 9209 section
// 2.3, on a page that says who speaks, what failed and what to do.
func TestPagesNameTheCause(t *testing.T) {
	atProxy := fmt.Sprintf("http://%s%s:%d", proxyUser, lab.Proxy4, portScripted)
	for _, test := range []struct {
		name      string
		arguments []string
		answer    string // of a scripted proxy
		status    int
		failure   string
		says      string
	}{
		{"nobody listens", []string{"--upstream", atProxy}, "", 502, "connection_refused", lab.Proxy4.String()},
		{
			"nobody answers",
			[]string{"--upstream", "http://198.51.100.77:3128", "--connect-timeout", "500ms"},
			"", 504, "connection_timeout", "198.51.100.77",
		},
		{"no name", []string{"--upstream", "http://proxy.invalid:3128"}, "", 502, "dns_error", "proxy.invalid"},
		{"no HTTP", []string{"--upstream", atProxy}, "220 mail.test ESMTP\n\n", 502, "http_protocol_error", lab.Proxy4.String()},
		{"no answer", []string{"--upstream", atProxy}, "\n", 502, "connection_terminated", lab.Proxy4.String()},
		{
			"half a head",
			[]string{"--upstream", atProxy},
			"HTTP/1.1 200 OK\nContent-Le",
			502, "connection_terminated", lab.Proxy4.String(),
		},
		{
			"a field that is none",
			[]string{"--upstream", atProxy},
			"HTTP/1.1 200 OK\nContent-Length\n\n", 502, "http_protocol_error", lab.Proxy4.String(),
		},
		{
			"a head without end",
			[]string{"--upstream", atProxy},
			"HTTP/1.1 200 OK\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\n", 100) + "\n", 502, "http_response_header_section_size", lab.Proxy4.String(),
		},
		{
			"the exempt server does not listen",
			[]string{"--upstream", atProxy, "--no-proxy", "origin.test"},
			"", 502, "connection_refused", "the server",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newHTTPWorld(t)
			if test.answer != "" {
				scripted(t, w.Proxy, test.answer)
			}
			w.past.Close() // the exempt server
			g := startGateway(t, w.Gateway, append([]string{"--http-ports", fmt.Sprint(portWeb)}, test.arguments...)...)
			for _, method := range []string{"GET", "HEAD"} {
				c := w.converse(lab.Origin4, portWeb)
				c.say(method + " /status/200 HTTP/1.1\nHost: origin.test\n\n")
				response, body := c.hearTo(method)
				c.wantEnd()
				proxyStatus := "transproxy-tproxy; error=" + test.failure
				if got := response.Header.Get("Proxy-Status"); response.StatusCode != test.status || !strings.HasPrefix(got, proxyStatus) {
					t.Errorf("%s: %s, Proxy-Status: %s; want %d, %s", method, response.Status, got, test.status, proxyStatus)
				}
				if !response.Close || !strings.HasPrefix(response.Header.Get("Content-Type"), "text/html") || response.ContentLength <= 0 {
					t.Errorf("%s: %v", method, response.Header)
				}
				if method == "GET" && (!strings.Contains(body, test.says) || !strings.Contains(body, "transproxy-tproxy")) {
					t.Errorf("the page: %q", body)
				}
				if strings.Contains(body+response.Header.Get("Proxy-Status"), "p%40ss") || strings.Contains(body, password) {
					t.Errorf("a page with the password: %q", body)
				}
			}
			for _, f := range g.waitFlows(2) {
				if f.Message != "request" || f.Status != test.status || f.End == "done" || f.URL != "http://origin.test:8080/status/200" {
					t.Errorf("access line %+v", f)
				}
			}
		})
	}
}

// TestAnswersOfTheProxyItself are passed on as they are: they say more than ours would.
func TestAnswersOfTheProxyItself(t *testing.T) {
	const answer = "HTTP/1.1 403 Forbidden\nContent-Type: text/plain\nX-Squid-Error: ERR_ACCESS_DENIED 0\nContent-Length: 7\n\nblocked"
	w := newHTTPWorld(t)
	scripted(t, w.Proxy, answer)
	w.gateway("--upstream", fmt.Sprintf("http://%s:%d", lab.Proxy4, portScripted))
	for _, address := range both {
		c := w.converse(address, portWeb)
		c.say("GET / HTTP/1.1\nHost: " + named(address) + "\n\n")
		response, body := c.hear()
		if response.StatusCode != 403 || body != "blocked" || response.Header.Get("X-Squid-Error") != "ERR_ACCESS_DENIED 0" || response.Header.Get("Proxy-Status") != "" {
			t.Errorf("%s %v %q", response.Status, response.Header, body)
		}
	}
}

// TestCutAnswers: an answer that ends before its time does not look whole to the client.
func TestCutAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"length": "HTTP/1.1 200 OK\nContent-Length: 10\n\n12345",
		"chunks": "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n5\n12345\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newHTTPWorld(t)
			scripted(t, w.Proxy, answer)
			g := w.gateway("--upstream", fmt.Sprintf("http://%s:%d", lab.Proxy4, portScripted))
			for _, version := range []string{"1.1", "1.0"} {
				c := w.converse(lab.Origin4, portWeb)
				c.say("GET / HTTP/" + version + "\nHost: origin.test\n\n")
				response, err := http.ReadResponse(c.reader, nil)
				var body []byte
				if err == nil {
					body, err = io.ReadAll(response.Body)
				}
				if err == nil || errors.Is(err, io.EOF) {
					t.Errorf("HTTP/%s: %q looks whole", version, body)
				}
			}
			for _, f := range g.waitFlows(2) {
				if f.End == "done" || f.Received != 5 {
					t.Errorf("access line %+v", f)
				}
			}
		})
	}
}

// TestPasswordRefusedOnce: after one 407 the proxy is left alone, by requests, upgrades,
// tunnels and explicit clients that would get the gateway's credential alike: proxies
// lock accounts out.
func TestPasswordRefusedOnce(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Password = "changed" })
	w.gateway("--upstream-auth", "auto")
	get := "GET http://origin.test/ HTTP/1.1\nHost: origin.test\n\n"
	upgrade := "GET / HTTP/1.1\nHost: origin.test\nConnection: Upgrade\nUpgrade: websocket\n\n"
	for _, request := range []struct {
		of   *conversation
		text string
	}{
		{w.converse(lab.Origin4, 80), get},
		{w.converse(lab.Origin6, 80), get},
		{w.converse(lab.Origin4, 80), upgrade},
		{w.explicitly(w.Gateway, authenticating), get},
		{w.explicitly(w.Gateway, authenticating), "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\n\n"},
	} {
		request.of.say(request.text)
		response, body := request.of.hear()
		if response.StatusCode != http.StatusBadGateway || !strings.HasPrefix(response.Header.Get("Proxy-Status"), "transproxy-tproxy; error=proxy_configuration_error") {
			t.Errorf("%q: %s %v", request.text, response.Status, response.Header)
		}
		// Whoever is asked for a password that is not his gets a dialogue that cannot end.
		if response.Header.Get("Proxy-Authenticate") != "" || strings.Contains(body, password) {
			t.Errorf("%q: %v %q", request.text, response.Header, body)
		}
	}
	w.wantRefusal(lab.Origin4, 22, time.Second)
	if refused, demanded := w.proxy.Refused(), w.proxy.Demanded(); refused != 1 || demanded != 1 {
		t.Errorf("the proxy refused %d requests with and %d without a password, want 1 and 1", refused, demanded)
	}
}

// TestUploadToAProxyThatGoes: a request of which the proxy has read a part is not sent
// again.
func TestUploadToAProxyThatGoes(t *testing.T) {
	w := newHTTPWorld(t)
	var connections int
	listener, err := w.Proxy.Listen("tcp", fmt.Sprintf("[::]:%d", portScripted))
	must(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections++
			io.CopyN(io.Discard, conn, 1000)
			conn.Close() // a reset: there is more to read
		}
	}()
	w.gateway("--upstream", fmt.Sprintf("http://%s", netip.AddrPortFrom(lab.Proxy4, portScripted)))
	c := w.converse(lab.Origin4, portWeb)
	const size = 1 << 20
	c.say(fmt.Sprintf("POST /echo HTTP/1.1\nHost: origin.test\nContent-Length: %d\n\n", size))
	go sendNoise(c, size, false)
	if response, _ := c.hear(); response.StatusCode != http.StatusBadGateway {
		t.Error(response.Status)
	}
	listener.Close()
	<-ended
	if connections != 1 {
		t.Errorf("%d connections to the proxy", connections)
	}
}
