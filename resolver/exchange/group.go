package exchange

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// probeTimeout bounds a query that finds out whether a server is back. It is the
// time by which most questions are answered by a server in health.
const probeTimeout = 2 * time.Second

// Group is several servers that know the same names. The first one in health is
// asked; the next is asked as well when that has failed, or takes longer than 95 of
// 100 of its answers did. A server's SERVFAIL or REFUSED makes the next be asked,
// too, and is returned if none says better. It is safe for concurrent use.
//
// A server that fails is put behind the others. Once a second it gets a copy of a
// query to show that it is back, for which nobody waits.
type Group struct {
	name    string
	members []*member

	mutex  sync.Mutex
	closed bool
	probes sync.WaitGroup
}

// NewGroup returns a group that prefers its servers in the order given, and closes
// them when it is closed.
func NewGroup(name string, servers ...Server) *Group {
	g := &Group{name: name}
	for _, server := range servers {
		g.members = append(g.members, &member{server: server})
	}
	return g
}

// String returns the name of the group, fit for logs.
func (g *Group) String() string { return g.name }

// Close closes the servers. It returns when all that they and the group started has
// ended.
func (g *Group) Close() {
	g.mutex.Lock()
	g.closed = true
	g.mutex.Unlock()
	for _, m := range g.members {
		m.server.Close()
	}
	g.probes.Wait()
}

// outcome is how asking one server ended.
type outcome struct {
	member *member
	answer []byte
	err    error
}

// good reports whether no other server could say better.
func (o outcome) good() bool {
	if o.err != nil {
		return false
	}
	code := rcode(o.answer)
	return code != rcodeServFail && code != rcodeRefused
}

// Exchange asks query as Server does. The error joins those of all servers asked.
func (g *Group) Exchange(ctx context.Context, query []byte) ([]byte, error) {
	order := g.order(ctx, query, time.Now())
	if len(order) == 0 {
		return nil, fmt.Errorf("ask %s: no server", g.name)
	}
	if len(order) == 1 {
		o := order[0].exchange(ctx, ctx, query) // nobody to turn to: no goroutine is needed
		return o.answer, o.err
	}
	limited, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer asking.Wait() // those that were overtaken return at once
	defer cancel()

	outcomes := make(chan outcome, len(order))
	hedge := time.NewTimer(0)
	defer hedge.Stop()
	pending := 0
	next := func() {
		if len(order) == 0 {
			return
		}
		m := order[0]
		order = order[1:]
		pending++
		asking.Go(func() { outcomes <- m.exchange(ctx, limited, query) })
		hedge.Reset(m.patience())
	}
	next()

	var poor []outcome
	var failures []error
	for pending > 0 {
		select {
		case o := <-outcomes:
			pending--
			switch {
			case o.good():
				for _, other := range poor {
					other.member.contradicted(time.Now())
				}
				return o.answer, nil
			case o.err == nil:
				poor = append(poor, o)
			default:
				failures = append(failures, o.err)
			}
			next()
		case <-hedge.C:
			next()
		case <-ctx.Done():
			return nil, fmt.Errorf("ask %s: %w", g.name, context.Cause(ctx))
		}
	}
	if len(poor) > 0 {
		return poor[len(poor)-1].answer, nil
	}
	if len(failures) == 1 {
		return nil, failures[0]
	}
	return nil, fmt.Errorf("ask %s: %w", g.name, joined(failures))
}

// order returns the servers in the order in which to ask them: those in health
// first. It has one of the others probed.
func (g *Group) order(ctx context.Context, query []byte, now time.Time) []*member {
	order := make([]*member, 0, len(g.members))
	var behind []*member
	for _, m := range g.members {
		if m.healthy() {
			order = append(order, m)
		} else {
			behind = append(behind, m)
		}
	}
	if len(order) > 0 {
		for _, m := range behind {
			if m.probeDue(now) {
				g.probe(ctx, m, query)
				break
			}
		}
	}
	return append(order, behind...)
}

// probe asks m without anybody waiting for it.
func (g *Group) probe(ctx context.Context, m *member, query []byte) {
	query = append([]byte(nil), query...)
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if g.closed {
		return
	}
	// The probe goes on when the caller has its answer. Close ends it by closing
	// the server.
	ctx = context.WithoutCancel(ctx)
	g.probes.Go(func() {
		limited, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		m.exchange(limited, limited, query)
	})
}

// joined makes one line of several errors.
func joined(failures []error) error {
	if len(failures) == 0 {
		return errors.New("no server")
	}
	return joinedError(failures)
}

type joinedError []error

func (e joinedError) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (e joinedError) Unwrap() []error { return e }

// Stats is what a group counts.
type Stats struct {
	Servers []ServerStats // in the order given to NewGroup
}

// ServerStats is what is counted of one server, since the start.
type ServerStats struct {
	Name       string
	Asked      int64         // questions, probes included
	Answered   int64         // of these, with whatever response code
	Failed     int64         // of these, by an error or no answer; those given up for other reasons are in neither
	Overtaken  int64         // of these, because another server answered first
	Mismatched int64         // answers to nothing that was asked, perhaps forged; ignored
	Healthy    bool          // not put behind the others
	Latency    time.Duration // half of the recent answers took less; 0 before the first
}

// Stats returns the counters as they are now.
func (g *Group) Stats() Stats {
	var stats Stats
	for _, m := range g.members {
		stats.Servers = append(stats.Servers, m.stats())
	}
	return stats
}
