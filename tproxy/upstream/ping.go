package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// probe connects to the proxy, as a flow would but with nobody's request, and returns how
// long that took. If it is to answer as well, it is asked something that every proxy of its
// kind answers at once, whatever it thinks of the question; no credential is sent. Nothing
// is noted of how it went.
func (d *Dialer) probe(ctx context.Context, proxy *Proxy, answer bool) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.ConnectTimeout)
	defer cancel()
	addresses, err := d.resolve(ctx, proxy.host)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	conn, err := d.open(ctx, proxy, addresses, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	took = time.Since(start)
	question := proxy.question()
	if !answer || question == nil {
		return took, nil
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(question); err != nil {
		return 0, err
	}
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return 0, fmt.Errorf("it takes connections and says nothing within %s", d.ConnectTimeout)
		}
		return 0, fmt.Errorf("it takes connections and closes them: %w", err)
	}
	return took, nil
}

// question is what a proxy is asked to see whether it is there. It is nil for SOCKS4, in
// which there is no question but that for a tunnel: that it takes connections has to do.
func (p *Proxy) question() []byte {
	switch p.protocol {
	case protocolSOCKS5:
		return []byte{socks5Version, 1, methodNone}
	case protocolSOCKS4A:
		return nil
	}
	authority := "localhost"
	if p.socket == "" {
		authority = joinHostPort(p.host, p.port)
	}
	// RFC 9110 section 9.3.7: about the server as a whole.
	return []byte("OPTIONS * HTTP/1.1\r\nHost: " + authority + "\r\nMax-Forwards: 0\r\nConnection: close\r\n\r\n")
}
