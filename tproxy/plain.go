package tproxy

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/forward"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// newForwarder makes what carries HTTP/1 requests one by one.
func (s *Server) newForwarder() *forward.Server {
	return forward.NewServer(forward.Config{
		Dialer:           s.config.Dialer,
		Route:            s.way,
		Check:            s.check,
		Relay:            s.relay,
		Record:           s.recordRequest,
		IdleTimeout:      s.config.IdleTimeout,
		HandshakeTimeout: s.config.HandshakeTimeout,
		Via:              s.config.Via,
		ForwardedFor:     s.config.ForwardedFor,
		Query:            s.config.Query,
	})
}

// forward takes a flow of HTTP/1 requests over from the engine, on its loop, and does
// not wait.
func (f *flow) forward(client int, flight []byte) {
	s := f.server
	var session atomic.Pointer[forward.Session] // nil until the socket is taken over
	drain := func() {
		if t := session.Load(); t != nil {
			t.Drain()
		}
	}
	s.detached.carry(drain, func(ctx context.Context) {
		conn, err := adopt(client)
		if err != nil {
			f.record.Err = err
			f.end()
			return
		}
		t := s.forwarder.Open(conn, forward.Client{
			Kind: forward.Captured, Address: f.record.Client, Destination: f.record.Destination,
		}, flight)
		session.Store(t)
		if s.detached.isDraining() { // the call may have been before
			t.Drain()
		}
		t.Serve(ctx)
		s.open.Add(-1)
	})
}

// way decides about one request.
func (s *Server) way(client forward.Client, host string, port uint16) (forward.Way, error) {
	if client.Kind != forward.Captured {
		return s.explicitWay(client, host, port)
	}
	destination := client.Destination
	if address, err := netip.ParseAddr(host); err == nil && address == destination.Addr().Unmap() {
		host = ""
	}
	if host == "" && s.policy.Name != nil {
		host, _ = s.policy.Name(client.Address.Addr(), destination.Addr())
	}
	placeholder := s.policy.placeholder(destination.Addr())
	if placeholder && host == "" {
		return forward.Way{}, errForgotten
	}
	way := forward.Way{Target: upstream.Target{Host: host, Port: port}}
	if host == "" {
		way.Target.Host = destination.Addr().Unmap().String()
	}
	if !placeholder {
		way.Direct = destination // to the address that the client chose, never to one resolved anew
	}
	if s.policy.exempt(destination, host) {
		if placeholder {
			return forward.Way{}, errForgotten
		}
		return way, nil
	}
	err := s.choose(&way, client.Address.Addr())
	if err == nil && way.Proxy == nil && placeholder {
		return forward.Way{}, errForgotten
	}
	return way, err
}

// choose sets the proxies of a way. It may wait for the script.
func (s *Server) choose(way *forward.Way, client netip.Addr) (err error) {
	proxies, known := s.policy.proxies(client, way.Target.Host, way.Target.Port)
	if !known {
		// It bounds the time by itself, and a client that goes meanwhile costs no more.
		if proxies, err = s.policy.Script.Find(context.Background(), way.Target.Host, way.Target.Port); err != nil {
			return err
		}
	}
	if len(proxies) == 0 {
		return upstream.ErrAllDown
	}
	way.Via(proxies)
	return nil
}

// explicitWay decides about a request of a client that uses the gateway as its proxy.
func (s *Server) explicitWay(client forward.Client, host string, port uint16) (forward.Way, error) {
	way := forward.Way{Target: upstream.Target{Host: host, Port: port}}
	destination := netip.AddrPortFrom(netip.Addr{}, port)
	name := host
	if address, err := netip.ParseAddr(host); err == nil {
		if err := s.check(address); err != nil {
			return forward.Way{}, err
		}
		name, destination = "", netip.AddrPortFrom(address, port)
	}
	if name == "" {
		way.Direct = destination
	}
	if s.policy.exempt(destination, name) {
		return way, nil
	}
	return way, s.choose(&way, client.Address.Addr())
}

// check refuses what Policy.refuses does, unless the administrator allows it.
func (s *Server) check(address netip.Addr) error {
	for _, prefix := range s.config.AllowTo {
		if prefix.Contains(address) {
			return nil
		}
	}
	if s.policy.refuses(address) {
		return fmt.Errorf("%s: %w", address, errRefused)
	}
	return nil
}

// relay carries a tunnel that began as a request.
func (s *Server) relay(ctx context.Context, client, next upstream.Conn, flight, rest []byte) (sent, received int64, err error) {
	t := session{
		client: client, upstream: next,
		idle: s.config.IdleTimeout, halfClose: s.config.HalfCloseTimeout,
	}
	stop := context.AfterFunc(ctx, func() { t.abort(context.Cause(ctx)) })
	defer stop()
	return t.relay(flight, rest)
}

// recordRequest tells of the end of a request, or of a tunnel that an explicit client
// asked for.
func (s *Server) recordRequest(r forward.Record) {
	if r.Proxy != "" && r.Err != nil && r.Sent+r.Received == 0 {
		s.warn(r.Err)
	}
	if !r.Tunnel {
		s.config.Request(r)
		return
	}
	record := Record{
		Duration: r.Duration, Client: r.Address, Destination: r.Destination,
		Name: r.URL, NameFrom: "connect", Way: wayUpstream, Upstream: r.Proxy,
		Sent: r.Sent, Received: r.Received, Err: r.Err,
	}
	if r.Direct {
		record.Way = wayDirect
	}
	s.config.Access(record)
}
