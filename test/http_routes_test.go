package test

import (
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// TestExemptSpellings: each request of one connection is routed by its own host, however
// that is written; the name itself goes on as the client wrote it.
func TestExemptSpellings(t *testing.T) {
	w := newWorld(t)
	g := w.gateway("--no-proxy", "exempt.test,.below.test,six.test:443")
	for _, address := range both {
		c := w.converse(address, 80)
		for _, request := range []struct{ line, host, want string }{
			{"GET /1", "origin.test", "origin http://origin.test/1"},
			{"GET /2", "exempt.test", "direct http://exempt.test/2"},
			{"GET /3", "EXEMPT.Test", "direct http://EXEMPT.Test/3"},
			{"GET /4", "exempt.test.", "direct http://exempt.test./4"},
			{"GET /5", "exempt.test:80", "direct http://exempt.test:80/5"},
			{"GET /6", "a.exempt.test", "direct http://a.exempt.test/6"},
			{"GET /7", "a.below.test", "direct http://a.below.test/7"},
			{"GET /8", "six.test", "origin http://six.test/8"}, // another port is exempt
			{"GET /9", "Origin.TEST.", "origin http://origin.test/9"},
			// The target decides, and not a Host that says something else (RFC 9112 section 3.2.2).
			{"GET http://exempt.test/10", "origin.test", "direct http://exempt.test/10"},
			{"GET http://origin.test/11", "exempt.test", "origin http://origin.test/11"},
		} {
			c.ask(request.line+" HTTP/1.1\nHost: "+request.host+"\n\n", request.want)
		}
		c.say("GET /12 HTTP/1.1\nHost: notexempt.test\n\n")
		if response, _ := c.hear(); response.StatusCode != http.StatusServiceUnavailable { // the proxy does not know it
			t.Errorf("notexempt.test: %s", response.Status)
		}
	}
	var carried []string
	for range both {
		for _, target := range []string{"origin.test/1", "six.test/8", "origin.test/9", "origin.test/11"} {
			carried = append(carried, "GET http://"+target)
		}
	}
	if got := w.proxy.Requests(); !slices.Equal(got, carried) {
		t.Errorf("the proxy saw %q, want %q", got, carried)
	}
	directly := 0
	for _, f := range g.waitFlows(24) {
		if f.Way == "direct" {
			directly++
		}
	}
	if directly != 14 {
		t.Errorf("%d requests went directly, want 14", directly)
	}
}

// TestRequestAtStop: a request that is under way at the stop comes to its end, and the
// connection with it.
func TestRequestAtStop(t *testing.T) {
	w := newHTTPWorld(t)
	g := w.gateway()
	captured := w.converse(lab.Origin4, portWeb)
	explicit := w.explicitly(w.Gateway, authenticating)
	var answers []*http.Response
	for c, target := range map[*conversation]string{captured: "/early", explicit: "http://origin.test:8080/early"} {
		c.say("POST " + target + " HTTP/1.1\nHost: origin.test\nContent-Length: 4\n\n12")
		response, err := http.ReadResponse(c.reader, nil)
		must(t, err)
		answers = append(answers, response)
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		g.stop()
	}()
	time.Sleep(200 * time.Millisecond) // the stop is under way
	for _, c := range []*conversation{captured, explicit} {
		c.say("34")
	}
	for _, response := range answers {
		if body, err := io.ReadAll(response.Body); err != nil || string(body) != "early\n4\n" {
			t.Errorf("%q, %v", body, err)
		}
	}
	captured.wantEnd()
	explicit.wantEnd()
	<-stopped
	for _, f := range g.waitFlows(2) {
		if f.End != "done" || f.Sent != 4 {
			t.Errorf("access line %+v", f)
		}
	}
}
