// Package fakeip gives names an address that stands for them, where no server
// can be asked for the real one: a client that looks up a name gets an address
// out of a pool, connects to it, and the gateway maps it back and hands the name
// to the proxy.
//
// The addresses come from prefixes that nobody routes: 198.18.0.0/15, set aside
// for benchmarks (RFC 2544, appendix C.2.2), and a /64 of unique local addresses
// (RFC 4193), unless others are chosen.
//
// # What a pool promises
//
// A name keeps its address for as long as it is used: the pool is bounded, and
// only when it is full does a new name take the address of another, the one
// whose last use is longest ago. Use is both a look-up of the name and a flow to
// its address. Clients must therefore not remember an answer for longer than it
// takes the pool to fill; a TTL of a few seconds is right.
//
// # The store
//
// An assignment is written to the store before Lookup returns it, so that a
// client never knows an address that a killed process (SIGKILL) forgets. After a
// power failure the latest may be lost: lines are not synced one by one.
//
// The store is text:
//
//	transproxy-tproxy fake-ip 1 198.18.0.0/15 fd0f:a4e1:b0d5:c0de::/64
//	example.org 198.18.0.2 fd0f:a4e1:b0d5:c0de::2 2026-01-31T12:00:00Z
//
// The order of the lines is the order of use, latest last; of several lines for
// a name or an address the last holds. The time is when the line was written. It
// is for the reader, and ends a line in such a way that a part of one cannot be
// taken for a whole. Uses are appended every few minutes, and the file is written
// anew, to another that takes its place, when most of its lines are outdated.
package fakeip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
)

// DefaultMax is how many names are held if Config does not say: all that
// 198.18.0.0/15 has addresses for. They take some 25 MB.
const DefaultMax = 1<<17 - reserved

// ErrName is the cause of an error of Lookup: what was looked up does not name a
// host, or is longer than 253 bytes.
var ErrName = errors.New("not a host name")

// Config says where fake addresses come from and how many are given out.
type Config struct {
	// IPv4 and IPv6 are where fake addresses come from; the zero Prefix for none
	// of that family. There must be at least one. Three addresses of a prefix are
	// not given out: the first two and the last. The smaller prefix bounds the
	// pool.
	IPv4, IPv6 netip.Prefix

	// Max is how many names are held at most; 0 for DefaultMax.
	Max int

	// Store is the file that keeps the names over restarts; empty for none. Its
	// directory must be writable: the file is replaced from time to time, at Open
	// for the first. One pool at a time has it.
	Store string

	// StoreFailed is told once that the store cannot be written, and again only
	// after it could. Meanwhile the pool works from memory and tries the store
	// every few minutes. It is called by Open, if the disk is full, by Lookup and
	// by the pool itself, and must not call the pool. May be nil.
	StoreFailed func(error)
}

// Pool holds names and their addresses. It is safe for concurrent use.
//
// A name that is known and an address cost a map look-up under a mutex which is
// never held during input or output.
type Pool struct {
	ranges      ranges
	storeFailed func(error)
	notes       []string

	// assigning is held while a name gets an address and while the store is
	// written. It is taken before mutex. What is in the table is changed under
	// both, its order of use under mutex alone.
	assigning sync.Mutex
	store     *store // nil for none
	told      bool   // StoreFailed was

	mutex sync.Mutex
	table table

	stop  context.CancelFunc // nil without a store
	ended chan struct{}
	grown chan struct{} // the store should be written anew
}

// Open prepares a pool with what is in the store. The directory of the store
// must exist. A store that was written for other prefixes, or by another version,
// starts anew; lines that are damaged are dropped: see Notes. A file that is no
// store is an error and left as it is. The pool must be closed.
func Open(config Config) (*Pool, error) {
	ranges, err := newRanges(config.IPv4, config.IPv6)
	if err != nil {
		return nil, fmt.Errorf("open fake-IP pool: %w", err)
	}
	if config.Max < 0 {
		return nil, fmt.Errorf("open fake-IP pool: %d names", config.Max)
	}
	held := config.Max
	if held == 0 {
		held = DefaultMax
	}
	p := &Pool{
		ranges:      ranges,
		storeFailed: config.StoreFailed,
		table:       newTable(min(held, int(ranges.size))),
	}
	if config.Store == "" {
		return p, nil
	}
	if err := p.openStore(config.Store); err != nil {
		return nil, fmt.Errorf("open fake-IP store %s: %w (--fake-ip-store needs a file of its own in a writable directory)", config.Store, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	p.ended = make(chan struct{})
	p.grown = make(chan struct{}, 1)
	go p.keep(ctx)
	return p, nil
}

// Notes says what of the store was dropped at Open, a sentence each. There is
// none if all went well.
func (p *Pool) Notes() []string { return p.notes }

// Lookup returns the addresses of a name, which is in lower case and without a
// trailing dot; the zero Addr for a family without a prefix. A name that has none
// gets the same number in both prefixes: free ones first, then those of the name
// that has been unused for longest.
//
// The only error is ErrName, wrapped. Names are of letters, digits, hyphens and
// underscores. Addresses in any notation and localhost are none: handed to the
// proxy, they would mean the proxy's own network. A store that cannot be written
// is no error here; see Config.StoreFailed.
func (p *Pool) Lookup(name string) (ipv4, ipv6 netip.Addr, err error) {
	offset, ok := p.known(name)
	if !ok {
		if !valid(name) {
			return netip.Addr{}, netip.Addr{}, fmt.Errorf("look up fake address of %q: %w", name, ErrName)
		}
		// The caller's string may be part of a message, or of a buffer.
		offset = p.assign(strings.Clone(name))
	}
	ipv4, ipv6 = p.ranges.addresses(offset)
	return ipv4, ipv6, nil
}

// Name returns the name that an address stands for and counts as a use of it.
// It knows no name of an address that was not given out.
func (p *Pool) Name(address netip.Addr) (name string, ok bool) {
	offset, ok := p.ranges.offset(address.Unmap())
	if !ok {
		return "", false
	}
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.table.name(offset)
}

// Contains reports whether an address is in one of the prefixes, given out or not.
func (p *Pool) Contains(address netip.Addr) bool { return p.ranges.contains(address.Unmap()) }

// known returns the number of a name that has one and counts as a use of it.
func (p *Pool) known(name string) (offset uint32, ok bool) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	return p.table.offset(name)
}

// assign gives a name a number. Until the store has it the name is not in the
// table, so that nobody else hands it to a client either; nor is the one whose
// number it takes, so that no flow to that is mistaken for one to this.
func (p *Pool) assign(name string) (offset uint32) {
	p.assigning.Lock()
	defer p.assigning.Unlock()
	if offset, ok := p.known(name); ok {
		return offset // another caller was faster
	}
	p.mutex.Lock()
	place := p.table.claim()
	offset = p.table.places[place].offset
	p.mutex.Unlock()

	if err := p.record([]entry{{name, offset}}); err != nil {
		p.failed(err)
	}

	p.mutex.Lock()
	p.table.put(place, name)
	p.mutex.Unlock()
	return offset
}
