package tproxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// errStopped ends the flows that are left when the time to drain is over.
var errStopped = errors.New("the gateway stops")

// detached are the flows that were taken off the engine. The zero value is ready.
type detached struct {
	running sync.WaitGroup

	mutex  sync.Mutex
	resets map[*flow]context.CancelCauseFunc
}

// carry runs a flow on a goroutine of its own. ctx ends when it is to be reset.
func (d *detached) carry(f *flow, run func(ctx context.Context)) {
	ctx, reset := context.WithCancelCause(context.Background())
	d.mutex.Lock()
	if d.resets == nil {
		d.resets = make(map[*flow]context.CancelCauseFunc)
	}
	d.resets[f] = reset
	d.mutex.Unlock()
	d.running.Go(func() {
		run(ctx)
		d.mutex.Lock()
		delete(d.resets, f)
		d.mutex.Unlock()
		reset(nil)
	})
}

// close lets the flows run on for some time, resets those that are left, and
// returns when all have ended. No flow may be added any more.
func (d *detached) close(after time.Duration) {
	timer := time.AfterFunc(after, func() {
		d.mutex.Lock()
		defer d.mutex.Unlock()
		for _, reset := range d.resets {
			reset(errStopped)
		}
	})
	defer timer.Stop()
	d.running.Wait()
}

// detach takes the flow over from the engine, on its loop, and does not wait.
func (f *flow) detach(client int, flight []byte) {
	f.server.detached.carry(f, func(ctx context.Context) {
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
	conn, rest, err := f.server.dialer.Tunnel(ctx, f.proxy, f.target())
	if err != nil {
		return 0, 0, err
	}
	conn.SetLinger(0)
	s := session{
		client: client, upstream: conn,
		idle: f.server.config.IdleTimeout, halfClose: f.server.config.HalfCloseTimeout,
	}
	stop := context.AfterFunc(ctx, func() { s.abort(context.Cause(ctx)) })
	defer stop()
	return s.relay(flight, rest)
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
	return conn.(*net.TCPConn), nil
}
