package relay

import (
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Connections that are opened ahead save a flow the round trip of the TCP handshake
// with the next hop. Each serves one flow. How many wait is learnt for each address
// from the flows that came at once: of a browser that opens six connections, the next
// six find theirs. Whoever is not there for a while costs nothing: what expires, or is
// closed by the other side, is not opened again before the next flow.
const (
	// warmLife is how long a connection waits. Proxies give up connections on which no
	// request comes after 10 s (common haproxy settings) to 5 minutes (squid), which
	// costs nothing but a place in the reserve until then.
	warmLife = 30 * time.Second

	// burstWindow is the least time within which flows count as coming at once.
	burstWindow = 10 * time.Millisecond

	// burstHalving is the time after which a burst counts half.
	burstHalving = 10 * time.Second

	// maxReserves bounds the addresses for which connections are opened ahead.
	maxReserves = 64
)

// warmth are the reserves of a loop.
type warmth struct {
	reserves map[netip.AddrPort]*reserve
	waiting  int    // connections opened ahead, of all reserves, those on their way included
	network  uint32 // of the engine, when they were opened
}

// reserve is what is kept for the flows to one address.
type reserve struct {
	source func(netip.Addr) netip.Addr
	ready  []*flow       // those that stand, the latest last
	coming int           // those on their way
	took   time.Duration // what a connect takes; 0 while that is not known

	window time.Duration // when the present window began
	count  int           // flows in it
	burst  float64       // the most of a window of late
	halved time.Duration // when burst was halved last
}

// takeWarm gives a flow whose hop is known a connection that stands, if there is one,
// and sees to the next flows'.
func (l *loop) takeWarm(f *flow) bool {
	if network := l.engine.network.Load(); network != l.warm.network {
		l.cool()
		l.warm.network = network
	}
	address := netip.AddrPortFrom(f.opening.addrs[0].Addr().Unmap(), f.opening.addrs[0].Port())
	r := l.reserve(address)
	if r == nil {
		return false
	}
	r.source = f.opening.hop.Source
	r.demand(l.now)
	taken := false
	for len(r.ready) > 0 && !taken {
		last := len(r.ready) - 1
		spare := r.ready[last]
		socket := spare.ends[upstream].socket
		spare.ends[upstream].socket = none
		l.discard(spare) // which takes it out of ready
		if err := control(l.epoll, unix.EPOLL_CTL_MOD, socket, f.token(upstream), edges); err != nil {
			shut(socket)
			continue
		}
		f.ends[upstream] = end{socket: socket}
		f.address = address
		f.opening.warm, taken = true, true
		l.engine.counters.warm.Add(1)
	}
	if taken {
		l.greet(f) // first: the flow is what matters
	}
	l.refill(address, r)
	return taken
}

// reserve returns that of an address; nil if there are too many.
func (l *loop) reserve(address netip.AddrPort) *reserve {
	r := l.warm.reserves[address]
	if r != nil {
		return r
	}
	if l.warm.reserves == nil {
		l.warm.reserves = make(map[netip.AddrPort]*reserve)
	}
	if len(l.warm.reserves) >= maxReserves {
		for other, r := range l.warm.reserves {
			if len(r.ready)+r.coming == 0 {
				delete(l.warm.reserves, other)
			}
		}
		if len(l.warm.reserves) >= maxReserves {
			return nil
		}
	}
	r = new(reserve)
	l.warm.reserves[address] = r
	return r
}

// demand counts a flow.
func (r *reserve) demand(now time.Duration) {
	for r.burst >= 1 && now-r.halved >= burstHalving {
		r.burst /= 2
		r.halved += burstHalving
	}
	if now-r.window > max(burstWindow, r.took) {
		r.window, r.count = now, 0
	}
	r.count++
	if float64(r.count) >= r.burst {
		r.burst, r.halved = float64(r.count), now
	}
}

// want is how many connections are to be there: what came at once, and one more.
func (r *reserve) want() int {
	return int(r.burst) + 1
}

// measured takes note of how long a connect to an address took.
func (l *loop) measured(address netip.AddrPort, took time.Duration) {
	r := l.warm.reserves[address]
	if r == nil {
		return
	}
	if r.took == 0 {
		r.took = max(took, 1)
	} else {
		r.took += (took - r.took) / 8
	}
	l.refill(address, r)
}

// refill opens the connections that a reserve lacks.
func (l *loop) refill(address netip.AddrPort, r *reserve) {
	if l.warm.reserves[address] != r {
		return // it made room for another meanwhile
	}
	if r.took == 0 || r.took < l.config.WarmAbove {
		return
	}
	for len(r.ready)+r.coming < r.want() && l.warm.waiting < l.config.MaxWarm && l.drainEnd == never {
		socket, err := l.connectTo(address, r.source, false)
		if err != nil {
			return // the flows will find out by themselves
		}
		f := l.flows.take()
		f.ends[client].socket, f.ends[upstream].socket = none, socket
		f.address = address
		r.coming++
		l.warm.waiting++
		l.enter(f, warming)
		if err := l.watch(socket, f.token(upstream), edges); err != nil {
			l.discard(f)
			return
		}
	}
}

// warmed goes on with a connection that was opened ahead when it says how that went.
func (l *loop) warmed(f *flow, events uint32) {
	switch {
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		l.discard(f)
	case events&unix.EPOLLOUT != 0:
		r := l.warm.reserves[f.address]
		r.coming--
		r.ready = append(r.ready, f)
		l.enter(f, warm)
	}
}

// spoiled gives up a connection that the other side has closed, or on which it has
// spoken first.
func (l *loop) spoiled(f *flow, events uint32) {
	if events&^unix.EPOLLOUT != 0 {
		l.discard(f)
	}
}

// discard ends a connection that was opened ahead, or what is left of it once its
// socket is a flow's.
func (l *loop) discard(f *flow) {
	if r := l.warm.reserves[f.address]; f.stage == warming {
		r.coming--
	} else if i := slices.Index(r.ready, f); i >= 0 {
		r.ready = slices.Delete(r.ready, i, i+1)
	}
	l.warm.waiting--
	if socket := f.ends[upstream].socket; socket != none {
		shut(socket)
	}
	l.wheel.remove(f)
	l.flows.give(f)
}

// cool ends all connections that were opened ahead.
func (l *loop) cool() {
	l.flows.each(func(f *flow) {
		if f.stage == warming || f.stage == warm {
			l.discard(f)
		}
	})
}
