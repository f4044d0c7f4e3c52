// Package probe asks a proxy what it allows: whom it lets in, where tunnels may lead,
// what it does to TLS, and in which ways names can be asked for through it. It is what
// an engineer wants to know of a network before a gateway is set up in it.
//
// The checks are data (checks.go): each has a name, what it asks, the checks that must
// not have failed before, and a function. They run in stages, those of a stage side by
// side. What a check saw becomes a [Finding]; [Run] returns all of them as a [Report],
// also as JSON.
//
// # The credential
//
// Retries lock accounts, so it goes out under the leases of [upstream.Proxy] as every
// flow's does. The first check sends nothing of it, the second is alone in sending it, and
// unless that one was let in the others follow one by one. After a refusal, or if the
// proxy owes the answer, nothing more is asked.
//
// # What a proxy can do to it
//
// Nothing but say something wrong. Each answer is bounded in bytes and in time, what it
// says is shown in printable characters of bounded length, and of answers to requests
// that had the credential no text is shown at all: it might be repeated there.
package probe

import (
	"context"
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Config is what is asked, and of whom.
type Config struct {
	// Dialer opens all connections.
	Dialer *upstream.Dialer
	Proxy  *upstream.Proxy
	// Host is the DNS name of a public host that serves HTTP at port 80, TLS at 443 and SSH
	// at 22. Address is where it, or another such host, is; IPv6 the same in IPv6, which may
	// be missing.
	Host    string
	Address netip.Addr
	IPv6    netip.Addr
	// NameServer and NameServerAddress are those of a public name server, for the ports 53
	// and 853.
	NameServer        string
	NameServerAddress netip.Addr
	// Ports are those to which tunnels are asked for, besides 443.
	Ports []uint16
	// Resolvers are the ways to ask for Host that are tried.
	Resolvers []Resolver
	// Roots are the certificates to which a public server's must lead; nil for those of
	// the system.
	Roots *x509.CertPool
	// Idle is how long a tunnel is left at rest to see whether it lives; 0 for not.
	Idle time.Duration
}

// Resolver is one way to ask for names.
type Resolver struct {
	Check Check
	Asked string // who is asked, and how, for people
	// Target is where the tunnel leads; the zero Target is a server that is asked
	// directly.
	Target upstream.Target
	// Ask asks a query, a whole DNS message, and returns the answer, which it has matched
	// with the query. dial opens a tunnel, up to three times, unless one was refused; it is
	// nil for a direct server.
	Ask func(ctx context.Context, dial func(context.Context) (net.Conn, error), query []byte) (answer []byte, err error)
}

// Verdict is what a check found.
type Verdict string

// The verdicts, as in JSON.
const (
	Yes     Verdict = "yes"
	No      Verdict = "no"      // it is refused, or does not work
	Unclear Verdict = "unclear" // the answer, or that there was none, proves neither
	Skipped Verdict = "skipped" // it was not asked
)

// Finding is what one check saw.
type Finding struct {
	Check   Check   `json:"check"`
	Asked   string  `json:"asked"` // for people
	Verdict Verdict `json:"verdict"`
	Proof   string  `json:"proof"`            // what was seen, or why nothing was asked; one line of printable characters
	Status  int     `json:"status,omitempty"` // the proxy's, of HTTP or SOCKS5 (reply or method), if it refused
	// Milliseconds is how long it took.
	Milliseconds int64 `json:"milliseconds"`
}

// Report is what all checks saw.
type Report struct {
	Proxy string `json:"proxy"` // its URL without user name and password
	// Usable reports whether the proxy lets TLS of a public host through by its name, which
	// is the least that a gateway needs.
	Usable bool `json:"usable"`
	// Refused reports whether the proxy refused the credential, after which nothing was asked.
	Refused bool `json:"credential_refused"`
	// Schemes are the ways to authenticate that the proxy offers (Proxy-Authenticate).
	Schemes []string `json:"schemes"`
	// Issuer is who signed the certificate that was seen through the proxy, empty if none was.
	Issuer string `json:"issuer,omitempty"`
	// Findings are in the order of the checks.
	Findings []Finding `json:"findings"`
}

// Verdict returns the verdict of a check, Skipped if there was no such check.
func (r *Report) Verdict(check Check) Verdict {
	if at := slices.IndexFunc(r.Findings, func(f Finding) bool { return f.Check == check }); at >= 0 {
		return r.Findings[at].Verdict
	}
	return Skipped
}

// Bounds of time. All stages together, with the longest limit of each, take less than
// the 30 s after which people think that nothing happens.
const (
	// TimeLimit bounds a run without Config.Idle.
	TimeLimit = 29 * time.Second
	// ConnectLimit bounds one connection to the proxy, with the look-up of its name.
	ConnectLimit = 4 * time.Second

	// askLimit bounds one question. Squid gives up a destination that is silent after a
	// minute (connect_timeout); one that answers at all does so within a second or two.
	askLimit = 8 * time.Second
	// speakLimit bounds the wait for what the far side of an open tunnel says.
	speakLimit = 4 * time.Second
	// identifyLimit bounds the questions to what is not the proxy that was configured.
	identifyLimit = 3 * time.Second
)

// Run asks everything and returns when all that it started has ended: within TimeLimit,
// and Config.Idle more if that is set.
func Run(ctx context.Context, config Config) *Report {
	r := &run{
		Config: config,
		report: &Report{Proxy: config.Proxy.String(), Schemes: []string{}},
	}
	ctx, cancel := context.WithTimeout(ctx, TimeLimit+config.Idle)
	defer cancel()
	for _, stage := range r.stages() {
		r.do(ctx, stage)
	}
	r.conclude()
	return r.report
}
