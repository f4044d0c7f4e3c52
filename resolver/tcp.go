package resolver

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

const (
	// tcpIdle closes a connection on which nothing is asked: RFC 7766 section 6.2.3
	// has it in the order of seconds.
	tcpIdle = 20 * time.Second
	// tcpPressed is the same while more than half of the connections that a listener
	// may have are open.
	tcpPressed = 2 * time.Second
	// tcpPerClient bounds the connections of one client: RFC 7766 section 6.2.2 wants
	// them to have one.
	tcpPerClient = 20
	// tcpPipelined bounds the questions of a connection that are worked out at once;
	// meanwhile no more are read.
	tcpPipelined = 100
	// tcpWrite bounds how long a client may leave its answers unread.
	tcpWrite = 5 * time.Second
	// tcpPause is how long a listener rests after an error, such as a full
	// descriptor table.
	tcpPause = 50 * time.Millisecond
	// tcpLimit is the longest message: RFC 1035 section 4.2.2.
	tcpLimit = 1<<16 - 1
)

// tcpListener is a listening socket and its connections.
type tcpListener struct {
	listener    *net.TCPListener
	transparent bool

	mutex   sync.Mutex
	open    map[net.Conn]netip.Addr // their clients
	clients map[netip.Addr]int      // how many they have
	closed  bool
}

func listenTCP(address netip.AddrPort, transparent bool, mark uint32) (*tcpListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		options := shared(mark)
		if transparent {
			options = append(options, transparency(address.Addr()))
		}
		var failure error
		err := raw.Control(func(fd uintptr) { failure = setOptions(int(fd), options) })
		return errors.Join(err, failure)
	}}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), network("tcp", address), address.String())
	if err != nil {
		return nil, err
	}
	return &tcpListener{listener: listener.(*net.TCPListener), transparent: transparent, open: make(map[net.Conn]netip.Addr), clients: make(map[netip.Addr]int)}, nil
}

// close ends the listener and its connections.
func (l *tcpListener) close() {
	l.listener.Close()
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.closed = true
	for conn := range l.open {
		conn.Close()
	}
}

// enter takes note of a connection, unless the listener is closed or the client has too
// many.
func (l *tcpListener) enter(conn net.Conn, client netip.Addr) bool {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.closed || l.clients[client] >= tcpPerClient {
		return false
	}
	l.open[conn] = client
	l.clients[client]++
	return true
}

// idle is how long a connection may wait for a question now.
func (l *tcpListener) idle(most int) time.Duration {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if len(l.open) > most/2 {
		return tcpPressed
	}
	return tcpIdle
}

func (l *tcpListener) leave(conn net.Conn) {
	conn.Close()
	l.mutex.Lock()
	defer l.mutex.Unlock()
	client := l.open[conn]
	delete(l.open, conn)
	if l.clients[client]--; l.clients[client] == 0 {
		delete(l.clients, client)
	}
}

// serveTCP serves the connections of a listener until that is closed.
func (s *Server) serveTCP(ctx context.Context, l *tcpListener) error {
	slots := make(chan struct{}, s.config.MaxConnections)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := l.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			<-slots
			time.Sleep(tcpPause)
			continue
		}
		client := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if !l.enter(conn, client) {
			conn.Close()
			<-slots
			continue
		}
		s.running.Go(func() {
			s.serveConn(ctx, conn, l, client)
			l.leave(conn)
			<-slots
		})
	}
}

// serveConn answers the queries of one connection, in the order in which their
// answers are there (RFC 7766 section 6.2.1.1).
func (s *Server) serveConn(ctx context.Context, conn net.Conn, l *tcpListener, client netip.Addr) {
	allowed := l.transparent || s.config.Allow == nil || s.config.Allow(client.WithZone(""))
	var writing sync.Mutex
	send := func(q *query, o outcome, start time.Time) {
		s.rememberAll(client, q, o.answer)
		answer := q.dress(o.answer, o.rcode, o.why, tcpLimit)
		framed := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(answer)), uint16(len(answer))), answer...)
		writing.Lock()
		conn.SetWriteDeadline(time.Now().Add(tcpWrite))
		_, err := conn.Write(framed)
		writing.Unlock()
		if err != nil {
			s.stats.noReply.Add(1)
			conn.Close()
		}
		s.done(q, o, start, client, "tcp")
	}
	var working sync.WaitGroup
	defer working.Wait()
	slots := make(chan struct{}, tcpPipelined)
	from := bufio.NewReader(conn)
	for {
		idle := l.idle(s.config.MaxConnections)
		if !allowed {
			idle = tcpPressed // it is told so, and keeps no place from others
		}
		conn.SetReadDeadline(time.Now().Add(idle))
		message, err := readMessage(from)
		if err != nil {
			return
		}
		start := time.Now()
		q := new(query)
		fault := q.read(message)
		if fault != nil || !allowed || q.version != 0 {
			if o, ok := s.refused(q, fault, allowed); ok {
				send(q, o, start)
			}
			if fault == errIgnored || !allowed {
				return // a stream that is out of step, or a stranger
			}
			continue
		}
		key := q.key(nil)
		if o, ok := s.cached(ctx, q, key, nil); ok {
			send(q, o, start)
			continue
		}
		slots <- struct{}{}
		working.Go(func() {
			send(q, s.work(ctx, client, q, key), start)
			<-slots
		})
	}
}

// readMessage reads a message behind its length: RFC 1035 section 4.2.2. A query is
// short; what is announced as longer than a datagram is not waited for.
func readMessage(from *bufio.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(from, size[:]); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint16(size[:]))
	if length > maxDatagram {
		return nil, errForm
	}
	message := make([]byte, length)
	_, err := io.ReadFull(from, message)
	return message, err
}
