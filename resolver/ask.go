package resolver

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/resolver/cache"
)

const (
	// askTimeout bounds a question with all servers of its way: clients ask again
	// after 5 s (resolv.conf(5)).
	askTimeout = 5 * time.Second
	// stalePatience is how long a client waits for servers that do not answer when an
	// expired answer could be given: RFC 8767 section 5.
	stalePatience = 1800 * time.Millisecond
)

// outcome is the answer to a query before it is dressed for its client.
type outcome struct {
	answer []byte // without an OPT record
	rcode  int    // with the extended bits
	why    ede
	from   result
	way    string // who was asked; empty for nobody
	err    error  // why there is no better answer, for the log
}

// cached answers from the cache, into a buffer. An answer that is about to expire
// and is asked for often is asked for anew meanwhile.
func (s *Server) cached(ctx context.Context, q *query, key, into []byte) (o outcome, ok bool) {
	if s.config.KeepECS && len(q.ecs) > 0 {
		return outcome{}, false // what is kept is for any network
	}
	answer, state := s.cache.Get(into, key, time.Now())
	switch state {
	case cache.Fresh:
	case cache.Due:
		s.refresh(ctx, q, key)
	default:
		return outcome{}, false
	}
	return outcome{answer: answer, rcode: int(answer[3] & 0xf), why: noEDE, from: hit}, true
}

// refresh asks for an answer that nobody waits for.
func (s *Server) refresh(ctx context.Context, q *query, key []byte) {
	zone := s.zones.of(q.text())
	if zone == nil || zone.Way == nil || s.inFlight.Load() >= int64(s.config.MaxInFlight) {
		return
	}
	if f, first := s.join(string(key)); first {
		own := q.clone()
		own.ecs = nil
		s.running.Go(func() { s.ask(ctx, zone.Way, own, string(own.key(nil)), f) })
	}
}

// atOnce answers a query for which nobody has to be asked, whatever else is under way;
// zone says who has to be asked for others.
func (s *Server) atOnce(client netip.Addr, q *query) (o outcome, zone *Zone) {
	if o, ok := s.local(q); ok {
		return o, nil
	}
	zone = s.zones.of(q.text())
	switch {
	case zone == nil, slices.Contains(zone.Servers, client):
		return outcome{answer: q.bare(rcodeRefused), rcode: rcodeRefused, why: edeProhibited, from: local}, nil
	case zone.Way == nil:
		return s.fake(q), nil
	}
	return outcome{}, zone
}

// work works a query out that is not in the cache, for one client. It waits for
// servers.
func (s *Server) work(ctx context.Context, client netip.Addr, q *query, key []byte) outcome {
	o, zone := s.atOnce(client, q)
	if zone == nil {
		return o
	}
	if !s.enter(client, zone.Way) {
		return s.tooMany(q, key)
	}
	defer s.leave(client, zone.Way)
	if s.config.KeepECS && q.ecs != nil {
		key = append(key, q.ecs...) // not a key of the cache
	}
	var impatient <-chan time.Time
	expired, state := s.cache.Get(nil, key, time.Now())
	if state == cache.Stale {
		timer := time.NewTimer(stalePatience)
		defer timer.Stop()
		impatient = timer.C
	}
	asking, first := s.join(string(key))
	switch {
	case first && impatient == nil:
		s.ask(ctx, zone.Way, q, string(key), asking)
	case first:
		// It goes on when this client has its answer.
		s.running.Go(func() { s.ask(ctx, zone.Way, q, string(key), asking) })
	}
	select {
	case <-asking.done:
	case <-impatient:
		return outcome{answer: expired, rcode: int(expired[3] & 0xf), why: edeStale, from: stale, way: zone.Way.String(), err: errSlow}
	}
	bad := asking.err != nil || asking.rcode == rcodeServFail
	switch {
	case bad && state == cache.Stale:
		return outcome{answer: expired, rcode: int(expired[3] & 0xf), why: edeStale, from: stale, way: zone.Way.String(), err: asking.err}
	case asking.err != nil:
		return s.failure(q, zone.Way.String(), asking.err)
	}
	// Others read the same bytes.
	answer := append(make([]byte, 0, len(asking.answer)+optSize+edeSize), asking.answer...)
	return outcome{answer: answer, rcode: asking.rcode, why: noEDE, from: miss, way: zone.Way.String()}
}

// enter takes a question on. Of several ways none may take all of MaxInFlight: one that
// answers slowly must not keep the others from being asked.
func (s *Server) enter(client netip.Addr, way Way) bool {
	share := int64(s.config.MaxInFlight)
	if len(s.asking) > 1 {
		share -= share / 4
	}
	if s.inFlight.Add(1) <= int64(s.config.MaxInFlight) {
		if s.asking[way.String()].Add(1) <= share {
			if s.clients.enter(client, s.config.MaxPerClient) {
				return true
			}
		}
		s.asking[way.String()].Add(-1)
	}
	s.inFlight.Add(-1)
	return false
}

func (s *Server) leave(client netip.Addr, way Way) {
	s.clients.leave(client)
	s.asking[way.String()].Add(-1)
	s.inFlight.Add(-1)
}

// tooMany is the answer to a question that is not taken on: one that has expired, as long
// as that may be given, or none.
func (s *Server) tooMany(q *query, key []byte) outcome {
	if expired, state := s.cache.Get(nil, key, time.Now()); state == cache.Stale {
		return outcome{answer: expired, rcode: int(expired[3] & 0xf), why: edeStale, from: stale, err: errTooMany}
	}
	return s.failure(q, "", errTooMany)
}

// failure is the answer when there is none.
func (s *Server) failure(q *query, way string, err error) outcome {
	why := edeNetwork
	if way == "" {
		why = noEDE
	}
	return outcome{answer: q.bare(rcodeServFail), rcode: rcodeServFail, why: why, from: failed, way: way, err: err}
}

// flights are the questions that are being asked, by key: identical ones are asked
// once. The zero value is ready.
type flights struct {
	mutex sync.Mutex
	open  map[string]*flight
}

// flight is one of them. The rest may be read once done is closed.
type flight struct {
	done   chan struct{}
	answer []byte // without an OPT record; shared
	rcode  int
	err    error
}

// join returns the flight of a question. Who is the first has to ask.
func (s *Server) join(key string) (f *flight, first bool) {
	s.flights.mutex.Lock()
	defer s.flights.mutex.Unlock()
	if f := s.flights.open[key]; f != nil {
		return f, false
	}
	if s.flights.open == nil {
		s.flights.open = make(map[string]*flight)
	}
	f = &flight{done: make(chan struct{})}
	s.flights.open[key] = f
	return f, true
}

// clone returns a query that has its bytes to itself.
func (q *query) clone() *query {
	own := *q
	own.message = bytes.Clone(q.message)
	own.name = own.message[headerSize : len(own.message)-4]
	own.ecs = bytes.Clone(q.ecs)
	return &own
}

// ask asks a way for all who wait for the flight.
func (s *Server) ask(ctx context.Context, way Way, q *query, key string, f *flight) {
	f.answer, f.rcode, f.err = s.exchange(ctx, way, q, key)
	s.flights.mutex.Lock()
	delete(s.flights.open, key)
	s.flights.mutex.Unlock()
	close(f.done)
}

// exchange asks a way and keeps its answer.
func (s *Server) exchange(ctx context.Context, way Way, q *query, key string) (answer []byte, rcode int, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	keepECS := s.config.KeepECS && len(q.ecs) > 0
	for _, edns := range []bool{true, false} {
		if answer, err = way.Exchange(ctx, q.upstream(edns, keepECS)); err == nil {
			answer, rcode, err = cleaned(answer, q)
		}
		s.stats.exchanged(way.String(), err)
		// A server that does not know EDNS says so: RFC 6891 section 7.
		if err != nil || rcode != rcodeFormErr && rcode != rcodeNotImp {
			break
		}
	}
	switch {
	case err != nil:
		return nil, 0, fmt.Errorf("%s: %w", way, err)
	case rcode > 0xf:
		return nil, 0, fmt.Errorf("%s: answered with extended code %d", way, rcode)
	case !keepECS:
		s.cache.Put([]byte(key), answer, time.Now())
	}
	return answer, rcode, nil
}

// upstream is the query to a server: the question in lower case, our own EDNS record
// and flags. The server's id is chosen by who sends it.
func (q *query) upstream(edns, keepECS bool) []byte {
	message := make([]byte, headerSize, len(q.message)+optSize+4+len(q.ecs))
	flags := flagRecursionDesired | flagAuthentic | q.flags&flagCheckingDisabled
	binary.BigEndian.PutUint16(message[2:], flags)
	message[5] = 1
	for _, letter := range q.name {
		message = append(message, lower(letter))
	}
	message = append(message, q.message[len(q.message)-4:]...)
	if !edns {
		return message
	}
	message[11] = 1
	var flagsEDNS uint16
	if q.do {
		flagsEDNS = flagDO
	}
	length := 0
	if keepECS {
		length = 4 + len(q.ecs)
	}
	message = append(message, 0, 0, typeOPT, offered>>8, offered&0xff, 0, 0, byte(flagsEDNS>>8), 0, byte(length>>8), byte(length))
	if keepECS {
		message = append(message, 0, optionECS, byte(len(q.ecs)>>8), byte(len(q.ecs)))
		message = append(message, q.ecs...)
	}
	return message
}
