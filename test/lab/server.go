package lab

import (
	"fmt"
	"net"
	"sync"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// servers are the listeners of one stand-in and their open connections.
type servers struct {
	mutex     sync.Mutex
	closed    bool
	listeners []net.Listener
	open      map[net.Conn]struct{}
	running   sync.WaitGroup
}

// listen accepts connections on a port, in both families, and serves each on a
// goroutine of its own; serve's connection is closed when it returns.
func (s *servers) listen(ns *netns.NS, port int, serve func(*net.TCPConn)) error {
	listener, err := ns.Listen("tcp", fmt.Sprintf("[::]:%d", port))
	if err != nil {
		return err
	}
	s.accept(listener, func(conn net.Conn) { serve(conn.(*net.TCPConn)) })
	return nil
}

// accept is listen on a listener that is there.
func (s *servers) accept(listener net.Listener, serve func(net.Conn)) {
	s.mutex.Lock()
	s.listeners = append(s.listeners, listener)
	s.mutex.Unlock()
	s.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if !s.add(conn) {
				conn.Close()
				return
			}
			s.running.Go(func() {
				defer s.remove(conn)
				serve(conn)
			})
		}
	})
}

func (s *servers) add(conn net.Conn) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.open == nil {
		s.open = make(map[net.Conn]struct{})
	}
	s.open[conn] = struct{}{}
	return !s.closed
}

func (s *servers) remove(conn net.Conn) {
	conn.Close()
	s.mutex.Lock()
	defer s.mutex.Unlock()
	delete(s.open, conn)
}

func (s *servers) close() {
	s.mutex.Lock()
	s.closed = true
	for _, listener := range s.listeners {
		listener.Close()
	}
	for conn := range s.open {
		conn.Close()
	}
	s.mutex.Unlock()
	s.running.Wait()
}
