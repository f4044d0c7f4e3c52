package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reverseProxyName makes this program, started again with it, a gateway that serves
// captured connections with net/http and passes the requests on with its Transport,
// as go-transproxy does. Where that one leaves presets which cost it, this one does
// not: 2 idle connections to the proxy, a new buffer for each answer, a log line.
const reverseProxyName = "net/http"

// idleToProxy is how many connections to the proxy may be idle: more than the load
// has at once.
const idleToProxy = 2 * connections

// reverseProxy serves until accepting fails, and returns why.
func reverseProxy() error {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failure error
		err := raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
		return errors.Join(err, failure)
	}}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp4", captureAddress)
	if err != nil {
		return err
	}
	return http.Serve(listener, newReverseProxy(&url.URL{Scheme: "http", Host: proxyAddress}))
}

func newReverseProxy(upstream *url.URL) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite: func(request *httputil.ProxyRequest) {
			request.Out.URL.Scheme, request.Out.URL.Host = "http", request.In.Host
		},
		Transport: &http.Transport{
			Proxy:               http.ProxyURL(upstream),
			MaxIdleConnsPerHost: idleToProxy,
			DisableCompression:  true,
		},
		BufferPool: new(buffers),
	}
}

// buffers are those of answers under way.
type buffers struct{ pool sync.Pool }

// Get returns a buffer of the size that ReverseProxy takes by itself.
func (b *buffers) Get() []byte {
	if buffer, ok := b.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, 32<<10)
}

// Put takes a buffer back.
func (b *buffers) Put(buffer []byte) { b.pool.Put(&buffer) }
