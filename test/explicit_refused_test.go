package test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// secretServer is a service of the gateway's own on port 8080, in both families.
func (w *world) secretServer() {
	w.t.Helper()
	listener, err := w.Gateway.Listen("tcp", "[::]:8080")
	must(w.t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "secret") })}
	ended := make(chan struct{})
	go func() { defer close(ended); server.Serve(listener) }()
	w.t.Cleanup(func() { server.Close(); <-ended })
}

// ownAddresses are those of the gateway, loopback, link-local ones and the metadata
// service of clouds, in the spellings that a resolver or a kernel takes for them.
var ownAddresses = []string{
	"127.0.0.1", "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]",
	"0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]", "[64:ff9b::169.254.169.254]",
	lab.Gateway4.String(), "[" + lab.Gateway6.String() + "]", lab.Uplink4.String(), "[" + lab.Uplink6.String() + "]",
	"[::ffff:" + lab.Gateway4.String() + "]", "224.0.0.1", "[ff02::1]", "localhost", "LOCALHOST.",
}

// TestExplicitOwnAddresses: they are refused with a page whichever way would be theirs,
// and the proxy, on which they would be its own, is not asked.
func TestExplicitOwnAddresses(t *testing.T) {
	for _, noProxy := range []string{"", "*"} {
		t.Run("no_proxy "+noProxy, func(t *testing.T) {
			w := newWorld(t)
			w.secretServer()
			w.gateway("--no-proxy", noProxy)
			for _, host := range ownAddresses {
				for _, request := range []string{
					"GET http://" + host + ":8080/ HTTP/1.1\nHost: x\n" + credential + "\n",
					"CONNECT " + host + ":8080 HTTP/1.1\nHost: x\n" + credential + "\n",
				} {
					c := w.explicitly(w.Client, passing)
					c.say(request)
					response, body := c.hear()
					if response.StatusCode != http.StatusForbidden || !strings.HasPrefix(response.Header.Get("Proxy-Status"), "transproxy-tproxy; error=destination_ip_prohibited") {
						t.Errorf("%q: %s %v %q", request, response.Status, response.Header, body)
					}
				}
			}
			if streams := w.proxy.Streams(); len(streams) > 0 {
				t.Errorf("the proxy received %q", streams)
			}
		})
	}
}

// TestExplicitOddAddresses: spellings that inet_aton(3) knows and that are no addresses
// to us do not lead to the gateway's own services; as names nobody has them.
func TestExplicitOddAddresses(t *testing.T) {
	w := newWorld(t)
	w.secretServer()
	w.gateway("--no-proxy", "*", "--connect-timeout", "500ms")
	for _, host := range []string{"2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "0", "%31%32%37.0.0.1"} {
		c := w.explicitly(w.Client, passing)
		c.say("GET http://" + host + ":8080/ HTTP/1.1\nHost: x\n\n")
		if response, body := c.hear(); response.StatusCode < 400 || strings.Contains(body, "secret") {
			t.Errorf("%s: %s %q", host, response.Status, body)
		}
	}
}

// TestExplicitNamesOfOwnAddresses: anybody can have a name that leads to the gateway's
// loopback or to a cloud's metadata. It is found out when the name is resolved, and not
// only when it is an address.
func TestExplicitNamesOfOwnAddresses(t *testing.T) {
	w := newWorld(t)
	w.secretServer()
	names := filepath.Join(t.TempDir(), "hosts")
	text := "127.0.0.1 loop.test mixed.test\n::1 loop6.test\n169.254.169.254 meta.test\n" + lab.Gateway4.String() + " own.test\n" +
		lab.Origin4.String() + " mixed.test fine.test\n"
	must(t, os.WriteFile(names, []byte(text), 0o644))
	// The program gets a view of its own of /etc/hosts.
	run := program("--upstream", upstream(), "--no-proxy", "*")
	command := exec.Command("sh", append([]string{"-c", `mount --bind "$0" /etc/hosts && exec "$@"`, names}, run.Args...)...)
	command.Env = run.Env
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	g := start(t, w.Gateway, command)
	g.waitFor(`"message":"ready"`)
	for _, host := range []string{"loop.test", "LOOP.test.", "loop6.test", "meta.test", "own.test", "mixed.test"} {
		c := w.explicitly(w.Client, passing)
		c.say("GET http://" + host + ":8080/ HTTP/1.1\nHost: x\n\n")
		if response, body := c.hear(); response.StatusCode != http.StatusForbidden || strings.Contains(body, "secret") {
			t.Errorf("%s: %s %q", host, response.Status, body)
		}
		c = w.explicitly(w.Client, passing)
		c.say("CONNECT " + host + ":8080 HTTP/1.1\nHost: x\n\n")
		if response, _ := c.hear(); response.StatusCode != http.StatusForbidden {
			t.Errorf("CONNECT %s: %s", host, response.Status)
		}
	}
	w.explicitly(w.Client, passing).ask("GET http://fine.test/ HTTP/1.1\nHost: x\n\n", "direct http://fine.test/")
}

// TestExplicitAllowTo opens what it names, and nothing beside it.
func TestExplicitAllowTo(t *testing.T) {
	w := newWorld(t)
	w.secretServer()
	w.gateway("--no-proxy", "*", "--explicit-allow-to", "::1,"+lab.Gateway4.String()+"/32")
	for host, want := range map[string]int{
		"[::1]": 200, lab.Gateway4.String(): 200, "127.0.0.1": 403, lab.Uplink4.String(): 403, "[" + lab.Gateway6.String() + "]": 403,
	} {
		c := w.explicitly(w.Client, passing)
		c.say("GET http://" + host + ":8080/ HTTP/1.1\nHost: x\n\n")
		if response, body := c.hear(); response.StatusCode != want || want == 200 && body != "secret" {
			t.Errorf("%s: %s %q, want %d", host, response.Status, body, want)
		}
	}
}

// TestExplicitSmuggling: what is refused of captured clients is refused of these, on
// both listeners, and by those who are not to use them nothing is read at all.
func TestExplicitSmuggling(t *testing.T) {
	w := newWorld(t)
	w.gateway()
	for _, request := range smuggled {
		text := strings.Replace(request.request, " / ", " http://origin.test/ ", 1)
		for _, c := range []*conversation{w.explicitly(w.Client, passing), w.explicitly(w.Gateway, authenticating)} {
			_, err := io.WriteString(c, lines(text)+behind)
			must(t, err)
			if response, _ := c.hear(); response.StatusCode != http.StatusBadRequest {
				t.Errorf("%s: %s", request.name, response.Status)
			}
			c.wantEnd()
		}
	}
	for name, text := range map[string]string{
		"CONNECT with a body":    "CONNECT origin.test:443 HTTP/1.1\nHost: origin.test:443\nContent-Length: 5\n\nhello",
		"CONNECT without a port": "CONNECT origin.test HTTP/1.1\nHost: origin.test\n\n",
		"CONNECT with a user":    "CONNECT x@origin.test:443 HTTP/1.1\nHost: origin.test\n\n",
		"origin form":            "GET / HTTP/1.1\nHost: origin.test\n\n",
		"user in the target":     "GET http://x@origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		"another scheme":         "GET https://origin.test/ HTTP/1.1\nHost: origin.test\n\n",
		"no request":             "\x16\x03\x01\n\n",
	} {
		c := w.explicitly(w.Gateway, authenticating)
		c.say(text)
		if response, _ := c.hear(); response.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", name, response.Status)
		}
	}
	if streams := w.proxy.Streams(); len(streams) > 0 {
		t.Errorf("the proxy received %q", streams)
	}
}

// TestExplicitRights: who may use which listener, by default and by the flags.
func TestExplicitRights(t *testing.T) {
	w := newWorld(t)
	const yes, no = http.StatusOK, http.StatusForbidden
	for _, test := range []struct {
		arguments                  []string
		client, neighbour, gateway [2]int // the answers on the passing and the authenticating listener
	}{
		{nil, [2]int{yes, no}, [2]int{no, no}, [2]int{yes, yes}},
		{[]string{"--explicit-allow", "198.51.100.0/24,2001:db8:2::/64"}, [2]int{no, no}, [2]int{yes, no}, [2]int{yes, yes}},
		{[]string{"--explicit-with-auth-allow", "192.0.2.0/24,2001:db8:1::/64"}, [2]int{yes, yes}, [2]int{no, no}, [2]int{yes, yes}},
		{[]string{"--explicit-allow", "0.0.0.0/0,::/0"}, [2]int{yes, no}, [2]int{yes, no}, [2]int{yes, yes}},
	} {
		t.Run(fmt.Sprint(test.arguments), func(t *testing.T) {
			g := w.gateway(test.arguments...)
			for _, from := range []struct {
				place
				want [2]int
			}{
				{place{w.Client, lab.Gateway4}, test.client},
				{place{w.Client, lab.Gateway6}, test.client},
				{place{w.Neighbour, lab.Uplink4}, test.neighbour},
				{place{w.Neighbour, lab.Uplink6}, test.neighbour},
				{place{w.Gateway, loopback4}, test.gateway},
				{place{w.Gateway, loopback6}, test.gateway},
				{place{w.Gateway, lab.Gateway4}, test.gateway},
			} {
				for i, port := range []int{passing, authenticating} {
					c := w.explicitlyAt(from.place, port)
					c.say("GET http://origin.test/ HTTP/1.1\nHost: origin.test\n" + credential + "\n")
					response, body := c.hear()
					if response.StatusCode != from.want[i] {
						t.Errorf("at %s port %d: %s, want %d", from.at, port, response.Status, from.want[i])
					}
					if response.StatusCode == no && !(response.Close && strings.Contains(body, "transproxy-tproxy")) {
						t.Errorf("at %s port %d: %v %q", from.at, port, response.Header, body)
					}
					must(t, c.Close()) // or the stop waits for it to read the page
				}
			}
			g.stop()
		})
	}
}
