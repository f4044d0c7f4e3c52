package udp

import "sync/atomic"

// reason is why a datagram was dropped.
type reason uint8

const (
	dropUnaddressed reason = iota // its destination is not told
	dropRefused                   // its destination is not to be reached
	dropForgotten                 // its destination stands for a name that is not held any more
	dropSessions                  // too many sessions
	dropClient                    // too many of this client
	dropOpening                   // too much waits for the association
	dropFailed                    // there is no association
	dropNames                     // who answers could not be told: another name's answer is due
	dropTooLong                   // longer than can be sent with a header
	dropUnsent                    // the kernel did not take it
	dropHeader                    // the proxy's: without a whole header
	dropFragment                  // the proxy's: a fragment
	dropStranger                  // the proxy's: from an address that the client has not sent to
	dropImpostor                  // the proxy's: from an address that cannot be the sender's
	dropSocket                    // the proxy's: no socket has the address that was asked
	reasons
)

// names of the reasons, as Stats has them.
func (r reason) String() string {
	return [reasons]string{
		"unaddressed", "refused", "forgotten", "sessions", "client", "opening", "failed", "names", "too_long", "unsent",
		"header", "fragment", "stranger", "impostor", "socket",
	}[r]
}

// counters are written by the loop alone.
type counters struct {
	sessions, opened, associations, failed, replies atomic.Int64
	icmp                                            atomic.Int64
	sent, received                                  atomic.Int64
	dropped                                         [reasons]atomic.Int64
}

func (c *counters) drop(why reason) { c.dropped[why].Add(1) }

// Stats are counters since the start, but for Sessions and ReplySockets, which are of the
// moment.
type Stats struct {
	Sessions     int64
	ReplySockets int64

	Opened       int64            // sessions
	Associations int64            // that the proxy has granted to sessions
	Failed       int64            // associations that could not be had
	ICMPErrors   int64            // about what was sent to the proxy, or directly
	Sent         int64            // datagrams of clients that were sent on
	Received     int64            // datagrams that were sent to clients
	Dropped      map[string]int64 // datagrams, by reason; only those that there were
}

// Stats returns the counters. It is safe for concurrent use.
func (s *Server) Stats() Stats {
	c := &s.counters
	stats := Stats{
		Sessions:     c.sessions.Load(),
		ReplySockets: c.replies.Load(),
		Opened:       c.opened.Load(),
		Associations: c.associations.Load(),
		Failed:       c.failed.Load(),
		ICMPErrors:   c.icmp.Load(),
		Sent:         c.sent.Load(),
		Received:     c.received.Load(),
		Dropped:      make(map[string]int64),
	}
	for why := range reasons {
		if n := c.dropped[why].Load(); n > 0 {
			stats.Dropped[why.String()] = n
		}
	}
	return stats
}
