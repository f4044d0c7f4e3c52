package forward

import (
	"fmt"
	"html"
	"net/http"
	"strings"
)

// problem is a response that the gateway makes itself.
type problem struct {
	status int
	kind   string // what RFC 9209 section 2.3 calls it
	what   string // what failed, in a line
	advice string // what to do about it
	err    error  // the cause, told to the client as well; may be nil
}

// self is what the gateway calls itself in Proxy-Status and Via.
const self = "transproxy-tproxy"

// page is the whole response, to be sent before the connection is closed.
func (p problem) page(method string) []byte {
	details := p.what
	if p.err != nil {
		details += ": " + p.err.Error()
	}
	body := fmt.Sprintf("<!DOCTYPE html>\n<html lang=\"en\"><title>%d %s</title>\n"+
		"<h1>%s</h1>\n<p>%s</p>\n<p>%s</p>\n"+
		"<hr><p>This page was made by the gateway %s between you and the server.</p></html>\n",
		p.status, http.StatusText(p.status), http.StatusText(p.status),
		html.EscapeString(details), html.EscapeString(p.advice), self)
	head := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n"+
		"Cache-Control: no-store\r\nProxy-Status: %s; error=%s; details=%s\r\nConnection: close\r\n\r\n",
		p.status, http.StatusText(p.status), len(body), self, p.kind, quote(details))
	if method == http.MethodHead {
		return []byte(head)
	}
	return []byte(head + body)
}

// maxDetails bounds what a cause may add to a field.
const maxDetails = 300 // bytes

// quote makes a String of structured fields (RFC 9651 section 3.3.3): printable ASCII.
func quote(text string) string {
	var quoted strings.Builder
	quoted.WriteByte('"')
	for i := range min(len(text), maxDetails) {
		c := text[i]
		switch {
		case c == '"' || c == '\\':
			quoted.WriteByte('\\')
		case c < ' ' || c > '~':
			c = '?'
		}
		quoted.WriteByte(c)
	}
	quoted.WriteByte('"')
	return quoted.String()
}
