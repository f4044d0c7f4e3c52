package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// connections opens n connections, each for one byte there and back, by 64 workers.
func (n *network) connections(count int) error {
	const workers = 64
	return n.onClient(workers, func(worker int) error {
		for i := worker; i < count; i += workers {
			if err := oneByte(i); err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
		}
		return nil
	})
}

// paced opens connections at a rate, one after the other.
func (n *network) paced(count int, perSecond int) error {
	return n.onClient(1, func(int) error {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for i := range count {
			<-tick.C
			if err := oneByte(i); err != nil {
				return fmt.Errorf("connection %d: %w", i, err)
			}
		}
		return nil
	})
}

func oneByte(number int) error {
	conn, err := dial(number, portEcho)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	var b [1]byte
	if _, err := conn.Write(b[:]); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, b[:])
	return err
}

// download moves bytes from the server in some streams.
func (n *network) download(streams, bytes int) error {
	return n.onClient(streams, func(stream int) error {
		conn, err := dial(stream, portSource)
		if err != nil {
			return err
		}
		defer conn.Close()
		share := bytes / streams
		fmt.Fprintln(conn, share)
		buffer := make([]byte, 256<<10)
		for left := share; left > 0; {
			got, err := conn.Read(buffer)
			if err != nil {
				return fmt.Errorf("download, %d bytes short: %w", left, err)
			}
			left -= got
		}
		return nil
	})
}

// upload moves bytes to the server in some streams. Each says how much it got.
func (n *network) upload(streams, bytes int) error {
	return n.onClient(streams, func(stream int) error {
		conn, err := dial(stream, portSink)
		if err != nil {
			return err
		}
		defer conn.Close()
		buffer := make([]byte, 256<<10)
		share := bytes / streams
		for left := share; left > 0; {
			sent, err := conn.Write(buffer[:min(left, len(buffer))])
			if err != nil {
				return err
			}
			left -= sent
		}
		conn.CloseWrite()
		var arrived int
		if _, err := fmt.Fscanln(conn, &arrived); err != nil || arrived != share {
			return fmt.Errorf("upload: %d of %d bytes arrived: %w", arrived, share, err)
		}
		return nil
	})
}

// exchanges sends requests on kept connections and returns how long each took, in
// order of size.
func (n *network) exchanges(conns, each int) ([]time.Duration, error) {
	var mutex sync.Mutex
	var all []time.Duration
	err := n.onClient(conns, func(number int) error {
		conn, err := dial(number, portExchange)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(2 * time.Minute))
		request, answer := make([]byte, requestSize), make([]byte, answerSize)
		took := make([]time.Duration, 0, each)
		for range each {
			start := time.Now()
			if _, err := conn.Write(request); err != nil {
				return err
			}
			if _, err := io.ReadFull(conn, answer); err != nil {
				return err
			}
			took = append(took, time.Since(start))
		}
		mutex.Lock()
		defer mutex.Unlock()
		all = append(all, took...)
		return nil
	})
	slices.Sort(all)
	return all, err
}

// idle opens connections that rest after one byte each way. The caller closes them.
func (n *network) idle(count int) (conns []*net.TCPConn, err error) {
	const workers = 32
	var mutex sync.Mutex
	err = n.onClient(workers, func(worker int) error {
		for i := worker; i < count; i += workers {
			conn, err := dial(i, portEcho)
			if err != nil {
				return fmt.Errorf("idle connection %d: %w", i, err)
			}
			mutex.Lock()
			conns = append(conns, conn)
			mutex.Unlock()
			var b [1]byte
			if _, err := conn.Write(b[:]); err != nil {
				return err
			}
			if _, err := io.ReadFull(conn, b[:]); err != nil {
				return fmt.Errorf("idle connection %d: %w", i, err)
			}
		}
		return nil
	})
	return conns, err
}

// steady receives 100 kB/s on each of some flows and returns how late the chunks
// came, in order of size. Flow 0 is not read at all if slow is set.
func (n *network) steady(flows int, length time.Duration, slow bool) ([]time.Duration, error) {
	var conns []*net.TCPConn
	err := n.onClient(1, func(int) error {
		if slow {
			conn, err := dial(0, portSource)
			if err != nil {
				return err
			}
			fmt.Fprintln(conn, 1<<30)
			conns = append(conns, conn)
		}
		for i := range flows {
			conn, err := dial(i, portPaced)
			if err != nil {
				return err
			}
			conns = append(conns, conn)
		}
		return nil
	})
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if err != nil {
		return nil, err
	}
	read := conns
	if slow {
		read = conns[1:]
	}
	var mutex sync.Mutex
	var late []time.Duration
	var reading sync.WaitGroup
	begin := time.Now().Add(length / 4) // once all have got going
	end := begin.Add(length)
	for _, conn := range read {
		reading.Go(func() {
			chunk := make([]byte, paceChunk)
			var own []time.Duration
			conn.SetReadDeadline(end)
			for {
				if _, err := io.ReadFull(conn, chunk); err != nil {
					break
				}
				sent := time.Unix(0, int64(binary.LittleEndian.Uint64(chunk)))
				if now := time.Now(); now.After(begin) {
					own = append(own, now.Sub(sent))
				}
			}
			mutex.Lock()
			defer mutex.Unlock()
			late = append(late, own...)
		})
	}
	reading.Wait()
	slices.Sort(late)
	return late, nil
}

// percentile of sorted durations.
func percentile(sorted []time.Duration, percent int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*percent/100)]
}
