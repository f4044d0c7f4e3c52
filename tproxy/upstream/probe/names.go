package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// resolve asks for the host's address in one of the ways.
func (r *run) resolve(ctx context.Context, resolver Resolver) result {
	query, err := question(r.Host)
	if err != nil {
		return result{verdict: Skipped, proof: err.Error()}
	}
	if resolver.Target.Host == "" {
		answer, err := resolver.Ask(ctx, nil, query)
		if err != nil {
			return lost(err)
		}
		return judge(answer)
	}
	tunnels := &opener{open: func(ctx context.Context) (net.Conn, error) { return r.dial(ctx, resolver.Target) }}
	answer, err := resolver.Ask(ctx, tunnels.dial, query)
	switch failure := tunnels.failure(); {
	case failure != nil:
		return r.failed(failure)
	case err != nil:
		return lost(err)
	}
	return judge(answer)
}

// opener opens the tunnels of a resolver. When one was not opened it tries no other:
// that would send the credential again.
type opener struct {
	open func(context.Context) (net.Conn, error)

	mutex  sync.Mutex
	opened int
	failed error // why the last one was not
}

// maxTunnels bounds the tunnels for one question: a resolver makes a second try when
// what is at the end of the first fails.
const maxTunnels = 3

func (o *opener) dial(ctx context.Context) (net.Conn, error) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	switch {
	case o.failed != nil:
		return nil, o.failed
	case o.opened == maxTunnels:
		return nil, errors.New("the connections were closed without an answer")
	}
	o.opened++
	conn, err := o.open(ctx)
	o.failed = err
	return conn, err
}

// failure is why there is no tunnel; nil if all were opened.
func (o *opener) failure() error {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.failed
}

// question is the query for a host's IPv4 addresses.
func question(host string) ([]byte, error) {
	name, err := dnsmessage.NewName(host + ".")
	if err != nil {
		return nil, fmt.Errorf("%q is not a name to ask for: %w", host, err)
	}
	message := dnsmessage.Message{
		Header:    dnsmessage.Header{RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	return message.Pack()
}

// judge looks for a public address in an answer.
func judge(answer []byte) result {
	var parser dnsmessage.Parser
	header, err := parser.Start(answer)
	if err != nil {
		return result{verdict: No, proof: "the answer is malformed"}
	}
	if header.RCode != dnsmessage.RCodeSuccess {
		return result{verdict: No, proof: "answered " + responseCode(header.RCode)}
	}
	if err := parser.SkipAllQuestions(); err != nil {
		return result{verdict: No, proof: "the answer is malformed"}
	}
	for {
		record, err := parser.AnswerHeader()
		switch {
		case err == dnsmessage.ErrSectionDone:
			return result{verdict: No, proof: "answered without an address"}
		case err != nil:
			return result{verdict: No, proof: "the answer is malformed"}
		}
		if record.Type != dnsmessage.TypeA {
			if err := parser.SkipAnswer(); err != nil {
				return result{verdict: No, proof: "the answer is malformed"}
			}
			continue
		}
		resource, err := parser.AResource()
		if err != nil {
			return result{verdict: No, proof: "the answer is malformed"}
		}
		address := netip.AddrFrom4(resource.A)
		if address.IsPrivate() || address.IsUnspecified() || address.IsLoopback() || address.IsLinkLocalUnicast() {
			return result{verdict: No, proof: "answered " + address.String() + ", which is no public address"}
		}
		return result{verdict: Yes, proof: "answered " + address.String()}
	}
}

// responseCode is a code by the name that people know it by (RFC 1035 section 4.1.1).
func responseCode(code dnsmessage.RCode) string {
	names := map[dnsmessage.RCode]string{
		dnsmessage.RCodeServerFailure: "SERVFAIL", dnsmessage.RCodeNameError: "NXDOMAIN", dnsmessage.RCodeRefused: "REFUSED",
	}
	if name, known := names[code]; known {
		return name
	}
	return fmt.Sprintf("with code %d", code)
}
