package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// The network: client ── lan0 gateway wan0 ── upstream. The upstream is the proxy,
// and the origin of what is routed past it.
const (
	clientNetwork   = "192.0.2.0/24"
	clientAddress   = "192.0.2.2"
	upstreamAddress = "198.51.100.10"
	proxyAddress    = upstreamAddress + ":3128"
	originNetwork   = "203.0.113.0/24"
	originAddress   = "203.0.113.7"
	originName      = "origin.example"
	// routedAddress is the origin's as well, for what no gateway captures. A captured
	// connection that has ended rests for a minute on the gateway (TIME_WAIT), and as
	// long the kernel forwards none between the same addresses and ports: it drops a
	// packet for which it finds a socket of its own (ip_forward of net/ipv4).
	routedAddress = "203.0.113.8"
)

// network is the hosts of the benchmark and the servers on the upstream.
type network struct {
	client, gateway, upstream *netns.NS
	proxy, origin             *standIn
}

func newNetwork() (_ *network, err error) {
	n := new(network)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	for _, host := range []**netns.NS{&n.client, &n.gateway, &n.upstream} {
		if *host, err = netns.New(); err != nil {
			return nil, err
		}
	}
	err = errors.Join(
		netns.Connect(n.client, "eth0", n.gateway, "lan0"),
		netns.Connect(n.gateway, "wan0", n.upstream, "eth0"),
		n.client.Addr("eth0", clientAddress+"/24"),
		n.gateway.Addr("lan0", "192.0.2.1/24"),
		n.gateway.Addr("wan0", "198.51.100.1/24"),
		n.upstream.Addr("eth0", upstreamAddress+"/24"),
		n.client.Route("0.0.0.0/0", "192.0.2.1"),
		n.gateway.Route("0.0.0.0/0", upstreamAddress),
		n.upstream.Route(clientNetwork, "198.51.100.1"),
		n.upstream.Local(originNetwork),
		n.gateway.Sysctl("net.ipv4.ip_forward", "1"),
	)
	for _, host := range []*netns.NS{n.client, n.gateway, n.upstream} {
		err = errors.Join(err,
			// A pacing congestion control would be measured instead of the gateways.
			host.Sysctl("net.ipv4.tcp_congestion_control", "reno"),
			// Closed connections must not use up the ports of the next round, nor open ones those of listeners.
			host.Sysctl("net.ipv4.ip_local_port_range", "16384 65535"),
			host.Sysctl("net.ipv4.tcp_max_tw_buckets", "500"))
	}
	if err != nil {
		return nil, err
	}
	if n.proxy, err = listen(n.upstream, proxyAddress, proxyServer, "GET http://"+originName); err != nil {
		return nil, err
	}
	n.origin, err = listen(n.upstream, "0.0.0.0:80", originServer, "GET /")
	return n, err
}

// close ends the servers and gives the hosts up.
func (n *network) close() error {
	for _, server := range []*standIn{n.proxy, n.origin} {
		if server != nil {
			server.close()
		}
	}
	var failure error
	for _, host := range []*netns.NS{n.client, n.gateway, n.upstream} {
		if host != nil {
			failure = errors.Join(failure, host.Close())
		}
	}
	return failure
}

// dial connects the client to the origin, or to who stands in its way.
func (n *network) dial() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return n.client.Dial(ctx, "tcp4", originAddress+":80")
}

// get sends a request on a connection on which nothing is under way, and tells which
// server has answered it.
func get(conn net.Conn) (server string, err error) {
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", originName); err != nil {
		return "", err
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && (answer.StatusCode != http.StatusOK || len(body) != bodySize) {
		err = fmt.Errorf("answered with %s and %d bytes", answer.Status, len(body))
	}
	return answer.Header.Get("Server"), err
}

// getOnce sends a request on a connection of its own.
func (n *network) getOnce() (server string, err error) {
	conn, err := n.dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return get(conn)
}
