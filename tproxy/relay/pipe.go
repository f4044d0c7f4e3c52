package relay

import (
	"errors"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// pipeSize is the capacity of a pipe, and the default of
// /proc/sys/fs/pipe-max-size. A segment of a socket's buffer takes one of its slots
// a page. Measured with 8 streams: 512 KiB cost 10 to 20 % more processor time a
// byte, 256 KiB 20 to 40 %.
const pipeSize = 1 << 20 // bytes

// pipe is lent to one direction of a flow while data flows. What was read but not
// yet written stays in it, inside the kernel.
type pipe struct {
	read, write int
	fill        int   // bytes inside
	moved       int64 // bytes that went through since it was lent
}

// pipes is the pool of one loop. An empty pipe that waits to be lent again costs
// two descriptors and no pages.
type pipes struct {
	idle     []*pipe   // the last one given back is the first to be lent: its ring is in the cache
	made     int       // pipes that exist
	limit    int       // how many may exist
	again    time.Time // none is made before that
	counters *counters
}

// pipePause is how long none is made after the kernel has refused one.
const pipePause = 10 * time.Second

// take lends a pipe, or nil when none is left.
func (p *pipes) take() *pipe {
	if last := len(p.idle) - 1; last >= 0 {
		taken := p.idle[last]
		p.idle = p.idle[:last]
		return taken
	}
	if p.made >= p.limit || !p.again.IsZero() && time.Now().Before(p.again) {
		return nil
	}
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(ends[0]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		// /proc/sys/fs/pipe-user-pages-soft is used up (pipe(7)): a small pipe is
		// slower than no pipe, and asking again for each chunk would be too.
		shut(ends[0])
		shut(ends[1])
		if errors.Is(err, unix.EPERM) {
			p.again = time.Now().Add(pipePause)
		}
		return nil
	}
	p.made++
	p.counters.pipes.Add(1)
	return &pipe{read: ends[0], write: ends[1]}
}

// give takes back a pipe. One that is not empty is of no further use.
func (p *pipes) give(given *pipe) {
	add(&p.counters.spliced, given.moved)
	given.moved = 0
	if given.fill > 0 {
		p.discard(given)
		return
	}
	p.idle = append(p.idle, given)
}

// trim closes the pipes that wait, for when descriptors are short.
func (p *pipes) trim() {
	for _, waiting := range p.idle {
		p.discard(waiting)
	}
	p.idle = nil
}

func (p *pipes) discard(old *pipe) {
	shut(old.read)
	shut(old.write)
	p.made--
	p.counters.pipes.Add(-1)
}

func add(counter *atomic.Int64, n int64) {
	if n != 0 {
		counter.Add(n)
	}
}
