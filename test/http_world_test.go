package test

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// portWeb is where the web servers of an httpWorld are: the other stand-ins have 80.
const portWeb = 8080

// httpWorld is a world with web servers of net/http on portWeb.
type httpWorld struct {
	*world
	web  *lab.HTTPOrigin // behind the proxy
	past *lab.HTTPOrigin // what is reached past it
}

func newHTTPWorld(t *testing.T) *httpWorld {
	t.Helper()
	w := &httpWorld{newWorld(t), &lab.HTTPOrigin{Label: "origin"}, &lab.HTTPOrigin{Label: "direct"}}
	must(t, w.web.Start(w.Origin, portWeb))
	t.Cleanup(w.web.Close)
	must(t, w.past.Start(w.Router, portWeb))
	t.Cleanup(w.past.Close)
	return w
}

// gateway starts the program, which carries the requests to portWeb one by one.
func (w *httpWorld) gateway(arguments ...string) *gateway {
	w.t.Helper()
	return w.world.gateway(append([]string{"--http-ports", fmt.Sprintf("80,%d", portWeb)}, arguments...)...)
}

// way is one by which requests leave the gateway.
type way struct {
	name      string
	arguments []string
	origin    string // which server answers
}

var ways = []way{
	{"proxy", []string{"--upstream", upstream()}, "origin"},
	{"exempt", []string{"--upstream", upstream(), "--no-proxy", "origin.test,six.test"}, "direct"},
	{"SOCKS", []string{"--upstream", fmt.Sprintf("socks5://%s%s", proxyUser, lab.Proxy4)}, "origin"},
}

// eachWay runs a test for each way, over each family.
func eachWay(t *testing.T, test func(t *testing.T, w *httpWorld, v way, address netip.Addr)) {
	for _, v := range ways {
		t.Run(v.name, func(t *testing.T) {
			w := newHTTPWorld(t)
			socks := &lab.SOCKSProxy{User: user, Password: password, Hosts: hosts}
			must(t, socks.Start(w.Proxy, lab.SOCKSPort))
			t.Cleanup(socks.Close)
			startGateway(t, w.Gateway, append([]string{"--http-ports", fmt.Sprint(portWeb)}, v.arguments...)...)
			for _, address := range both {
				t.Run(family(address), func(t *testing.T) {
					within := *w.world
					within.t = t
					test(t, &httpWorld{&within, w.web, w.past}, v, address)
				})
			}
		})
	}
}

func family(address netip.Addr) string {
	if address.Is6() {
		return "IPv6"
	}
	return "IPv4"
}

// named is the name of one of the origin's addresses.
func named(address netip.Addr) string {
	for name, known := range hosts {
		if known == address {
			return name
		}
	}
	return ""
}

// hearTo is hear for the answer to a method: that to HEAD has no body.
func (c *conversation) hearTo(method string) (*http.Response, string) {
	c.t.Helper()
	if method != http.MethodHead {
		return c.hear()
	}
	response, err := http.ReadResponse(c.reader, &http.Request{Method: method})
	must(c.t, err)
	return response, ""
}

// wantEnd wants the other side to have closed the connection, in order and with nothing
// more to say.
func (c *conversation) wantEnd() {
	c.t.Helper()
	if next, err := c.reader.Peek(1); len(next) > 0 || err == nil || err.Error() != "EOF" {
		c.t.Errorf("%q, %v instead of the end", next, err)
	}
}

// basic is the value of a Basic credential (RFC 7617 section 2).
func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// lines turns text in which \n stands for CRLF into what goes over the wire.
func lines(text string) string { return strings.ReplaceAll(text, "\n", "\r\n") }
