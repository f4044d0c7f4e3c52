package forward

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// answerLocally answers the requests that are for the gateway itself.
func (x *exchange) answerLocally() (end ending, local bool) {
	r := &x.request
	path, _, _ := strings.Cut(string(r.path), "?")
	switch left := find(r.fields, "Max-Forwards"); {
	case x.method == http.MethodConnect && !x.who.Kind.explicit():
		return x.refuse(problem{405, "http_request_error", "a server is not asked for tunnels", "Have the client corrected.", nil}), true
	case string(left) == "0" && (x.method == http.MethodTrace || x.method == http.MethodOptions):
		// RFC 9110 section 7.6.2: here the request has come as far as it may.
		return x.answer(http.StatusOK, "text/plain", ""), true
	case !x.who.Kind.explicit() || r.form == absolute || r.form == authority:
		return again, false
	case (x.method == http.MethodGet || x.method == http.MethodHead) && (path == "/proxy.pac" || path == "/wpad.dat"):
		return x.answer(http.StatusOK, "application/x-ns-proxy-autoconfig", configuration(x.who.Destination)), true
	}
	return x.refuse(problem{
		400, "http_request_error", "this is a proxy and not a web server",
		"Set it as a proxy, or take the configuration from /proxy.pac.", errors.New("the request target has no host"),
	}), true
}

// answer sends a small answer of the gateway's own.
func (x *exchange) answer(status int, mediaType, body string) ending {
	keep := !x.request.close && x.request.body == framing{} && !x.isDraining()
	connection := "close"
	if keep {
		connection = "keep-alive"
	}
	text := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nCache-Control: no-store\r\nConnection: %s\r\n\r\n",
		status, http.StatusText(status), mediaType, len(body), connection)
	if x.method != http.MethodHead {
		text += body
		x.record.Received = int64(len(body))
	}
	x.record.URL, x.record.Status, x.record.FirstByte = x.path(), status, time.Since(x.start)
	err := x.say([]byte(text))
	x.end(err)
	switch {
	case err != nil:
		return closed
	case keep:
		return again
	}
	return lingering
}

// configuration is a proxy auto-configuration file that sends everything to the
// gateway, at the address at which the client asked for it: what goes directly is for
// the gateway to know.
func configuration(gateway netip.AddrPort) string {
	gateway = netip.AddrPortFrom(gateway.Addr().Unmap().WithZone(""), gateway.Port())
	return "function FindProxyForURL(url, host) {\n" +
		"\tif (host === \"localhost\" || host === \"127.0.0.1\" || host === \"::1\") return \"DIRECT\";\n" +
		"\treturn \"PROXY " + gateway.String() + "\";\n}\n"
}
