package lab

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// HTTPOrigin is a stand-in web server with a path for each kind of answer. It is that
// of net/http, whose opinion on requests and framing is not ours. Label is in the
// X-Origin field of every answer. It remembers what it received.
//
//	/echo      the request's body and trailer section, in chunks
//	/status/N  status N, with a body where there may be one
//	/sized/N   N bytes of Noise, with Content-Length
//	/hints     103 (Early Hints), and then 200
//	/refuse    417 to a client that has not sent its body yet
//	/early     the head and a line before the body is read, and at its end its length
//	/upgrade   101, and an echo
//	/cut       half of the body that was promised
type HTTPOrigin struct {
	Label string

	wire
	server *http.Server
	ended  chan struct{}
}

// Start serves on a port of the namespace, in both families. Whoever starts it closes it.
func (o *HTTPOrigin) Start(ns *netns.NS, port int) error {
	listener, err := ns.Listen("tcp", fmt.Sprintf("[::]:%d", port))
	if err != nil {
		return err
	}
	o.server, o.ended = &http.Server{Handler: o.handler()}, make(chan struct{})
	go func() {
		defer close(o.ended)
		o.server.Serve(tapListener{listener, &o.wire})
	}()
	return nil
}

// Close stops listening and closes all connections but those that were upgraded.
func (o *HTTPOrigin) Close() {
	o.server.Close()
	<-o.ended
}

func (o *HTTPOrigin) handler() http.Handler {
	paths := http.NewServeMux()
	paths.HandleFunc("/echo", echo)
	paths.HandleFunc("/status/{code}", answerStatus)
	paths.HandleFunc("/sized/{bytes}", answerSizedHTTP)
	paths.HandleFunc("/hints", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "hinted")
	})
	paths.HandleFunc("/refuse", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusExpectationFailed) })
	paths.HandleFunc("/early", answerEarly)
	paths.HandleFunc("/upgrade", upgrade)
	paths.HandleFunc("/cut", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "10")
		io.WriteString(w, "12345")
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Origin", o.Label)
		paths.ServeHTTP(w, r)
	})
}

// echo sends back what it reads while it reads it.
func echo(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.EnableFullDuplex()
	for name := range r.Trailer {
		w.Header().Add("Trailer", name)
	}
	body := bufio.NewReader(r.Body)
	body.Peek(1)    // has 100 sent to a client that waits for it
	control.Flush() // no Content-Length from here on
	io.Copy(w, body)
	for name, values := range r.Trailer {
		w.Header()[name] = values
	}
}

func answerStatus(w http.ResponseWriter, r *http.Request) {
	code, err := strconv.Atoi(r.PathValue("code"))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	io.Copy(io.Discard, r.Body)
	w.WriteHeader(code)
	if code != http.StatusNoContent && code != http.StatusNotModified {
		fmt.Fprint(w, code)
	}
}

func answerSizedHTTP(w http.ResponseWriter, r *http.Request) {
	bytes, err := strconv.ParseInt(r.PathValue("bytes"), 10, 64)
	if err != nil {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatInt(bytes, 10))
	if r.Method != http.MethodHead {
		io.CopyN(w, Noise(), bytes)
	}
}

func answerEarly(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	control.EnableFullDuplex()
	io.WriteString(w, "early\n")
	control.Flush()
	n, _ := io.Copy(io.Discard, r.Body)
	fmt.Fprintln(w, n)
}

// upgrade switches to the protocol that is asked for, which is an echo.
func upgrade(w http.ResponseWriter, r *http.Request) {
	protocol := r.Header.Get("Upgrade")
	if protocol == "" || !strings.EqualFold(r.Header.Get("Connection"), "upgrade") {
		http.Error(w, "an upgrade was expected", http.StatusBadRequest)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
	io.Copy(conn, buffered)
}
