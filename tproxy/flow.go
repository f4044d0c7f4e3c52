package tproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/sniff"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Record is what is known of one flow at its end.
type Record struct {
	Start       time.Time
	Duration    time.Duration
	Client      netip.AddrPort
	Destination netip.AddrPort // the original destination: the address that the client dialled
	Name        string         // what the client called it; empty if it did not say
	NameFrom    string         // where Name came from: "sni" or "host"
	Way         string         // "upstream", "direct"; empty if the flow ended before that was decided
	Upstream    string         // the proxy, without credentials; empty for the direct way
	Sent        int64          // bytes from the client to the destination
	Received    int64          // bytes from the destination to the client
	Err         error          // why it ended; nil when both sides closed
}

// handle carries one accepted connection from its first byte to its end. It
// closes the connection.
func (s *Server) handle(ctx context.Context, client *net.TCPConn) Record {
	// Until the relay clears it, the linger time inherited of the listener makes
	// this a reset: a flow that could not be carried must not look finished.
	defer client.Close()

	record := Record{
		Start:       time.Now(),
		Client:      addrPort(client.RemoteAddr()),
		Destination: addrPort(client.LocalAddr()),
	}
	record.Err = s.carry(ctx, client, &record)
	record.Duration = time.Since(record.Start)
	s.warn(record)
	return record
}

// warn logs what an administrator can do something about: an upstream that refuses
// or cannot be reached. A refused credential is told whenever the upstream says
// so, which the credential's breaker makes rare; of the others a burst is enough.
func (s *Server) warn(record Record) {
	if record.Way != wayUpstream || record.Err == nil || record.Sent+record.Received > 0 {
		return
	}
	var refused *upstream.RefusedError
	if errors.As(record.Err, &refused) && refused.Status == http.StatusProxyAuthRequired {
		s.config.Log.Error().Err(record.Err).Msg("the upstream refuses the credential")
		return
	}
	s.burst.Warn().Err(record.Err).Msg("a flow was not carried")
}

// carry does the work of handle and fills record as far as it comes.
func (s *Server) carry(ctx context.Context, client *net.TCPConn, record *Record) error {
	destination := record.Destination
	if s.policy.refuses(destination.Addr()) {
		return errRefused
	}

	var flight []byte
	if sniffer, source := snifferFor(destination.Port()); sniffer != nil {
		name, first, err := s.peek(client, sniffer)
		if err != nil {
			return fmt.Errorf("read the first bytes: %w", err)
		}
		if flight = first; name != "" {
			record.Name, record.NameFrom = name, source
		}
	}

	conn, rest, err := s.dial(ctx, record)
	if err != nil {
		return err
	}
	// io.Copy and the handshake are written for *net.TCPConn; its end is a reset
	// for the same reason as the client's.
	conn.SetLinger(0)
	session := session{client: client, upstream: conn, idle: s.config.IdleTimeout, halfClose: s.config.HalfCloseTimeout}
	stop := context.AfterFunc(ctx, func() { session.abort(errStopped) })
	defer stop()
	record.Sent, record.Received, err = session.relay(flight, rest)
	return err
}

// dial opens the flow's way out. rest is what the far side sent along with the
// proxy's answer.
func (s *Server) dial(ctx context.Context, record *Record) (conn *net.TCPConn, rest []byte, err error) {
	proxy := s.policy.proxy(record.Destination, record.Name)
	if proxy == nil {
		record.Way = wayDirect
		// To the address that the client chose, never to one resolved anew.
		conn, err = s.dialer.Direct(ctx, record.Destination)
		return conn, nil, err
	}
	record.Way, record.Upstream = wayUpstream, proxy.String()
	target := upstream.Target{Host: record.Name, Port: record.Destination.Port()}
	if target.Host == "" {
		target.Host = record.Destination.Addr().Unmap().String()
	}
	return s.dialer.Tunnel(ctx, proxy, target)
}

// peek reads until the sniffer has its answer, bounded in bytes by
// sniff.MaxFlight and in time by the peek limit. A client that stays silent or
// says something else is no error: the flow goes on by its address.
func (s *Server) peek(client *net.TCPConn, sniffer sniffer) (name string, flight []byte, err error) {
	if err := client.SetReadDeadline(time.Now().Add(s.config.PeekTimeout)); err != nil {
		return "", nil, err
	}
	buffer := make([]byte, peekBuffer)
	for n := 0; ; {
		read, err := client.Read(buffer[n:])
		n += read
		flight = buffer[:n]
		var verdict sniff.Verdict
		if name, verdict = sniffer.Next(flight); verdict != sniff.More {
			break
		}
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) || n >= sniff.MaxFlight {
			break
		}
		if err != nil {
			return "", nil, err
		}
		if n == len(buffer) {
			buffer = append(buffer, make([]byte, min(len(buffer), sniff.MaxFlight-n))...)
		}
	}
	return name, flight, client.SetReadDeadline(time.Time{})
}

// peekBuffer holds the usual first flight: a ClientHello with a post-quantum key
// share has about 1,800 bytes.
const peekBuffer = 2 << 10 // bytes

// addrPort is the netip form of a TCP address. IPv4 addresses come out as such.
func addrPort(address net.Addr) netip.AddrPort {
	both := address.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(both.Addr().Unmap(), both.Port())
}
