package test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// conversation is a connection on which a test speaks HTTP by hand.
type conversation struct {
	t *testing.T
	*net.TCPConn
	reader *bufio.Reader
}

func (w *world) converse(address netip.Addr, port int) *conversation {
	w.t.Helper()
	conn := w.dial(address, port)
	return &conversation{w.t, conn, bufio.NewReader(conn)}
}

// say sends text, in which \n stands for CRLF.
func (c *conversation) say(text string) {
	c.t.Helper()
	_, err := io.WriteString(c, strings.ReplaceAll(text, "\n", "\r\n"))
	must(c.t, err)
}

// hear reads one answer.
func (c *conversation) hear() (*http.Response, string) {
	c.t.Helper()
	response, err := http.ReadResponse(c.reader, nil)
	must(c.t, err)
	body, err := io.ReadAll(response.Body)
	must(c.t, err)
	return response, strings.TrimSpace(string(body))
}

// ask sends a request and wants a body in answer.
func (c *conversation) ask(request, want string) {
	c.t.Helper()
	c.say(request)
	if response, body := c.hear(); response.StatusCode != http.StatusOK || body != want {
		c.t.Errorf("%q: %s, %q; want %q", request, response.Status, body, want)
	}
}

// TestEachRequestByItsHost: two hosts on one connection, one of them exempt, and a
// client of HTTP/1.0 that names none, over both families.
func TestEachRequestByItsHost(t *testing.T) {
	for _, address := range both {
		w := newWorld(t)
		g := w.gateway("--no-proxy", "exempt.test")
		c := w.converse(address, 80)
		c.ask("GET /a HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/a")
		c.ask("GET /b HTTP/1.1\nHost: exempt.test\n\n", "direct http://exempt.test/b")
		c.ask("GET /c?d=e HTTP/1.1\nHost: six.test\n\n", "origin http://six.test/c")
		place := address.String()
		if address.Is6() {
			place = "[" + place + "]"
		}
		c.ask("GET /d HTTP/1.0\n\n", "origin http://"+place+"/d")

		requests := []string{"GET http://origin.test/a", "GET http://six.test/c?d=e", "GET http://" + place + "/d"}
		if got := w.proxy.Requests(); !slices.Equal(got, requests) {
			t.Errorf("the proxy saw %q and not %q", got, requests)
		}
		if got := w.proxy.Targets(); len(got) > 0 {
			t.Errorf("the proxy saw CONNECT %q", got)
		}
		if sources := w.direct.Sources(); len(sources) != 1 {
			t.Errorf("%d connections went past the proxy, want 1", len(sources))
		}
		urls := []string{"http://origin.test/a", "http://exempt.test/b", "http://six.test/c", "http://" + place + "/d"}
		for i, f := range g.waitFlows(4) {
			way := map[bool]string{true: "direct", false: "upstream"}[i == 1]
			if f.Message != "request" || f.Method != "GET" || f.URL != urls[i] || f.Status != 200 || f.Way != way || f.End != "done" {
				t.Errorf("access line %+v", f)
			}
		}
		g.stop()
	}
}

// TestUpgrade: through a proxy that passes it on, and through one that does not and is
// asked for a tunnel.
func TestUpgrade(t *testing.T) {
	for _, refuses := range []bool{false, true} {
		w := newWorld(t)
		if refuses {
			w.proxy.Change(func() { w.proxy.NoUpgrade = "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n" })
		}
		g := w.gateway()
		c := w.converse(lab.Origin4, 80)
		c.say("GET /chat HTTP/1.1\nHost: origin.test\nConnection: Upgrade\nUpgrade: websocket\n\nearly")
		if response, _ := c.hear(); response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Upgrade") != "websocket" {
			t.Fatalf("answered %s %v", response.Status, response.Header)
		}
		c.say(" and late")
		must(t, c.CloseWrite())
		if echo, err := io.ReadAll(c.reader); err != nil || string(echo) != "early and late" {
			t.Errorf("echoed %q, %v", echo, err)
		}
		if f := g.waitFlows(1)[0]; f.Status != 101 || f.Sent != 14 || f.Received != 14 {
			t.Errorf("access line %+v", f)
		}
		if targets := w.proxy.Targets(); refuses && !slices.Equal(targets, []string{"origin.test:80"}) || !refuses && len(targets) > 0 {
			t.Errorf("the proxy saw CONNECT %q", targets)
		}
		g.stop()
	}
}

// TestContinue: the client sends the body when the server says so.
func TestContinue(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	c := w.converse(lab.Origin4, 80)
	c.say("POST / HTTP/1.1\nHost: origin.test\nExpect: 100-continue\nContent-Length: 5\n\n")
	if response, _ := c.hear(); response.StatusCode != http.StatusContinue {
		t.Fatalf("answered %s", response.Status)
	}
	c.ask("hello", "origin http://origin.test/")
}

// TestSmuggling: what could be read in two ways is answered with 400, and neither the
// proxy nor the origin sees anything of it.
func TestSmuggling(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	for _, request := range []string{
		"POST / HTTP/1.1\nHost: origin.test\nContent-Length: 30\nTransfer-Encoding: chunked\n\n0\n\nGET /s HTTP/1.1\nHost: a\n\n",
		"POST / HTTP/1.1\nHost: origin.test\nContent-Length: 5\nContent-Length: 6\n\nhello",
		"GET / HTTP/1.1\nHost: origin.test\nHost: six.test\n\n",
		"GET / HTTP/1.1\nHost : origin.test\n\n",
		"GET / HTTP/1.1\nHost: origin.test\n folded\n\n",
		"GET / HTTP/1.1\nHost: origin.test\n\n"[:17] + "\nX: y\n\n",
	} {
		c := w.converse(lab.Origin4, 80)
		c.say(request)
		response, body := c.hear()
		if response.StatusCode != http.StatusBadRequest || !strings.Contains(response.Header.Get("Proxy-Status"), "http_request_error") {
			t.Errorf("%q: %s %v", request, response.Status, response.Header)
		}
		if !strings.Contains(body, "transproxy-tproxy") {
			t.Errorf("the page does not say who speaks: %q", body)
		}
	}
	if requests, targets := w.proxy.Requests(), w.proxy.Targets(); len(requests)+len(targets) > 0 {
		t.Errorf("the proxy saw %q and %q", requests, targets)
	}
	if sources := w.origin.Sources(); len(sources) > 0 {
		t.Errorf("the origin saw %v", sources)
	}
}

// TestPages: what keeps a request from being answered is told on a page.
func TestPages(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	c := w.converse(lab.Origin4, 80)
	w.proxy.Close()
	c.say("GET / HTTP/1.1\nHost: origin.test\n\n")
	response, body := c.hear()
	if response.StatusCode != http.StatusBadGateway || !strings.Contains(response.Header.Get("Proxy-Status"), "error=connection_refused") {
		t.Errorf("without a proxy: %s %v", response.Status, response.Header)
	}
	if !strings.Contains(body, lab.Proxy4.String()) || strings.Contains(body, password) {
		t.Errorf("the page: %q", body)
	}
}

// TestPlainWrongPassword: one 407 at the proxy, and then nothing until SIGHUP.
func TestPlainWrongPassword(t *testing.T) {
	w := newWorld(t)
	w.proxy.Change(func() { w.proxy.Password = "changed" })
	g := w.gateway()
	for range 5 {
		c := w.converse(lab.Origin4, 80)
		c.say("GET / HTTP/1.1\nHost: origin.test\n\n")
		response, _ := c.hear()
		if response.StatusCode != http.StatusBadGateway || !strings.Contains(response.Header.Get("Proxy-Status"), "error=proxy_configuration_error") {
			t.Errorf("%s %v", response.Status, response.Header)
		}
	}
	if n := w.proxy.Refused(); n != 1 {
		t.Errorf("the proxy refused %d requests and not 1", n)
	}
	g.waitFor("the upstream refuses the credential")
	w.proxy.Change(func() { w.proxy.Password = password })
	must(t, g.command.Process.Signal(syscall.SIGHUP))
	g.waitFor("reloaded")
	w.converse(lab.Origin4, 80).ask("GET / HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/")
}

// TestNoHTTP: a port 80 on which something else is spoken, or on which the server
// speaks first, is tunnelled; and so is all of it with --http-ports off.
func TestNoHTTP(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--http-ports", "80,9003", "--peek-timeout", "300ms", "--tcp-proxy-dports", "22,9003")
	c := w.converse(lab.Origin4, lab.PortEcho)
	c.say("no HTTP\n")
	if line, err := c.reader.ReadString('\n'); err != nil || line != "no HTTP\r\n" {
		t.Errorf("echoed %q, %v", line, err)
	}
	if got, err := banner(t, w.Client, lab.Origin4, 22); got != lab.Banner {
		t.Errorf("%q, %v", got, err)
	}
	g.stop()
	g = w.gateway("--http-ports", "off")
	w.converse(lab.Origin4, 80).ask("GET / HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/")
	if requests := w.proxy.Requests(); len(requests) > 0 {
		t.Errorf("the proxy saw %q", requests)
	}
	if targets := w.proxy.Targets(); !slices.Contains(targets, "origin.test:80") {
		t.Errorf("the proxy saw CONNECT %q", targets)
	}
	g.stop()
}

// TestAccessLog: the query is left out unless asked for, and SIGHUP opens the file anew.
func TestAccessLog(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "access.log")
	g := w.gateway("--access-log", file, "--access-log-query")
	c := w.converse(lab.Origin4, 80)
	c.ask("GET /a?b=c HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/a")
	wantLine := func(name, text string) {
		t.Helper()
		if !within(5*time.Second, func() bool {
			content, _ := os.ReadFile(name)
			return strings.Contains(string(content), text)
		}) {
			t.Errorf("%s has no %s", name, text)
		}
	}
	wantLine(file, `"url":"http://origin.test/a?b=c","status":200`)
	must(t, os.Rename(file, file+".1"))
	must(t, g.command.Process.Signal(syscall.SIGHUP))
	g.waitFor("the access log is reopened")
	c.ask("GET /second HTTP/1.1\nHost: origin.test\n\n", "origin http://origin.test/second")
	wantLine(file, `"url":"http://origin.test/second"`)
	g.stop()
	if n := strings.Count(g.output.String(), `"message":"request"`); n > 0 {
		t.Errorf("%d lines of the access log are on standard output as well", n)
	}
}
