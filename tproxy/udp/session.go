package udp

import (
	"container/list"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// stage is how far a session's association has come.
type stage uint8

const (
	unasked stage = iota // no datagram for the proxy yet
	waiting              // in the line of those that are to be opened
	opening              // a goroutine does it
	granted
	failed // there is none, and for failurePause none is tried
)

const (
	// failurePause keeps a client that is not carried from asking the proxy with every
	// datagram. Clients that send again do so in this order of time (RFC 9002 section
	// 6.2.2: QUIC's first after 1 s).
	failurePause = time.Second
	// shortTimeout is that of sessions that asked only for what is over with an answer; it
	// is what Linux gives a mapping without an answer (nf_conntrack_udp_timeout). RFC 4787
	// REQ-5 allows a shorter time for well-known ports.
	shortTimeout = 30 * time.Second
	// maxPeers bounds the destinations that a session remembers, some 200 bytes each: more
	// than calls and games have. A peer-to-peer client that goes round more of them only
	// loses what the ones that it has left alone for longest still answer.
	maxPeers = 512

	// A few datagrams are kept until the association is there: QUIC's first flight has two
	// or three (RFC 9000 section 14.1), games and calls repeat theirs.
	maxQueue      = 8
	maxQueueBytes = 16 << 10 // of one session
	maxHeldBytes  = 8 << 20  // of all
)

// shortPorts are those of DNS (RFC 1035) and NTP (RFC 5905): one question, one answer.
func shortPort(port uint16) bool { return port == 53 || port == 123 }

// What ends a session before its time.
var (
	errStopped = errors.New("the gateway stops")
	errRelay   = errors.New("the proxy has ended the association")
	errRefused = errors.New("the proxy's relay refuses datagrams")
	errChatter = errors.New("the proxy talks on the connection of an association")
)

// session is what one endpoint of a client sends and gets. It belongs to the loop.
type session struct {
	slot       int32
	generation uint32
	client     netip.AddrPort
	sockaddr   sockaddr // the client's, with its zone
	size       uint32
	record     Record
	began      time.Duration

	peers map[netip.AddrPort]*peer
	real  map[netip.AddrPort]*peer // those that were asked by name, by where the answers come from

	stage   stage
	control int // the association's connection
	relay   int // the socket that is connected to its relay
	heard   int // bytes on the connection
	direct  [2]int
	queue   []queued

	sent, received tally

	active  time.Duration // when the client has last sent something
	lasting bool          // it asked for more than shortPort
	aging   *list.Element // of *session, in the list that aged says
	aged    *aging
}

// queued is a datagram that waits for the association.
type queued struct {
	peer    *peer
	payload []byte
}

// aging is a list of sessions that live equally long, the next one to end in front.
type aging struct {
	life     time.Duration
	sessions list.List
}

// refresh moves a session to the end of its list: the client has sent something.
func (l *loop) refresh(s *session) {
	if s.stage == failed {
		return // its pause is not made longer
	}
	s.active = l.now
	if s.lasting {
		l.age(s, &l.long)
	} else {
		l.age(s, &l.short)
	}
}

// age puts a session at the end of a list.
func (l *loop) age(s *session, to *aging) {
	if s.aged == to {
		to.sessions.MoveToBack(s.aging)
		return
	}
	if s.aged != nil {
		s.aged.sessions.Remove(s.aging)
	}
	s.aged, s.aging = to, to.sessions.PushBack(s)
}

// admit makes a session for a client, or says why not.
func (l *loop) admit(client netip.AddrPort, from *sockaddr, size uint32) (*session, reason) {
	if l.used >= l.config.MaxSessions {
		if !l.shedding {
			l.shedding = true
			l.log.Warn().Int("sessions", l.used).
				Msg("too many clients' endpoints send UDP: new ones are dropped until some are idle; raise --max-udp-sessions or the limit of open files")
		}
		return nil, dropSessions
	}
	if l.clients[client.Addr()] >= l.config.MaxPerClient {
		return nil, dropClient
	}
	s := &session{
		client: client, sockaddr: *from, size: size, began: l.now,
		control: none, relay: none, direct: [2]int{none, none},
		peers: make(map[netip.AddrPort]*peer, 1),
	}
	s.record.Client = client
	s.sent.total, s.received.total = &l.counters.sent, &l.counters.received
	l.slots.put(s)
	l.sessions[client] = s
	l.clients[client.Addr()]++
	l.used++
	l.counters.sessions.Add(1)
	l.counters.opened.Add(1)
	return s, 0
}

// end ends a session and tells of it.
func (l *loop) end(s *session, err error) {
	l.release(s)
	s.aged.sessions.Remove(s.aging)
	l.slots.remove(s)
	delete(l.sessions, s.client)
	if l.clients[s.client.Addr()]--; l.clients[s.client.Addr()] == 0 {
		delete(l.clients, s.client.Addr())
	}
	l.used--
	l.counters.sessions.Add(-1)
	if l.shedding && l.used <= l.config.MaxSessions-max(1, l.config.MaxSessions/16) {
		l.shedding = false
	}
	s.record.Duration = l.now - s.began
	s.record.Sent, s.record.SentDatagrams = s.sent.bytes, s.sent.datagrams
	s.record.Received, s.record.ReceivedDatagrams = s.received.bytes, s.received.datagrams
	s.record.Err = err
	if s.record.Destinations > 0 { // else nothing was to be sent
		l.config.Access(s.record)
	}
}

// release gives up the association, the sockets and what waits.
func (l *loop) release(s *session) {
	l.out.flush() // it may hold datagrams of these sockets
	if s.stage == granted {
		l.associations--
	}
	for _, socket := range []*int{&s.control, &s.relay, &s.direct[0], &s.direct[1]} {
		if *socket != none {
			unix.Close(*socket)
			*socket = none
		}
	}
	l.forget(s)
}

// forget drops what waits for the association.
func (l *loop) forget(s *session) {
	for _, q := range s.queue {
		l.held -= len(q.payload)
		l.counters.drop(dropFailed)
	}
	s.queue = nil
}

// keep keeps a datagram until there is an association.
func (l *loop) keep(s *session, p *peer, payload []byte) {
	bytes := len(payload)
	for _, q := range s.queue {
		bytes += len(q.payload)
	}
	if len(s.queue) >= maxQueue || bytes > maxQueueBytes || l.held+len(payload) > maxHeldBytes {
		l.counters.drop(dropOpening)
		return
	}
	l.held += len(payload)
	s.queue = append(s.queue, queued{p, append([]byte(nil), payload...)})
}

// expire ends the sessions whose time is over.
func (l *loop) expire() {
	for _, list := range []*aging{&l.short, &l.long, &l.failures} {
		for e := list.sessions.Front(); e != nil; e = list.sessions.Front() {
			s := e.Value.(*session)
			if s.due() > l.now {
				break
			}
			switch {
			case s.stage == failed:
				l.end(s, s.record.Err)
			case s.stage == waiting || s.stage == opening:
				list.sessions.MoveToBack(e) // the proxy's answer has a limit of its own
				s.active = l.now
			default:
				l.end(s, nil)
			}
		}
	}
}

// due is when the session's time is over.
func (s *session) due() time.Duration { return s.active + s.aged.life }

// next is when expire, or expireReplies, has something to do.
func (l *loop) next() time.Duration {
	next := never
	for _, list := range []*aging{&l.short, &l.long, &l.failures} {
		if e := list.sessions.Front(); e != nil {
			next = min(next, e.Value.(*session).due())
		}
	}
	if e := l.replies.order.Front(); e != nil {
		next = min(next, e.Value.(*reply).used+l.config.Timeout)
	}
	return next
}

// slots give sessions numbers, by which events tell them apart. A number that is used
// again has another generation, so that an event that is too late finds nobody.
type slots struct {
	sessions   []*session
	free       []int32
	generation uint32
}

func (t *slots) put(s *session) {
	t.generation = (t.generation + 1) & maxGeneration
	s.generation = t.generation
	if last := len(t.free) - 1; last >= 0 {
		s.slot, t.free = t.free[last], t.free[:last]
		t.sessions[s.slot] = s
		return
	}
	s.slot = int32(len(t.sessions))
	t.sessions = append(t.sessions, s)
}

func (t *slots) remove(s *session) {
	t.sessions[s.slot] = nil
	t.free = append(t.free, s.slot)
}

// find returns the session of a number, nil if it has ended.
func (t *slots) find(slot int32, generation uint32) *session {
	if s := t.sessions[slot]; s != nil && s.generation == generation {
		return s
	}
	return nil
}
