package relay

import (
	"net/netip"
	"strconv"
	"time"
)

// Outcome is what is known of a flow at its end.
type Outcome struct {
	Sent     int64          // bytes of the client that the next hop's socket took, without the handshake
	Received int64          // bytes of the next hop that the client's socket took, without the handshake
	Duration time.Duration  // since the accept, to the precision of a turn of the loop
	Address  netip.AddrPort // the address of the hop that was connected to, or tried last; zero before that
	End      End            // how the flow ended
	Err      error          // what went wrong in words; nil after an orderly end
}

// End is the way in which a flow ended. Only Orderly and Abandoned are told to
// the two sides as a FIN, all others as a reset.
type End uint8

// The ends of a flow.
const (
	Orderly         End = iota // both sides closed and everything was delivered
	Abandoned                  // the client closed without a byte while it was peeked at
	RouteFailed                // Session.Route returned an error
	ConnectFailed              // no address of the hop could be connected to
	HandshakeFailed            // the hop refused, closed, said nonsense or took too long
	ClientFailed               // the client's connection was reset or timed out
	UpstreamFailed             // the same of the connection to the next hop, after the handshake
	Idle                       // nothing moved for IdleTimeout
	HalfClosed                 // one side had closed and nothing moved for HalfCloseTimeout
	Stopped                    // the engine stopped and DrainTimeout was over
)

// String returns a name of lower-case words that is fit for a log or the label of a metric.
func (e End) String() string {
	switch e {
	case Orderly:
		return "orderly"
	case Abandoned:
		return "abandoned"
	case RouteFailed:
		return "route"
	case ConnectFailed:
		return "connect"
	case HandshakeFailed:
		return "handshake"
	case ClientFailed:
		return "client"
	case UpstreamFailed:
		return "upstream"
	case Idle:
		return "idle"
	case HalfClosed:
		return "half-closed"
	case Stopped:
		return "stopped"
	}
	return "end " + strconv.Itoa(int(e))
}
