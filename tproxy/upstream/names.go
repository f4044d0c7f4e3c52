package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// nameLife is how long the addresses of a proxy's name are used without a new
	// look-up. Proxies move by DNS within minutes, and the resolver does not tell
	// the records' own life.
	nameLife = 30 * time.Second

	// nameRetry is how long a look-up that failed is not repeated.
	nameRetry = time.Second

	// maxAddresses bounds what is kept of an answer; more could not be tried
	// within a connect limit anyway.
	maxAddresses = 8
)

// names remembers the addresses of the proxies' names. Old addresses are used for
// as long as there are no newer ones: a name server that is slow or away does not
// take a proxy away. The zero value is ready; it holds one entry for each name
// ever asked for, which are those of the configuration.
type names struct {
	mutex sync.Mutex
	known map[string]*name
}

// name is what is known of one name.
type name struct {
	addresses []netip.Addr // never changed in place: flows hold it
	err       error        // why there are no addresses
	until     time.Time    // before this nobody looks again
	busy      chan struct{}
	good      netip.Addr // the last that was connected to after another had failed
}

// lookup asks the name service.
type lookup func(ctx context.Context, host string) ([]netip.Addr, error)

// addresses returns the addresses of host, at least one, in the order in which to
// try them. One flow at a time asks the name service; meanwhile the others use
// the addresses that are known or, if there are none, wait for it.
func (n *names) addresses(ctx context.Context, host string, ask lookup) ([]netip.Addr, error) {
	for {
		n.mutex.Lock()
		entry := n.entry(host)
		busy := entry.busy
		if time.Now().Before(entry.until) || busy != nil && len(entry.addresses) > 0 {
			defer n.mutex.Unlock()
			return entry.addresses, entry.err
		}
		if busy == nil {
			entry.busy = make(chan struct{})
			n.mutex.Unlock()
			return n.refresh(ctx, entry, host, ask)
		}
		n.mutex.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("look up %s: %w", host, context.Cause(ctx))
		}
	}
}

// fresh returns the addresses of host if addresses would return them at once and
// without asking the name service.
func (n *names) fresh(host string) (addresses []netip.Addr, ok bool) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	entry := n.entry(host)
	ok = len(entry.addresses) > 0 && (time.Now().Before(entry.until) || entry.busy != nil)
	return entry.addresses, ok
}

// forget has every name looked up again before it is used next.
func (n *names) forget() {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	for _, entry := range n.known {
		entry.until = time.Time{}
	}
}

// entry returns what is known of host. It is called under the mutex.
func (n *names) entry(host string) *name {
	entry := n.known[host]
	if entry == nil {
		if n.known == nil {
			n.known = make(map[string]*name)
		}
		entry = new(name)
		n.known[host] = entry
	}
	return entry
}

// refresh asks the name service, on behalf of all who wait for entry.busy.
func (n *names) refresh(ctx context.Context, entry *name, host string, ask lookup) ([]netip.Addr, error) {
	found, err := ask(ctx, host)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("look up %s: no address", host)
	}

	n.mutex.Lock()
	defer n.mutex.Unlock()
	close(entry.busy)
	entry.busy = nil
	switch {
	case err == nil:
		entry.addresses = found[:min(len(found), maxAddresses)]
		entry.prefer(entry.good)
		entry.err = nil
		entry.until = time.Now().Add(nameLife)
	case errors.Is(ctx.Err(), context.Canceled):
		// The flow was given up, which says nothing about the name.
		return nil, err
	default:
		entry.until = time.Now().Add(nameRetry)
		if len(entry.addresses) == 0 {
			entry.err = err
		}
	}
	return entry.addresses, entry.err
}

// worked takes note that address was connected to after one before it had failed,
// so that the next flow does not wait for the dead one again.
func (n *names) worked(host string, address netip.Addr) {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	entry := n.entry(host)
	entry.good = address
	entry.prefer(address)
}

// prefer puts an address first if it is one of those known.
func (e *name) prefer(address netip.Addr) {
	if i := slices.Index(e.addresses, address); i > 0 {
		reordered := slices.Delete(slices.Clone(e.addresses), i, i+1)
		e.addresses = slices.Insert(reordered, 0, address)
	}
}
