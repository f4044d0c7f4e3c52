package main

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// How the stand-ins call themselves in the answers: what one of them has answered has
// gone the way to it.
const (
	proxyServer  = "proxy"
	originServer = "origin"
)

// bodySize is that of every answer, in bytes.
const bodySize = 1024

// standIn is a server that costs little and is the same for all gateways: it reads no
// more of a request than it must, and answers with what was made beforehand. As the
// proxy it answers in the origin's place. It takes requests of one form alone, so
// that no gateway is measured that does something else.
type standIn struct {
	form       []byte // how a request begins
	kept, last []byte // answers: on a connection that stays, and on one that ends
	listener   net.Listener
	running    sync.WaitGroup

	mutex sync.Mutex
	open  map[net.Conn]struct{} // nil once it is closed
}

// listen starts a server. The caller closes it.
func listen(ns *netns.NS, address, name, form string) (*standIn, error) {
	s := newStandIn(name, form)
	var err error
	if s.listener, err = ns.Listen("tcp4", address); err != nil {
		return nil, err
	}
	s.running.Go(s.accept)
	return s, nil
}

func newStandIn(name, form string) *standIn {
	answer := func(fields string) []byte {
		return fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nServer: %s\r\nDate: %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n%s\r\n%s",
			name, time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT"), bodySize, fields, strings.Repeat("x", bodySize))
	}
	return &standIn{
		form: []byte(form), kept: answer(""), last: answer("Connection: close\r\n"),
		open: make(map[net.Conn]struct{}),
	}
}

// close ends the server and its connections.
func (s *standIn) close() {
	s.listener.Close()
	s.mutex.Lock()
	for conn := range s.open {
		conn.Close()
	}
	s.open = nil
	s.mutex.Unlock()
	s.running.Wait()
}

func (s *standIn) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mutex.Lock()
		closed := s.open == nil
		if !closed {
			s.open[conn] = struct{}{}
		}
		s.mutex.Unlock()
		if closed {
			conn.Close()
			return
		}
		s.running.Go(func() {
			s.serve(conn)
			conn.Close()
			s.mutex.Lock()
			delete(s.open, conn)
			s.mutex.Unlock()
		})
	}
}

// maxHead bounds the head of a request, in bytes; those of this load have 300.
const maxHead = 4096

// serve answers requests, which have no bodies, until either side ends it.
func (s *standIn) serve(conn net.Conn) {
	buffer := make([]byte, maxHead)
	filled := 0
	for {
		length := bytes.Index(buffer[:filled], []byte("\r\n\r\n")) + 4
		if length < 4 {
			got, err := conn.Read(buffer[filled:])
			if err != nil || got == 0 { // the end, or a head that is too long
				return
			}
			filled += got
			continue
		}
		answer, more := s.answer(buffer[:length])
		if _, err := conn.Write(answer); err != nil || !more {
			return
		}
		filled = copy(buffer, buffer[length:filled])
	}
}

// answer makes that to a head; more says whether another request may follow.
func (s *standIn) answer(head []byte) (answer []byte, more bool) {
	switch {
	case !bytes.HasPrefix(head, s.form):
		line, _, _ := bytes.Cut(head, []byte("\r\n"))
		text := fmt.Sprintf("not served here: %s\n", line)
		return fmt.Appendf(nil, "HTTP/1.1 501 Not Implemented\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(text), text), false
	case bytes.Contains(head, []byte("onnection: close\r\n")): // in the writings of wrk and of all contenders
		return s.last, false
	}
	return s.kept, true
}
