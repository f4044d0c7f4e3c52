package lab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// HTTPClient is a client in a namespace, without any proxy setting. It knows hosts
// by their names, as if from a hosts file; every request takes a new connection.
func HTTPClient(ns *netns.NS, hosts map[string]netip.Addr, roots *x509.CertPool) *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy:             nil,
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			host, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			if known, ok := hosts[host]; ok {
				host = known.String()
			}
			if _, err := netip.ParseAddr(host); err != nil {
				return nil, fmt.Errorf("%s is not in the client's hosts", host)
			}
			return ns.Dial(ctx, network, net.JoinHostPort(host, port))
		},
	}}
}
