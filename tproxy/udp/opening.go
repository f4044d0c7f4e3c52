package udp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// maxOpening bounds the associations that are asked for at once. At 100 ms a round
	// trip and three of them for each that is 850 a second.
	maxOpening = 256
	// The pauses before a proxy that does not carry datagrams is asked again are 5, 10, 20,
	// ... seconds and at last 5 minutes: the first is of the order of a proxy's restart, the
	// last makes a proxy that never will see one connection in 5 minutes.
	firstPause = 5 * time.Second
	lastPause  = 5 * time.Minute
	// maxChatter bounds what a proxy may say on the connection of an association, where RFC
	// 1928 has nothing to say, in bytes.
	maxChatter = 4 << 10
)

// opened is what became of the opening of a session's association.
type opened struct {
	slot           int32
	generation     uint32
	control, relay int
	proxy          *upstream.Proxy
	err            error
}

// ask puts a session into the line of those whose association is to be opened.
func (l *loop) ask(ctx context.Context, s *session) {
	s.stage = waiting
	l.line = append(l.line, s)
	l.openNext(ctx)
}

// openNext begins to open associations while that may be done.
func (l *loop) openNext(ctx context.Context) {
	for l.openings < maxOpening && len(l.line) > 0 && !l.stopping.Load() {
		s := l.line[0]
		l.line[0] = nil
		l.line = l.line[1:]
		s.stage = opening
		l.openings++
		slot, generation, client := s.slot, s.generation, s.client.Addr()
		l.running.Go(func() {
			result := opened{slot: slot, generation: generation}
			result.associate(ctx, l.config, client)
			l.results <- result // there is room for each that was begun
			l.wake()
		})
	}
}

// associate opens an association and the socket for its datagrams. After an error there
// are no descriptors.
func (o *opened) associate(ctx context.Context, config *Config, client netip.Addr) {
	o.control, o.relay = none, none
	association, err := config.Associate(ctx, client)
	if err != nil {
		o.err = err
		return
	}
	defer association.Conn.Close()
	o.proxy = association.Proxy
	var local netip.Addr
	if address, ok := association.Conn.LocalAddr().(*net.TCPAddr); ok {
		local = address.AddrPort().Addr().Unmap()
	}
	if o.relay, err = openRelay(local, association.Relay, config.Mark); err != nil {
		o.err = fmt.Errorf("open a socket for the relay %s: %w", association.Relay, err)
		return
	}
	if o.control, err = detach(association.Conn); err != nil {
		unix.Close(o.relay)
		o.relay, o.err = none, err
	}
}

// detach returns a descriptor of a connection that lives on when conn is closed.
func detach(conn *net.TCPConn) (socket int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return none, err
	}
	var failure error
	socket = none
	err = raw.Control(func(fd uintptr) { socket, failure = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, failure); err != nil {
		return none, fmt.Errorf("keep the connection of an association: %w", err)
	}
	return socket, nil
}

// finish takes in the associations that were opened, or not.
func (l *loop) finish(ctx context.Context) {
	for len(l.results) > 0 {
		result := <-l.results
		l.openings--
		s := l.slots.find(result.slot, result.generation)
		err := result.err
		if err == nil && s != nil {
			err = l.grant(s, result)
		}
		switch {
		case s == nil || err != nil:
			for _, socket := range []int{result.control, result.relay} {
				if socket != none {
					unix.Close(socket)
				}
			}
			if s != nil && ctx.Err() == nil {
				l.fail(s, err)
			}
		default:
			l.sendQueued(s)
		}
	}
	l.openNext(ctx)
}

// grant gives a session its association. After an error the descriptors stay the caller's.
func (l *loop) grant(s *session, o opened) error {
	if err := l.watch(o.relay, s.slot, s.generation, onRelay, unix.EPOLLIN); err != nil {
		return err
	}
	if err := l.watch(o.control, s.slot, s.generation, onControl, unix.EPOLLIN|unix.EPOLLRDHUP); err != nil {
		return err
	}
	s.stage, s.control, s.relay = granted, o.control, o.relay
	s.record.Upstream = o.proxy.String()
	l.associations++
	l.counters.associations.Add(1)
	return nil
}

// fail ends the hopes of a session. Whether it is the proxy's word on all of them depends:
// one that does not know the command, or refuses the credential, will refuse all; any other
// failure may be about this one, as long as others have what it was refused.
func (l *loop) fail(s *session, err error) {
	l.counters.failed.Add(1)
	s.stage, s.record.Err = failed, err
	l.forget(s)
	s.active = l.now
	l.age(s, &l.failures)
	refused, ok := errors.AsType[*upstream.RefusedError](err)
	if l.associations > 0 && !(ok && (refused.Code == upstream.CommandNotSupported || refused.Denied)) {
		l.log.Warn().Err(err).Msg("a client's UDP is not carried")
		return
	}
	select {
	case l.server.lost <- err:
	default: // it is known
	}
}

// watch asks the proxy whether it carries datagrams, and again when it no longer does. Its
// answer is told by Config.Carry.
func (s *Server) watch(ctx context.Context) {
	told, pause := false, firstPause
	for {
		err := s.try(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			since := time.Now()
			s.config.Carry(true, nil)
			told = false
			select { // what was lost before does not count
			case <-s.lost:
			default:
			}
			select {
			case <-ctx.Done():
				return
			case err = <-s.lost:
			}
			if time.Since(since) > lastPause {
				pause = firstPause
			}
		}
		if !told {
			s.config.Carry(false, err)
			told = true
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.retry:
			timer.Stop()
		case <-timer.C:
		}
		pause = min(2*pause, lastPause)
	}
}

// try opens an association and gives it up again.
func (s *Server) try(ctx context.Context) error {
	association, err := s.config.Associate(ctx, netip.Addr{})
	if err != nil {
		return err
	}
	return association.Conn.Close()
}
