package upstream

import (
	"context"
	"errors"
	"hash/fnv"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Order says which of the proxies of a group that are up a flow tries first. The others
// follow in the order in which they were given.
type Order uint8

const (
	// First is the first of the list: the others are there for when it is down.
	First Order = iota
	// LeastLatency is the one that is connected to fastest.
	LeastLatency
	// HashClient gives each client a proxy of its own, the same one as long as that is up.
	// Of IPv6 clients that is a network of 64 bits, whose hosts change their addresses.
	HashClient
)

// ErrAllDown says that none of the proxies is up. New flows fail at once, and Watch sees
// when one is back.
var ErrAllDown = errors.New("all upstreams are down")

const (
	// probeFirst and probeLast are the pauses between the probes of a proxy that is down:
	// each is twice the one before.
	probeFirst = 250 * time.Millisecond
	probeLast  = 5 * time.Second

	// probeLatency is how often the latency of the proxies is measured that no flow goes
	// to, where that decides.
	probeLatency = 15 * time.Second

	// muchFaster is what part of the latency of the proxy in use another one's has to be
	// to take its place: many services take a change of address for a thief's.
	muchFaster = 0.8
)

// Group is several proxies that lead to the same places. It is safe for concurrent use.
type Group struct {
	order   Order
	proxies []*Proxy
	up      atomic.Pointer[arrangement]
	mutex   sync.Mutex // of arrange
}

// arrangement is what flows choose from: the proxies that are up, with each of them first.
type arrangement struct {
	from    [][]*Proxy
	fastest atomic.Int32 // LeastLatency: the one in use
}

// NewGroup returns a group of proxies, each of which belongs to one group only. direct://
// stands for the way without a proxy, and is always up.
func NewGroup(order Order, proxies ...*Proxy) *Group {
	g := &Group{order: order, proxies: proxies}
	g.arrange()
	return g
}

// Proxies returns all proxies, in the order in which they were given. Not to be changed.
func (g *Group) Proxies() []*Proxy { return g.proxies }

// String returns the URLs, without user names and passwords.
func (g *Group) String() string {
	var all []string
	for _, proxy := range g.proxies {
		all = append(all, proxy.String())
	}
	return strings.Join(all, ",")
}

// arrange fits what flows choose from to which proxies are up.
func (g *Group) arrange() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	var up []*Proxy
	for _, proxy := range g.proxies {
		if proxy.Up() {
			up = append(up, proxy)
		}
	}
	a := new(arrangement)
	for i := range up {
		from := append([]*Proxy{up[i]}, up[:i]...)
		a.from = append(a.from, append(from, up[i+1:]...))
	}
	g.up.Store(a)
}

// Candidates returns the proxies that are up, in the order in which a client's flow should
// try them; none if all are down. Not to be changed. It takes no lock and no memory.
func (g *Group) Candidates(client netip.Addr) []*Proxy {
	a := g.up.Load()
	switch {
	case len(a.from) == 0:
		return nil
	case len(a.from) == 1 || g.order == First:
		return a.from[0]
	case g.order == HashClient:
		return a.from[a.chosen(client)]
	}
	return a.from[a.least()]
}

// chosen is the proxy of a client: the one whose hash with it is the highest, so that a
// proxy that goes down or comes back moves nobody but its own clients (rendezvous hashing).
func (a *arrangement) chosen(client netip.Addr) int {
	client = client.Unmap().WithZone("")
	bytes := client.As16()
	if client.Is6() {
		clear(bytes[8:])
	}
	best, highest := 0, uint64(0)
	for i, proxies := range a.from {
		hash := fnv.New64a()
		hash.Write([]byte(proxies[0].url))
		hash.Write(bytes[:])
		if sum := mix(hash.Sum64()); sum >= highest {
			best, highest = i, sum
		}
	}
	return best
}

// mix spreads the last bytes, which FNV hardly moves to the high bits, over the whole word
// (the finalizer of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// least is the proxy with the least latency, or the one in use if that is hardly more. One
// whose latency is not known yet goes before all others, so that it is.
func (a *arrangement) least() int {
	current := a.fastest.Load()
	best, least := current, float64(a.from[current][0].Latency())*muchFaster
	for i, proxies := range a.from {
		if latency := float64(proxies[0].Latency()); latency < least {
			best, least = int32(i), latency
		}
	}
	if best != current {
		a.fastest.Store(best)
	}
	return int(best)
}

// Change is a proxy that went down or came back.
type Change struct {
	Proxy *Proxy
	Up    bool
	Err   error // why it is down
	None  bool  // it was the last that was up
}

// Watch looks after the proxies until ctx is done: those that are down are probed until
// they answer, and those that flows have doubts about at once. tell, which must not wait
// for anything slow, is called once for each change, perhaps by several goroutines at once.
// Without Watch no proxy is ever taken for down.
func (g *Group) Watch(ctx context.Context, dialer *Dialer, tell func(Change)) {
	for _, proxy := range g.proxies {
		proxy.health.group.Store(g)
		defer proxy.health.group.Store(nil)
	}
	var watching sync.WaitGroup
	for _, proxy := range g.proxies {
		if proxy.protocol != protocolDirect {
			watching.Go(func() { g.watch(ctx, proxy, dialer, tell) })
		}
	}
	watching.Wait()
}

// NetworkChanged has all proxies probed, because the ways there may be others now.
func (g *Group) NetworkChanged() {
	for _, proxy := range g.proxies {
		proxy.look()
	}
}

// watch looks after one proxy.
func (g *Group) watch(ctx context.Context, p *Proxy, dialer *Dialer, tell func(Change)) {
	timer := time.NewTimer(probeLatency)
	defer timer.Stop()
	if g.order != LeastLatency {
		timer.Stop()
	}
	told, pause := true, time.Duration(0)
	for {
		measuring := false
		select {
		case <-ctx.Done():
			return
		case <-p.health.wake:
			pause = 0
		case <-timer.C:
			measuring = p.Up()
		}
		took, err := dialer.probe(ctx, p, !measuring)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			p.Connected(took)
		}
		if p.health.down.Swap(err != nil) != (err != nil) {
			g.arrange()
		}
		if up := err == nil; up != told {
			told = up
			tell(Change{Proxy: p, Up: up, Err: err, None: len(g.up.Load().from) == 0})
		}
		switch {
		case err != nil:
			pause = min(max(2*pause, probeFirst), probeLast)
			timer.Reset(pause)
		case g.order == LeastLatency:
			timer.Reset(probeLatency)
		default:
			timer.Stop() // it is up as long as the flows find it so
		}
	}
}
