package resolver

import (
	"net/netip"
	"sync"
)

// clients counts the questions of each client that are being worked out. The zero
// value is ready.
type clients struct {
	mutex sync.Mutex
	count map[netip.Addr]int
}

// enter counts a question in, unless there are too many already.
func (c *clients) enter(client netip.Addr, most int) bool {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.count == nil {
		c.count = make(map[netip.Addr]int)
	}
	if c.count[client] >= most {
		return false
	}
	c.count[client]++
	return true
}

func (c *clients) leave(client netip.Addr) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.count[client]--; c.count[client] == 0 {
		delete(c.count, client)
	}
}
