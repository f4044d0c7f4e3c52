package forward

import (
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// poolSize bounds the connections to a proxy that wait for their next request. A
	// connection is there for the time of a request only, so that they are enough for
	// as many clients at once, and more clients dial.
	poolSize = 128
	// poolTime is how long one waits; squid keeps its side open for 2 minutes.
	poolTime = time.Minute
)

// pool keeps connections to proxies between requests. The latest to come back goes out
// first. The zero value is ready.
type pool struct {
	mutex  sync.Mutex
	idle   map[*upstream.Proxy][]*hop
	closed bool
}

// get takes a connection out, nil if there is none that is alive and has waited for
// less than patience.
func (p *pool) get(proxy *upstream.Proxy, patience time.Duration) *hop {
	for {
		p.mutex.Lock()
		waiting := p.idle[proxy]
		if len(waiting) == 0 || time.Since(waiting[len(waiting)-1].since) > patience {
			p.mutex.Unlock()
			return nil
		}
		h := waiting[len(waiting)-1]
		waiting[len(waiting)-1] = nil
		p.idle[proxy] = waiting[:len(waiting)-1]
		p.mutex.Unlock()
		h.expiry.Stop()
		if h.quiet() {
			return h
		}
		h.close()
	}
}

// put keeps a connection, or closes it.
func (p *pool) put(h *hop) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.closed || len(p.idle[h.key.proxy]) >= poolSize {
		h.close()
		return
	}
	if p.idle == nil {
		p.idle = make(map[*upstream.Proxy][]*hop)
	}
	p.idle[h.key.proxy] = append(p.idle[h.key.proxy], h)
	h.since = time.Now()
	if h.expiry == nil {
		h.expiry = time.AfterFunc(poolTime, func() { p.expire(h) })
	} else {
		h.expiry.Reset(poolTime)
	}
}

// expire closes a connection that nobody wanted, if nobody has it now.
func (p *pool) expire(h *hop) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	waiting := p.idle[h.key.proxy]
	for i, other := range waiting {
		if other == h && time.Since(h.since) >= poolTime {
			p.idle[h.key.proxy] = append(waiting[:i], waiting[i+1:]...)
			h.close()
			return
		}
	}
}

// close closes all connections, and those that come back later.
func (p *pool) close() {
	p.mutex.Lock()
	p.closed = true
	p.mutex.Unlock()
	p.clear()
}

// clear closes all connections.
func (p *pool) clear() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for _, waiting := range p.idle {
		for _, h := range waiting {
			h.expiry.Stop()
			h.close()
		}
	}
	p.idle = nil
}
