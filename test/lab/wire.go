package lab

import (
	"net"
	"sync"
)

// wireLimit bounds what is kept of one connection: bodies may be long, and tests
// compare heads.
const wireLimit = 64 << 10 // bytes

// wire remembers what arrived at a stand-in, byte for byte. The zero value is ready.
type wire struct {
	mutex   sync.Mutex
	streams [][]byte
}

// Streams is what each connection has carried to the stand-in so far, in the order in
// which they were accepted, without what went through tunnels.
func (w *wire) Streams() []string {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	streams := make([]string, len(w.streams))
	for i, stream := range w.streams {
		streams[i] = string(stream)
	}
	return streams
}

// tap returns a connection whose reads are remembered.
func (w *wire) tap(conn *net.TCPConn) *tapped {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.streams = append(w.streams, nil)
	return &tapped{TCPConn: conn, wire: w, number: len(w.streams) - 1}
}

// tapped is a connection with an ear on it. Its WriteTo, by which tunnels are copied, is
// that of the connection: they are not remembered, and are spliced as ever.
type tapped struct {
	*net.TCPConn
	wire   *wire
	number int
}

func (t *tapped) Read(p []byte) (int, error) {
	n, err := t.TCPConn.Read(p)
	t.wire.mutex.Lock()
	defer t.wire.mutex.Unlock()
	stream := t.wire.streams[t.number]
	t.wire.streams[t.number] = append(stream, p[:min(n, wireLimit-len(stream))]...)
	return n, err
}

// tapListener taps what it accepts.
type tapListener struct {
	net.Listener
	wire *wire
}

func (l tapListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wire.tap(conn.(*net.TCPConn)), nil
}
