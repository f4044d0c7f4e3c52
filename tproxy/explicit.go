package tproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/forward"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Explicit is a listener for clients that are told to use the gateway as their proxy.
type Explicit struct {
	Listen netip.AddrPort
	Kind   forward.Kind
	// Flag is what the listener is called in errors, with the flag that sets it.
	Flag string
	// Allow reports whether a client may use it. It must be safe for concurrent use.
	Allow func(netip.Addr) bool
}

// explicitListener is one that is bound.
type explicitListener struct {
	Explicit
	listener *net.TCPListener
}

// listenExplicit binds the explicit listeners. The caller closes them.
func (s *Server) listenExplicit() error {
	for _, explicit := range s.config.Explicit {
		config := net.ListenConfig{Control: s.prepare, KeepAliveConfig: upstream.KeepAlive()}
		config.SetMultipathTCP(false)
		network := "tcp4"
		if explicit.Listen.Addr().Is6() {
			network = "tcp6" // not both: each family has its own
		}
		listener, err := config.Listen(context.Background(), network, explicit.Listen.String())
		if errors.Is(err, unix.EADDRINUSE) {
			err = fmt.Errorf("%s %s: the port is taken: choose another, or `off`", explicit.Flag, explicit.Listen)
		} else if err != nil {
			err = fmt.Errorf("%s %s: %w", explicit.Flag, explicit.Listen, err)
		}
		if err != nil {
			s.closeExplicit()
			return err
		}
		s.explicit = append(s.explicit, explicitListener{explicit, listener.(*net.TCPListener)})
	}
	return nil
}

// prepare marks a listening socket; what it accepts inherits that.
func (s *Server) prepare(_, _ string, raw syscall.RawConn) error {
	if s.config.Mark == 0 {
		return nil
	}
	var failure error
	if err := raw.Control(func(fd uintptr) { failure = setMark(int(fd), s.config.Mark) }); err != nil {
		return err
	}
	return failure
}

func (s *Server) closeExplicit() {
	for _, explicit := range s.explicit {
		explicit.listener.Close()
	}
}

// serveExplicit accepts until the listeners are closed.
func (s *Server) serveExplicit() {
	var serving sync.WaitGroup
	for _, explicit := range s.explicit {
		serving.Go(func() { s.acceptExplicit(explicit) })
	}
	serving.Wait()
}

// The pauses of a listener that has failed to accept, because there are no
// descriptors left for example: one failure must not end it.
const (
	firstAcceptPause = 5 * time.Millisecond
	lastAcceptPause  = time.Second
)

func (s *Server) acceptExplicit(explicit explicitListener) {
	pause := firstAcceptPause
	for {
		conn, err := explicit.listener.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			s.acceptFailed(err, pause)
			time.Sleep(pause)
			pause = min(2*pause, lastAcceptPause)
			continue
		}
		pause = firstAcceptPause
		conn.SetLinger(0) // until an orderly end
		if !s.admit() {
			conn.Close()
			continue
		}
		s.serveClient(conn, explicit)
	}
}

var errNotAllowed = errors.New("this client may not use the proxy")

// serveClient carries the requests of one explicit client, and does not wait.
func (s *Server) serveClient(conn *net.TCPConn, explicit explicitListener) {
	client := forward.Client{
		Kind:        explicit.Kind,
		Address:     unmapped(conn.RemoteAddr()),
		Destination: unmapped(conn.LocalAddr()),
	}
	session := s.forwarder.Open(conn, client, nil)
	allowed := explicit.Allow(client.Address.Addr())
	s.detached.carry(session.Drain, func(ctx context.Context) {
		if allowed {
			session.Serve(ctx)
		} else {
			session.Refuse(errNotAllowed)
		}
		s.open.Add(-1)
	})
}

func unmapped(address net.Addr) netip.AddrPort {
	port := address.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(port.Addr().Unmap(), port.Port())
}
