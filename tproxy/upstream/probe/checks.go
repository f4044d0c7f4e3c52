package probe

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// Check names a check, as in JSON.
type Check string

// The checks. Those of tunnels are named by [Tunnel].
const (
	Reachable      Check = "reachable"      // the proxy's name is found and it is connected to
	Protocol       Check = "protocol"       // it speaks what its URL says
	Authentication Check = "authentication" // it lets in, with the credential if it wants one
	AbsoluteForm   Check = "absolute_form"  // it takes GET http://host/ (RFC 9112 section 3.2.2)
	IntactTLS      Check = "intact_tls"     // TLS comes from the host itself and is not opened
	UDPAssociate   Check = "udp_associate"  // SOCKS5: it relays datagrams
	Idle           Check = "idle"           // a tunnel at rest lives

	SystemDNS Check = "system_dns" // this network's own name servers know public names
	DirectDNS Check = "direct_dns" // a public name server answers without the proxy
	TCPDNS    Check = "dns_tcp"    // the others: through a tunnel
	HTTPSDNS  Check = "dns_https"
	TLSDNS    Check = "dns_tls"
)

// The ways to give the target of a tunnel to the proxy.
const (
	ByName    = "name"
	ByAddress = "address"
	ByIPv6    = "ipv6"
)

// Tunnel names the check whether a tunnel to a port is opened, by one of the ways:
// connect_443_name.
func Tunnel(port uint16, by string) Check {
	return Check(fmt.Sprintf("connect_%d_%s", port, by))
}

// check is one question.
type check struct {
	name  Check
	asked string
	needs Check // skipped if that did not find Yes; empty for none
	limit time.Duration
	ask   func(ctx context.Context) result
}

// result is what a check saw.
type result struct {
	verdict Verdict
	proof   string
	status  int
}

// run is one run of the checks.
type run struct {
	Config
	report *Report

	// Of the first answer.
	open    bool // a tunnel was opened without the credential
	demands bool // the credential is asked for

	mutex  sync.Mutex
	denied bool // the credential was refused
	owed   bool // it was sent, and no answer came
}

// stages are the checks: each stage is done when the one before has ended.
func (r *run) stages() [][]check {
	first := []check{{Reachable, "connect to the proxy", "", ConnectLimit, r.reach}}
	second := []check{{Protocol, "it speaks " + r.scheme(), Reachable, askLimit, r.speaks}}
	third := []check{{Authentication, "it lets in", Protocol, askLimit, r.authenticate}}
	var fourth []check
	for _, port := range append([]uint16{portHTTPS}, r.Ports...) {
		for _, target := range r.targets(port) {
			fourth = append(fourth, check{
				Tunnel(port, target.by), "CONNECT " + authority(target.Target), Authentication, askLimit,
				func(ctx context.Context) result { return r.tunnel(ctx, target.Target, target.name) },
			})
		}
	}
	if r.Proxy.PlainHTTP() {
		fourth = append(fourth, check{AbsoluteForm, "GET http://" + r.Host + "/", Authentication, askLimit, r.absolute})
	}
	fourth = append(fourth, check{IntactTLS, "TLS is not opened", Authentication, askLimit, r.inspect})
	if !r.Proxy.PlainHTTP() {
		fourth = append(fourth, check{UDPAssociate, "UDP ASSOCIATE", Authentication, askLimit, r.associate})
	}
	for _, resolver := range r.Resolvers {
		c := check{resolver.Check, resolver.Asked, Authentication, askLimit, func(ctx context.Context) result { return r.resolve(ctx, resolver) }}
		if resolver.Target.Host == "" {
			c.needs = "" // it does without the proxy
		}
		fourth = append(fourth, c)
	}
	stages := [][]check{first, second, third, fourth}
	if r.Config.Idle > 0 {
		stages = append(stages, []check{{
			Idle, fmt.Sprintf("a tunnel at rest lives %s", r.Config.Idle),
			Tunnel(portHTTPS, ByName), r.Config.Idle + askLimit, r.rest,
		}})
	}
	return stages
}

// target is where a tunnel may lead, and how that is said to the proxy.
type target struct {
	upstream.Target
	by   string
	name string // of the host, however it is given
}

// Ports with a meaning: RFC 4253 section 4.1, RFC 1035 section 4.2, RFC 9110 section 4.2,
// RFC 7858 section 3.1.
const (
	portSSH        = 22
	portDNS        = 53
	portHTTP       = 80
	portHTTPS      = 443
	portDNSOverTLS = 853
)

// targets are the tunnels that are asked for to a port. IPv6 is asked for once.
func (r *run) targets(port uint16) []target {
	name, address := r.Host, r.Address
	if port == portDNS || port == portDNSOverTLS {
		name, address = r.NameServer, r.NameServerAddress
	}
	var targets []target
	if _, err := netip.ParseAddr(name); err != nil && name != "" {
		targets = append(targets, target{upstream.Target{Host: name, Port: port}, ByName, name})
	}
	if address.IsValid() {
		targets = append(targets, target{upstream.Target{Host: address.String(), Port: port}, ByAddress, name})
	}
	if port == portHTTPS && r.IPv6.IsValid() {
		targets = append(targets, target{upstream.Target{Host: r.IPv6.String(), Port: port}, ByIPv6, name})
	}
	return targets
}

// authority is a target as it is written.
func authority(t upstream.Target) string {
	if address, err := netip.ParseAddr(t.Host); err == nil {
		return netip.AddrPortFrom(address, t.Port).String()
	}
	return fmt.Sprintf("%s:%d", t.Host, t.Port)
}

// do does the checks of a stage: side by side, unless nothing is known of the credential
// yet, and one of them has to find out.
func (r *run) do(ctx context.Context, stage []check) {
	findings := make([]Finding, len(stage))
	var asking sync.WaitGroup
	for i, c := range stage {
		findings[i] = Finding{Check: c.name, Asked: c.asked}
		if _, settled := r.Proxy.Standing(); !settled {
			asking.Wait()
		}
		asking.Go(func() { r.answer(ctx, c, &findings[i]) })
	}
	asking.Wait()
	r.report.Findings = append(r.report.Findings, findings...)
}

// answer does one check.
func (r *run) answer(ctx context.Context, c check, f *Finding) {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	start := time.Now()
	var got result
	switch {
	case c.needs != "" && r.stopped() != "":
		got = result{verdict: Skipped, proof: r.stopped()}
	case c.needs != "" && r.report.Verdict(c.needs) != Yes:
		got = result{verdict: Skipped, proof: "not asked, because of what is said above"}
	case ctx.Err() != nil:
		got = result{verdict: Skipped, proof: "not asked: there was no time left"}
	default:
		got = c.ask(ctx)
	}
	f.Verdict, f.Proof, f.Status = got.verdict, clean(got.proof), got.status
	f.Milliseconds = time.Since(start).Milliseconds()
}

// stopped says why nothing more may be asked of the proxy; empty if it may.
func (r *run) stopped() string {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	switch {
	case r.denied:
		return "not asked: the credential was refused, and retries lock accounts"
	case r.owed:
		return "not asked: the answer to the credential did not come, and retries lock accounts"
	}
	return ""
}

// conclude draws the sum. A refusal that came late is one of the authentication all the
// same.
func (r *run) conclude() {
	r.report.Refused = r.denied
	for i := range r.report.Findings {
		if f := &r.report.Findings[i]; f.Check == Authentication && r.denied {
			f.Verdict, f.Proof = No, r.refusal()
		}
	}
	r.report.Usable = !r.denied && r.report.Verdict(Tunnel(portHTTPS, ByName)) == Yes
}
