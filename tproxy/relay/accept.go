package relay

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// listener is a listening socket of a loop. Unlike the flows it is watched
// level-triggered: accepting one connection for each event then takes no call that
// ends in EAGAIN, and a full queue cannot keep the loop from its flows.
type listener struct {
	socket int
	pause  time.Duration // the next one
	resume time.Duration // when a pause ends; never outside of one
}

// Accept errors are of the moment (a full descriptor table, a client that went
// away) and never end a listener; the pause between two tries grows to the limit.
const (
	acceptPauseFirst = 5 * time.Millisecond
	acceptPauseLimit = time.Second
)

// listenerToken names a listener in events.
func listenerToken(number int) token { return token{slot: int32(-1 - number)} }

// listen adds a listening socket.
func (l *loop) listen(socket int) error {
	// Accepted sockets inherit the options, which saves a system call for each.
	if err := setSession(socket); err != nil {
		return err
	}
	if err := l.watch(socket, listenerToken(len(l.listeners)), unix.EPOLLIN); err != nil {
		return fmt.Errorf("watch listening socket: %w", err)
	}
	l.listeners = append(l.listeners, listener{socket: socket, pause: acceptPauseFirst, resume: never})
	return nil
}

// accept takes one connection.
func (l *loop) accept(number int) {
	from := &l.listeners[number]
	switch err := l.acceptOne(from.socket); err {
	case nil:
		from.pause = acceptPauseFirst
	case unix.EAGAIN, unix.ECONNABORTED:
		// Another process was faster, or the client went away.
	default:
		// Until the pause is over the socket is not asked for events, else a
		// connection that cannot be accepted would make the loop spin.
		l.pipes.trim()
		l.ask(number, 0)
		from.resume = l.now + from.pause
		l.engine.counters.acceptErrors.Add(1)
		if l.config.AcceptFailed != nil {
			l.config.AcceptFailed(os.NewSyscallError("accept4", err), from.pause)
		}
		from.pause = min(2*from.pause, acceptPauseLimit)
	}
}

// resume ends a pause.
func (l *loop) resume(number int) {
	l.listeners[number].resume = never
	l.ask(number, unix.EPOLLIN)
}

// ask changes the events for which a listening socket is watched. That cannot fail
// for a socket that is registered (epoll_ctl(2)).
func (l *loop) ask(number int, events uint32) {
	control(l.epoll, unix.EPOLL_CTL_MOD, l.listeners[number].socket, listenerToken(number), events)
}

// acceptLast takes the connections that the kernel has completed, which closing
// the sockets would reset, and closes the sockets.
func (l *loop) acceptLast() {
	for i := range l.listeners {
		socket := l.listeners[i].socket
		for {
			if err := l.acceptOne(socket); err != nil && err != unix.ECONNABORTED {
				break
			}
		}
		shut(socket)
	}
	l.listeners = nil
}

// acceptOne takes a connection and starts its flow. The error is the one of accept4.
func (l *loop) acceptOne(listening int) error {
	socket, remote, err := accept(listening)
	if err != nil {
		return err
	}
	counters := &l.engine.counters
	if open := counters.flows.Add(1); l.config.MaxFlows > 0 && open > int64(l.config.MaxFlows) {
		counters.flows.Add(-1)
		counters.refused.Add(1)
		shut(socket)
		return nil
	}
	counters.accepted.Add(1)
	var session Session
	if local, err := localAddress(socket); err == nil {
		session = l.config.Accept(remote, local)
	}
	if session == nil {
		counters.flows.Add(-1)
		shut(socket)
		return nil
	}
	f := l.flows.take()
	f.session = session
	f.started = l.now
	f.ends[client].socket = socket
	f.ends[upstream].socket = none
	l.open(f)
	return nil
}
