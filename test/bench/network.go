package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// The network: client ── lan0 gateway wan0 ── server. The server is the proxy and,
// behind it and for routed traffic, every origin.
const (
	clientAddress = "192.0.2.2"
	serverAddress = "198.51.100.10"
	proxyPort     = 3128
)

// Ports of the origins; what each does is below.
const (
	portEcho     = 9001
	portSource   = 9002
	portSink     = 9003
	portExchange = 9004
	portPaced    = 9005
	portGreeting = 9006
)

// Sizes of a request and its answer on portExchange.
const (
	requestSize = 100
	answerSize  = 1000
)

// Of each flow on portPaced, which sends 100 kB a second.
const (
	paceChunk    = 10_000 // bytes
	paceInterval = 100 * time.Millisecond
)

// network is the hosts of the benchmark.
type network struct {
	client, gateway, server *netns.NS
	listeners               []net.Listener
	lessons                 int // connections before anything is measured
}

func newNetwork() (*network, error) {
	n := &network{lessons: 200}
	for _, host := range []**netns.NS{&n.client, &n.gateway, &n.server} {
		var err error
		if *host, err = netns.New(); err != nil {
			return nil, err
		}
	}
	err := errors.Join(
		netns.Connect(n.client, "eth0", n.gateway, "lan0"),
		netns.Connect(n.gateway, "wan0", n.server, "eth0"),
		n.client.Addr("eth0", clientAddress+"/24"),
		n.gateway.Addr("lan0", "192.0.2.1/24"),
		n.gateway.Addr("wan0", "198.51.100.1/24"),
		n.server.Addr("eth0", serverAddress+"/24"),
		n.client.Route("0.0.0.0/0", "192.0.2.1"),
		n.gateway.Route("0.0.0.0/0", serverAddress),
		n.server.Route("192.0.2.0/24", "198.51.100.1"),
		n.server.Local("203.0.113.0/24"),
		n.gateway.Sysctl("net.ipv4.ip_forward", "1"),
	)
	for _, host := range []*netns.NS{n.client, n.gateway, n.server} {
		err = errors.Join(err,
			// A pacing congestion control would be measured instead of the gateways.
			host.Sysctl("net.ipv4.tcp_congestion_control", "reno"),
			// Closed connections must not use up the ports of the next round, nor open ones those of listeners.
			host.Sysctl("net.ipv4.ip_local_port_range", "16384 65535"),
			host.Sysctl("net.ipv4.tcp_max_tw_buckets", "500"))
	}
	for port, serve := range map[int]func(*net.TCPConn){
		proxyPort: n.proxy, portEcho: echo, portSource: source, portSink: sink, portExchange: exchange, portPaced: paced, portGreeting: greet,
	} {
		err = errors.Join(err, n.listen(port, serve))
	}
	return n, err
}

func (n *network) close() {
	for _, listener := range n.listeners {
		listener.Close()
	}
	for _, host := range []*netns.NS{n.client, n.gateway, n.server} {
		host.Close()
	}
}

func (n *network) listen(port int, serve func(*net.TCPConn)) error {
	listener, err := n.server.Listen("tcp", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		return err
	}
	n.listeners = append(n.listeners, listener)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			}()
		}
	}()
	return nil
}

// onClient runs workers at once, each on a thread in the client's namespace, and
// returns the first error.
func (n *network) onClient(workers int, work func(worker int) error) error {
	failures := make(chan error, workers)
	for worker := range workers {
		go func() { failures <- n.client.Do(func() error { return work(worker) }) }()
	}
	var failure error
	for range workers {
		if err := <-failures; failure == nil {
			failure = err
		}
	}
	return failure
}

// dial connects to one of many origins; for a worker of onClient.
func dial(number, port int) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second, KeepAlive: -1}
	dialer.SetMultipathTCP(false)
	origin := netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + number%200)})
	conn, err := dialer.Dial("tcp4", netip.AddrPortFrom(origin, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// proxy answers CONNECT and is then the origin that was asked for. It reads the
// head alone, as clients wait for the answer before they go on.
func (n *network) proxy(conn *net.TCPConn) {
	buffer := make([]byte, 1024)
	read := 0
	for !strings.HasSuffix(string(buffer[:read]), "\r\n\r\n") {
		got, err := conn.Read(buffer[read:])
		if err != nil || read+got == len(buffer) {
			return
		}
		read += got
	}
	words := strings.Fields(string(buffer[:read]))
	if len(words) < 2 {
		return
	}
	if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	_, port, _ := strings.Cut(words[1], ":")
	switch port {
	case fmt.Sprint(portEcho):
		echo(conn)
	case fmt.Sprint(portSource):
		source(conn)
	case fmt.Sprint(portSink):
		sink(conn)
	case fmt.Sprint(portExchange):
		exchange(conn)
	case fmt.Sprint(portPaced):
		paced(conn)
	case fmt.Sprint(portGreeting):
		greet(conn)
	}
}

// greet says a byte first, as servers of ssh do more, and waits for the end.
func greet(conn *net.TCPConn) {
	if _, err := conn.Write([]byte{0}); err == nil {
		io.Copy(io.Discard, conn)
	}
}

// echo returns what little it gets.
func echo(conn *net.TCPConn) {
	var buffer [64]byte
	for {
		got, err := conn.Read(buffer[:])
		if err != nil {
			return
		}
		if _, err := conn.Write(buffer[:got]); err != nil {
			return
		}
	}
}

// source sends as many bytes as the line says that it reads.
func source(conn *net.TCPConn) {
	var left int
	if _, err := fmt.Fscanln(bufio.NewReader(conn), &left); err != nil {
		return
	}
	buffer := make([]byte, 256<<10)
	for left > 0 {
		sent, err := conn.Write(buffer[:min(left, len(buffer))])
		if err != nil {
			return
		}
		left -= sent
	}
}

// sink reads to the end and says how much that was.
func sink(conn *net.TCPConn) {
	buffer := make([]byte, 256<<10)
	total := 0
	for {
		got, err := conn.Read(buffer)
		total += got
		if err == io.EOF {
			fmt.Fprintln(conn, total)
		}
		if err != nil {
			return
		}
	}
}

// exchange answers requests.
func exchange(conn *net.TCPConn) {
	request, answer := make([]byte, requestSize), make([]byte, answerSize)
	for {
		if _, err := io.ReadFull(conn, request); err != nil {
			return
		}
		if _, err := conn.Write(answer); err != nil {
			return
		}
	}
}

// paced sends a chunk that begins with the time, again and again.
func paced(conn *net.TCPConn) {
	chunk := make([]byte, paceChunk)
	for range time.Tick(paceInterval) {
		binary.LittleEndian.PutUint64(chunk, uint64(time.Now().UnixNano()))
		if _, err := conn.Write(chunk); err != nil {
			return
		}
	}
}
