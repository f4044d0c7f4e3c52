package relay

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bufferSize serves all reads of a loop. It is the largest segment that the
	// kernel hands up at a time (GRO), and stays in the level 2 cache.
	bufferSize = 64 << 10 // bytes

	// eventBatch is how many events are fetched by one system call.
	eventBatch = 128

	// announceEvery is how many turns a loop that does not park makes between two
	// system calls that the runtime hears of: a few milliseconds.
	announceEvery = 64

	// turn is how many bytes one way of a flow moves before the others get their
	// turn: about a millisecond. With 1 MiB eight streams cost a tenth more.
	turn = 4 << 20 // bytes
)

// loop is one event loop. Everything in it belongs to the goroutine of run, save
// for file, whose read deadline stop sets.
type loop struct {
	engine    *Engine
	config    *Config
	start     time.Time
	now       time.Duration // since start, read once a turn of the loop
	listeners []listener
	flows     slab
	wheel     wheel
	pipes     pipes
	warm      warmth
	ready     []token       // ways that have used up their turn, in the order of the next
	drainEnd  time.Duration // when the flows that are left are reset; never before the stop

	epoll    int
	file     *os.File // owns epoll
	parked   syscall.RawConn
	fetch    func(fd uintptr) bool // fetchEvents
	fetched  int
	streak   int           // fetches in a row that have found something
	deadline time.Duration // the read deadline of file; never for none
	failure  error         // of epoll_wait

	events [eventBatch]unix.EpollEvent
	buffer [bufferSize]byte
}

// newLoop prepares the loop for some listening sockets.
func newLoop(engine *Engine, sockets []int, maxPipes int) (*loop, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll instance: %w", err)
	}
	// What os.NewFile finds non-blocking it gives to the runtime's poller.
	if err := unix.SetNonblock(epoll, true); err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("set epoll instance non-blocking: %w", err)
	}
	l := &loop{
		engine:   engine,
		config:   &engine.config,
		start:    time.Now(),
		pipes:    pipes{limit: maxPipes, counters: &engine.counters},
		epoll:    epoll,
		drainEnd: never,
		deadline: never,
		file:     os.NewFile(uintptr(epoll), "epoll"),
	}
	if l.parked, err = l.file.SyscallConn(); err == nil {
		err = l.file.SetReadDeadline(time.Time{}) // fails unless the poller has taken it
	}
	if err != nil {
		l.file.Close()
		return nil, fmt.Errorf("park epoll instance: %w", err)
	}
	l.fetch = l.fetchEvents
	for _, socket := range sockets {
		if err := l.listen(socket); err != nil {
			l.file.Close()
			return nil, err
		}
	}
	return l, nil
}

// run turns until the engine has been stopped and the last flow has ended.
func (l *loop) run() error {
	defer l.close()
	for {
		if l.engine.stopping.Load() && l.drainEnd == never {
			l.acceptLast()
			l.cool()
			l.drainEnd = l.now + l.config.DrainTimeout
		}
		if l.now >= l.next() {
			l.timers()
		}
		if l.drainEnd != never && l.flows.used == 0 {
			return nil
		}
		if err := l.wait(); err != nil {
			l.cool()
			l.flows.each(func(f *flow) { l.finish(f, Stopped, err) })
			return fmt.Errorf("relay: %w", err)
		}
		l.now = time.Since(l.start)
		for i := range l.events[:l.fetched] {
			l.dispatch(token{l.events[i].Fd, l.events[i].Pad}, l.events[i].Events)
		}
		// One only: whoever has little to do comes before the next of these.
		if len(l.ready) > 0 {
			t := l.ready[0]
			l.ready = l.ready[1:]
			if f, from := l.flows.find(t); f != nil {
				f.ways[from].queued = false
				l.pump(f, from)
			}
		}
	}
}

// dispatch hands an event to the listener or the flow that it is for.
func (l *loop) dispatch(t token, events uint32) {
	if t.slot < 0 {
		l.accept(int(-1 - t.slot))
	} else if f, s := l.flows.find(t); f != nil {
		l.handle(f, s, events)
	}
}

// wait fetches events. With nothing else to do it parks the goroutine until there
// are some, a timer is due or the engine stops.
func (l *loop) wait() error {
	l.fetched = 0
	if len(l.ready) > 0 {
		l.fetch(0)
		return l.failure
	}
	// The deadline is moved only when it would come too late or has passed; that
	// it comes too early now and then is cheaper.
	if next := l.next(); next < l.deadline || l.deadline <= l.now {
		var at time.Time
		if next != never {
			at = l.start.Add(next)
		}
		if err := l.file.SetReadDeadline(at); err != nil {
			return fmt.Errorf("set time of the next timer: %w", err)
		}
		l.deadline = next
		// This may have replaced the deadline by which stop wakes the loop, but
		// stop has raised its flag before that. A deadline that comes after this
		// look ends the wait.
		if l.engine.stopping.Load() && l.drainEnd == never {
			return nil
		}
	}
	err := l.parked.Read(l.fetch)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		l.deadline = 0
		return nil
	}
	if err != nil {
		return fmt.Errorf("wait for events: %w", err)
	}
	return l.failure
}

// fetchEvents takes the events that there are, without waiting, and reports
// whether there were any. It runs within RawConn.Read, which parks the goroutine
// when it reports false and calls it again when the epoll instance is readable.
//
// Each system call of a loop is unknown to the runtime (see kernel.go), and a loop
// that always finds events never parks. So that others get their turn as well, it
// makes an ordinary call now and then: that makes sure that the runtime's monitor
// is awake, which polls the network and preempts goroutines every 10 ms.
func (l *loop) fetchEvents(uintptr) bool {
	var err error
	if l.streak++; l.streak%announceEvery == 0 {
		l.fetched, err = unix.EpollWait(l.epoll, l.events[:], 0)
	} else {
		l.fetched, err = fetch(l.epoll, l.events[:])
	}
	if err == unix.EINTR {
		l.fetched = 0
		return true
	}
	if err != nil {
		l.failure = os.NewSyscallError("epoll_wait", err)
		return true
	}
	if l.fetched == 0 && len(l.ready) == 0 {
		l.streak = 0
	}
	return l.fetched > 0
}

// next returns when timers has something to do.
func (l *loop) next() time.Duration {
	next := min(l.wheel.next(), l.drainEnd)
	for i := range l.listeners {
		next = min(next, l.listeners[i].resume)
	}
	return next
}

// timers does what is due.
func (l *loop) timers() {
	for i := range l.listeners {
		if l.now >= l.listeners[i].resume {
			l.resume(i)
		}
	}
	l.wheel.advance(l.now, l.expire)
	if l.now >= l.drainEnd {
		err := fmt.Errorf("still open %s after the engine was stopped", l.config.DrainTimeout)
		l.flows.each(func(f *flow) { l.finish(f, Stopped, err) })
	}
}

// watch registers a socket. The tokens of a flow are edge-triggered and never
// changed; closing the socket removes them.
func (l *loop) watch(socket int, t token, events uint32) error {
	return os.NewSyscallError("epoll_ctl", control(l.epoll, unix.EPOLL_CTL_ADD, socket, t, events))
}

// close releases what outlives the flows.
func (l *loop) close() {
	for i := range l.listeners {
		shut(l.listeners[i].socket)
	}
	l.listeners = nil
	l.pipes.trim()
	l.file.Close()
}
