package udp

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

const (
	never = time.Duration(1<<63 - 1)
	// eventBatch is how many events are fetched by one system call.
	eventBatch = 128
	// turn is how many batches are read of one socket before the others get their turn.
	turn = 4
)

// What an event is about, told by the lowest bits of its second word; the others are the
// session's generation.
const (
	onRelay uint32 = iota
	onControl
	onDirect4
	onDirect6

	kindBits      = 2
	maxGeneration = 1<<(32-kindBits) - 1
)

// wakeSlot stands for the descriptor that wakes the loop; below it are the listeners.
const wakeSlot = -1

// loop is the event loop. All in it belongs to the goroutine of run, save for what is said
// to be others'.
type loop struct {
	server   *Server
	config   *Config
	counters *counters
	log      zerolog.Logger // for what may happen to every session
	start    time.Time
	now      time.Duration // since start, read once a turn

	listeners []int
	waker     int         // eventfd(2): anybody writes
	stopping  atomic.Bool // anybody sets

	sessions              map[netip.AddrPort]*session
	clients               map[netip.Addr]int // sessions of an address
	slots                 slots
	used                  int // sessions
	associations          int // of them, that are granted
	short, long, failures aging
	replies               replies
	held                  int  // bytes in the queues of all sessions
	shedding              bool // there were too many

	line     []*session // that are to be opened
	openings int        // that are being opened
	results  chan opened
	running  sync.WaitGroup // the goroutines that open

	epoll    int
	file     *os.File // owns epoll
	parked   syscall.RawConn
	fetched  int
	fault    unix.Errno    // of epoll_wait
	deadline time.Duration // the read deadline of file; never for none

	system system
	in     *inbox
	out    *outbox
	events [eventBatch]unix.EpollEvent
}

// newLoop opens the listeners.
func newLoop(s *Server) (l *loop, err error) {
	l = &loop{
		server: s, config: &s.config, counters: &s.counters,
		log:      s.config.Log.Sample(&zerolog.BurstSampler{Burst: 5, Period: 10 * time.Second}),
		start:    time.Now(),
		waker:    none,
		sessions: make(map[netip.AddrPort]*session),
		clients:  make(map[netip.Addr]int),
		short:    aging{life: min(shortTimeout, s.config.Timeout)},
		long:     aging{life: s.config.Timeout},
		failures: aging{life: failurePause},
		results:  make(chan opened, maxOpening),
		epoll:    none,
		deadline: never,
	}
	l.replies.sockets = make(map[netip.AddrPort]*list.Element)
	l.in, l.out = newInbox(&l.system), newOutbox(&l.system, l.counters)
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return l, fmt.Errorf("create epoll instance: %w", err)
	}
	// What os.NewFile finds non-blocking it gives to the runtime's poller.
	if err = unix.SetNonblock(l.epoll, true); err != nil {
		return l, fmt.Errorf("set epoll instance non-blocking: %w", err)
	}
	l.file = os.NewFile(uintptr(l.epoll), "epoll")
	if l.parked, err = l.file.SyscallConn(); err == nil {
		err = l.file.SetReadDeadline(time.Time{}) // fails unless the poller has taken it
	}
	if err != nil {
		return l, fmt.Errorf("park epoll instance: %w", err)
	}
	if l.waker, err = unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC); err != nil {
		return l, fmt.Errorf("create eventfd: %w", err)
	}
	if err = l.watch(l.waker, wakeSlot, 0, 0, unix.EPOLLIN); err != nil {
		return l, err
	}
	for i, address := range s.config.Listen {
		socket, err := listen(address, s.config.Mark)
		if err != nil {
			return l, err
		}
		l.listeners = append(l.listeners, socket)
		if err := l.watch(socket, int32(wakeSlot-1-i), 0, 0, unix.EPOLLIN); err != nil {
			return l, err
		}
	}
	return l, nil
}

// watch registers a socket; closing it ends that.
func (l *loop) watch(socket int, slot int32, generation, kind, events uint32) error {
	event := unix.EpollEvent{Events: events, Fd: slot, Pad: int32(generation<<kindBits | kind)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, socket, &event))
}

// wake has the loop look at results and stopping. It may be called from any goroutine
// until run has returned.
func (l *loop) wake() {
	one := [8]byte{1} // in either order of bytes it is not 0, which is all that counts
	unix.Write(l.waker, one[:])
}

// stop has run return.
func (l *loop) stop() {
	l.stopping.Store(true)
	l.wake()
}

// run turns until it is stopped. What it has begun to open is left to finishLast.
func (l *loop) run(ctx context.Context) error {
	var failure error
	for failure == nil && !l.stopping.Load() {
		if failure = l.wait(); failure != nil {
			break
		}
		l.now = time.Since(l.start)
		for i := range l.events[:l.fetched] {
			l.dispatch(ctx, &l.events[i])
		}
		if l.now >= l.next() {
			l.expire()
			l.expireReplies()
		}
	}
	if failure == nil {
		for _, listener := range l.listeners {
			l.fromClients(ctx, listener)
		}
	}
	for _, s := range l.sessions {
		err := failure
		if err == nil {
			err = errStopped
		}
		l.end(s, err)
	}
	return failure
}

// finishLast waits for what is being opened, all of which is done once ctx is, and closes
// the loop.
func (l *loop) finishLast(ctx context.Context) {
	l.running.Wait()
	l.finish(ctx)
	l.close()
}

// dispatch hands an event to who it is for.
func (l *loop) dispatch(ctx context.Context, event *unix.EpollEvent) {
	switch {
	case event.Fd == wakeSlot:
		var count [8]byte
		unix.Read(l.waker, count[:])
		l.finish(ctx)
		return
	case event.Fd < wakeSlot:
		l.fromClients(ctx, l.listeners[wakeSlot-1-event.Fd])
		return
	}
	word := uint32(event.Pad)
	s := l.slots.find(event.Fd, word>>kindBits)
	if s == nil {
		return
	}
	switch kind := word & (1<<kindBits - 1); kind {
	case onControl:
		l.fromControl(s)
	case onRelay:
		if event.Events&unix.EPOLLERR != 0 && l.errors(s.relay) {
			l.end(s, errRefused)
			return
		}
		l.fromRelay(s)
	default:
		socket := s.direct[kind-onDirect4]
		if event.Events&unix.EPOLLERR != 0 {
			l.errors(socket)
		}
		l.fromDirect(s, socket)
	}
}

// wait parks the goroutine until there are events or a timer is due.
func (l *loop) wait() error {
	// The deadline is moved only when it would come too late or has passed; that it comes
	// too early now and then is cheaper.
	if next := l.next(); next < l.deadline || l.deadline <= l.now {
		var at time.Time
		if next != never {
			at = l.start.Add(next)
		}
		if err := l.file.SetReadDeadline(at); err != nil {
			return fmt.Errorf("set time of the next timer: %w", err)
		}
		l.deadline = next
	}
	l.fetched = 0
	err := l.parked.Read(l.fetch)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		l.deadline = 0
	case err != nil:
		return fmt.Errorf("wait for events: %w", err)
	case l.fault != 0:
		return fmt.Errorf("wait for events: %w", l.fault)
	}
	return nil
}

// fetch takes the events that there are and reports whether there were any. It runs within
// RawConn.Read, which parks the goroutine when it reports false.
func (l *loop) fetch(uintptr) bool {
	l.fetched, l.fault = l.system.events(l.epoll, l.events[:])
	if l.fault == unix.EINTR {
		l.fault = 0
		return true
	}
	return l.fetched > 0 || l.fault != 0
}

// close releases what outlives the sessions.
func (l *loop) close() {
	l.closeReplies()
	for _, socket := range append(l.listeners, l.waker) {
		if socket != none {
			unix.Close(socket)
		}
	}
	l.listeners, l.waker = nil, none
	switch {
	case l.file != nil:
		l.file.Close()
	case l.epoll != none:
		unix.Close(l.epoll)
	}
}
