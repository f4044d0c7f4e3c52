package tproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// errStopped ends the flows that are left when the time to drain is over.
var errStopped = errors.New("the gateway stops")

// detached are the flows that have goroutines of their own. The zero value is ready.
type detached struct {
	running sync.WaitGroup

	mutex    sync.Mutex
	draining bool
	flows    map[*carried]struct{}
}

// carried is one of them.
type carried struct {
	drain func() // to take no further request; nil for a flow that has none
	reset context.CancelCauseFunc
}

// carry runs a flow on a goroutine of its own. Its context ends when it is to be
// reset; drain, which may be nil, is called when it is to end by itself soon.
func (d *detached) carry(drain func(), run func(ctx context.Context)) {
	ctx, reset := context.WithCancelCause(context.Background())
	c := &carried{drain, reset}
	d.mutex.Lock()
	if d.flows == nil {
		d.flows = make(map[*carried]struct{})
	}
	d.flows[c] = struct{}{}
	late := d.draining && drain != nil
	d.mutex.Unlock()
	if late {
		drain()
	}
	d.running.Go(func() {
		run(ctx)
		d.mutex.Lock()
		delete(d.flows, c)
		d.mutex.Unlock()
		reset(nil)
	})
}

// drain asks the flows that could go on for ever to come to an end.
func (d *detached) drain() {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.draining = true
	for c := range d.flows {
		if c.drain != nil {
			c.drain()
		}
	}
}

func (d *detached) isDraining() bool {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	return d.draining
}

// close lets the flows run on for some time, resets those that are left, and
// returns when all have ended. No flow may be added any more.
func (d *detached) close(after time.Duration) {
	d.drain()
	timer := time.AfterFunc(after, func() {
		d.mutex.Lock()
		defer d.mutex.Unlock()
		for c := range d.flows {
			c.reset(errStopped)
		}
	})
	defer timer.Stop()
	d.running.Wait()
}

// detach takes the flow over from the engine, on its loop, and does not wait.
func (f *flow) detach(client int, flight []byte) {
	f.server.detached.carry(nil, func(ctx context.Context) {
		start := time.Now()
		f.record.Sent, f.record.Received, f.record.Err = f.tunnel(ctx, client, flight)
		f.record.Duration = time.Since(start)
		f.end()
	})
}

// tunnel carries a detached flow through its proxy to its end, and closes the
// client's socket.
func (f *flow) tunnel(ctx context.Context, socket int, flight []byte) (sent, received int64, err error) {
	client, err := adopt(socket)
	if err != nil {
		return 0, 0, err
	}
	// Until the relay clears it, the linger time makes this a reset: a flow that
	// could not be carried must not look finished.
	defer client.Close()
	proxies := append([]*upstream.Proxy{f.proxy}, f.others...)
	if f.proxy == nil { // the script was not waited for
		target := f.target()
		if proxies, err = f.server.policy.Script.Find(ctx, target.Host, target.Port); err != nil {
			return 0, 0, err
		}
	}
	var direct netip.AddrPort
	if !f.server.policy.placeholder(f.record.Destination.Addr()) {
		direct = f.record.Destination
	} else {
		proxies = slices.DeleteFunc(slices.Clone(proxies), (*upstream.Proxy).Direct)
	}
	if len(proxies) == 0 {
		return 0, 0, errForgotten
	}
	conn, rest, via, err := f.server.config.Dialer.TunnelVia(ctx, proxies, f.target(), direct)
	f.record.Way, f.record.Upstream = wayUpstream, via.String()
	if via.Direct() {
		f.record.Way, f.record.Upstream = wayDirect, ""
	}
	if err != nil {
		return 0, 0, err
	}
	conn.SetLinger(0)
	return f.server.relay(ctx, client, conn, flight, rest)
}

// adopt makes a connection of the standard library of a socket, and closes it on
// failure.
func adopt(socket int) (*net.TCPConn, error) {
	file := os.NewFile(uintptr(socket), "client")
	defer file.Close() // FileConn takes a duplicate
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("take the client's socket: %w", err)
	}
	client := conn.(*net.TCPConn)
	// Package net has put its own, shorter times in the place of ours.
	client.SetKeepAliveConfig(upstream.KeepAlive())
	return client, nil
}
