package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter/firewalld"
	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter/sklookup"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/udp"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

// gateway is one run of the program: the parts and what they share.
type gateway struct {
	settings   *settings
	families   families
	roles      roles
	capacity   capacity
	log        zerolog.Logger
	access     *accessLog
	names      *names                                  // nil without DNS
	local      atomic.Pointer[map[netip.Addr]struct{}] // the gateway's own addresses
	neighbours atomic.Pointer[[]netip.Prefix]          // the networks of the capturing interfaces

	dialers    dialers
	netfilter  *netfilter.Handle // nil with --disable-iptables
	routing    *routing.Handle
	parameters *routing.Parameters // nil with --disable-iptables
	openings   *firewalld.Rules    // the same
	applied    netfilter.Config    // as the kernel has it
	steering   *sklookup.Handle    // nil while the rules deliver
	assigned   bool                // it has the listeners
	uncaptured []string            // interfaces that the log has told of
	uplink     string              // see uplinkOf
	server     *tproxy.Server
	datagrams  *udp.Server // nil where no UDP is captured but DNS

	planning sync.Mutex // guards the rules, the engine and what follows
	planned  *plan      // applied last, with all UDP that is to be captured; nil before and once it stops
	carried  bool       // the upstream carries UDP, as far as is known
}

// open takes the lock; no traffic is touched yet.
func (g *gateway) open() (err error) {
	if g.settings.install && !g.settings.http.only {
		if g.netfilter, err = netfilter.Open(g.settings.nftTable); err != nil {
			return err
		}
		if !g.netfilter.Owned() {
			g.log.Warn().Msg("this kernel has no owner flag for nftables tables (it came with 5.12): if this program is killed, run `transproxy-tproxy cleanup`")
		}
		if g.netfilter.Standing() && !g.settings.failClosed {
			g.log.Warn().Msg("--fail open: this takes away what `transproxy-tproxy guard` installed; --fail closed keeps it")
		}
	}
	if g.netfilter != nil {
		if g.parameters, err = routing.OpenParameters(g.settings.parametersFile()); err != nil {
			return errors.Join(err, g.close())
		}
		if g.openings, err = firewalld.Open(g.settings.openingsFile()); err != nil {
			return errors.Join(err, g.close())
		}
	}
	if g.routing, err = routing.Open(); err != nil {
		return errors.Join(err, g.close())
	}
	return nil
}

// install changes the kernel: what receives captured packets first, what captures
// them last. With --disable-iptables it prints what to install instead.
func (g *gateway) install(p *plan) error {
	switch {
	case g.settings.http.only:
		return nil
	case g.netfilter == nil:
		_, err := os.Stderr.WriteString(p.text())
		return err
	}
	if err := g.routing.Apply(p.routing); err != nil {
		return err
	}
	if err := g.setParameters(*p); err != nil {
		return err
	}
	_, err := g.applyRules(p)
	return err
}

// setParameters makes a router of this host if it is to be one; else it puts back what a
// killed instance left.
func (g *gateway) setParameters(p plan) error {
	if len(p.router) == 0 {
		return g.parameters.Restore()
	}
	if err := g.parameters.Set(p.router); err != nil {
		return fmt.Errorf("--gateway: %w", err)
	}
	return nil
}

// close undoes open and install.
func (g *gateway) close() (err error) {
	if g.dialers.tunnel != nil {
		g.dialers.tunnel.Close()
	}
	if g.netfilter != nil {
		err = g.netfilter.Close()
	}
	err = errors.Join(err, g.unsteer())
	if g.parameters != nil {
		err = errors.Join(err, g.parameters.Restore())
	}
	if g.openings != nil {
		err = errors.Join(err, g.openings.Close())
	}
	if g.routing != nil {
		err = errors.Join(err, g.routing.Close())
	}
	return err
}

// serve runs all parts until a signal or the failure of one, then stops them in
// the order that loses nothing: no new flow is captured, the running ones drain.
func (g *gateway) serve(signals <-chan os.Signal) (failure error) {
	serving := []*part{start(g.server.Serve)}
	if g.names != nil {
		serving = append(serving, start(g.names.server.Serve))
	}
	if g.datagrams != nil {
		serving = append(serving, start(g.datagrams.Serve))
	}
	watching := []*part{start(g.watchRouting)}
	for _, group := range g.settings.groups() {
		watching = append(watching, start(func(ctx context.Context) error {
			group.Watch(ctx, g.dialers.tunnel, g.tellUpstream)
			return nil
		}))
	}
	if script := g.settings.script; script != nil {
		watching = append(watching, start(func(ctx context.Context) error {
			return script.serve(ctx, g.dialers.tunnel, g.tellUpstream)
		}))
	}
	if g.netfilter != nil {
		watching = append(watching, start(g.netfilter.Watch))
	}
	if g.settings.firewalld && g.openings != nil {
		watching = append(watching, start(g.watchFirewalld))
	}
	if g.settings.credentialsFile() != "" {
		watching = append(watching, start(g.watchCredentials))
	}
	g.wait(signals, slices.Concat(watching, serving))

	// From here on the kernel's default applies: a second signal ends the program.
	signal.Reset(unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	// Those that watch end first, lest they put back what is taken away now.
	for _, watcher := range watching {
		failure = errors.Join(failure, watcher.end())
	}
	g.keepRules()
	if g.netfilter != nil {
		failure = errors.Join(failure, g.netfilter.Drain())
	}
	for _, server := range serving {
		failure = errors.Join(failure, server.end())
	}
	stats := g.server.Stats()
	stopped := g.log.Info()
	if g.names != nil {
		stopped.Interface("dns_answers", g.names.server.Stats().Results)
	}
	if g.datagrams != nil {
		udp := g.datagrams.Stats()
		stopped.Int64("udp_sessions", udp.Opened).Int64("udp_sent", udp.Sent).Int64("udp_received", udp.Received).
			Interface("udp_dropped", udp.Dropped)
	}
	stopped.
		Int64("flows", stats.Accepted).
		Int64("refused", stats.Refused).
		Int64("accept_errors", stats.AcceptErrors).
		Int64("ports_exhausted", stats.PortsExhausted).
		Int64("spliced_bytes", stats.Spliced).
		Int64("log_lines_lost", g.access.lost.Load()).
		Msg("stopped")
	return failure
}

// wait returns at a signal to stop, or when a part has ended by itself.
func (g *gateway) wait(signals <-chan os.Signal, parts []*part) {
	ended := make(chan struct{}, len(parts))
	for _, p := range parts {
		go func() {
			<-p.ended
			ended <- struct{}{}
		}()
	}
	for {
		select {
		case <-ended:
			return
		case signal := <-signals:
			if signal != unix.SIGHUP {
				g.log.Info().Stringer("signal", signal).Msg("stopping")
				return
			}
			g.reload()
		}
	}
}

// part is something that runs until it is ended or fails.
type part struct {
	stop  context.CancelFunc
	ended chan struct{}
	err   error // to be read once ended is closed
}

func start(run func(context.Context) error) *part {
	ctx, stop := context.WithCancel(context.Background())
	p := &part{stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		p.err = run(ctx)
	}()
	return p
}

// end stops the part and returns its error.
func (p *part) end() error {
	p.stop()
	<-p.ended
	return p.err
}

// reload is what SIGHUP asks for.
func (g *gateway) reload() {
	if err := g.settings.logIn(); err != nil {
		g.log.Error().Err(err).Msg("the credentials stay as they were")
	}
	for _, proxy := range g.settings.upstreams() {
		proxy.Reset()
	}
	if g.datagrams != nil {
		g.datagrams.Retry()
	}
	if err := g.access.reopen(); err != nil {
		g.log.Error().Err(err).Msg("reloaded: a refused credential is tried again; the access log stays as it was")
		return
	}
	g.log.Info().Msg("reloaded: a refused credential is tried again, the access log is reopened")
}

// watchRouting repairs rules and routes and follows the host's network.
func (g *gateway) watchRouting(ctx context.Context) error {
	return g.routing.Watch(ctx, func(event routing.Event) {
		switch {
		case event.Err != nil:
			g.log.Error().Err(event.Err).Msg("captured flows may not be delivered")
		case event.Restored != "":
			g.log.Warn().Str("restored", event.Restored).Msg("another program had removed it")
		case event.Changed:
			g.follow()
		}
	})
}

// follow fits the capture rules to what the host's network has become.
func (g *gateway) follow() {
	host, err := routing.Look()
	if err != nil {
		g.log.Error().Err(err).Msg("the capture rules stay as they were")
		return
	}
	p, err := g.settings.newPlan(g.families, g.roles, host)
	if err != nil {
		g.log.Error().Err(err).Msg("the capture rules stay as they were")
		return
	}
	g.setLocal(host, p.capture)
	if uplink := uplinkOf(host); uplink != g.uplink {
		g.uplink = uplink
		g.networkChanged()
	}
	if g.netfilter == nil {
		return
	}
	if err := g.parameters.Set(p.router); err != nil {
		g.log.Error().Err(err).Msg("not all is forwarded")
	}
	// Links and routes change a lot on a host with containers, mostly without
	// meaning for the rules.
	engine := g.engineInUse()
	changed, err := g.applyRules(&p)
	if err != nil {
		g.log.Error().Err(err).Msg("not all is captured")
		return
	}
	if changed {
		if p.engine.String() != engine {
			g.log.Info().Stringer("engine", p.engine).Str("why", p.engine.why).Msg("the engine has changed")
		}
		g.log.Info().Strs("interfaces", p.capture.interfaces).Stringers("clients", stringers(p.clients)).Msg("the host's network has changed")
	}
	g.verify(p)
	// Last, because firewalld may take its time.
	if err := g.pass(p, host); err != nil {
		g.log.Error().Err(err).Msg("firewalld may drop captured packets")
	}
}

// uplinkOf is what has to stay the same for the ways to the upstreams to be the same: the
// interfaces of the default routes and their addresses, or without such a route all.
func uplinkOf(host routing.Host) string {
	var uplink strings.Builder
	for _, link := range host.Interfaces {
		if link.Up && (len(host.Uplinks) == 0 || slices.Contains(host.Uplinks, link.Name)) {
			// No way leads over an address of the link, which comes when that is up.
			routed := slices.DeleteFunc(slices.Clone(link.Addrs), netip.Addr.IsLinkLocalUnicast)
			fmt.Fprintln(&uplink, link.Name, routed)
		}
	}
	return uplink.String()
}

// networkChanged has nobody wait for what was true in another network.
func (g *gateway) networkChanged() {
	g.dialers.tunnel.NetworkChanged()
	g.server.NetworkChanged()
	for _, group := range g.settings.groups() {
		group.NetworkChanged()
	}
	if g.settings.script != nil {
		g.settings.script.pac.Refresh()
	}
	if g.datagrams != nil {
		g.datagrams.Retry()
	}
}

// tellUpstream says that an upstream went down or came back.
func (g *gateway) tellUpstream(change upstream.Change) {
	switch upstream := change.Proxy.String(); {
	case change.Up:
		g.log.Info().Str("upstream", upstream).Msg("the upstream is up again")
	case change.None:
		g.log.Error().Str("upstream", upstream).Err(change.Err).Msg("the upstream is down: flows fail at once until it answers")
	default:
		g.log.Warn().Str("upstream", upstream).Err(change.Err).Msg("the upstream is down: others carry its flows")
	}
}

// verify says so when marked packets would not be delivered.
func (g *gateway) verify(p plan) {
	if err := g.routing.Verify(p.capture.interfaces...); err != nil {
		g.log.Error().Err(err).Msg("captured flows are not delivered")
	}
}

// setLocal takes note of the host's addresses and of its neighbours.
func (g *gateway) setLocal(host routing.Host, c capture) {
	local := make(map[netip.Addr]struct{})
	for _, link := range host.Interfaces {
		for _, address := range link.Addrs {
			local[address] = struct{}{}
		}
	}
	g.local.Store(&local)
	g.neighbours.Store(&c.networks)
}

// owns reports whether an address is the gateway's own.
func (g *gateway) owns(address netip.Addr) bool {
	_, own := (*g.local.Load())[address]
	return own
}

// tproxy is what the settings ask of the package tproxy.
func (g *gateway) tproxy(d dialers) tproxy.Config {
	s := g.settings
	return tproxy.Config{
		Listen:           s.listenTCP(g.families),
		Dialer:           d.tunnel,
		Mark:             s.bypassMark(),
		MaxFlows:         s.maxConns,
		MaxPipes:         g.capacity.pipes,
		MaxWarm:          s.warm,
		PeekTimeout:      s.peekTimeout,
		ConnectTimeout:   s.connectTimeout,
		HandshakeTimeout: s.replyTimeout,
		IdleTimeout:      s.idleTimeout,
		HalfCloseTimeout: s.halfClose,
		DrainTimeout:     s.drainTimeout,
		Explicit:         g.explicit(),
		AllowTo:          s.http.allowTo,
		Via:              s.http.via,
		ForwardedFor:     s.http.forwardedFor,
		Query:            s.query,
		Request:          g.access.request,
		Access:           g.access.flow,
		Log:              g.log,
	}
}

func (g *gateway) policy() tproxy.Policy {
	p := tproxy.Policy{
		Bypass:   g.settings.noProxy,
		Upstream: g.settings.upstream,
		HTTP:     g.settings.httpUpstream,
		Plain:    g.settings.http.plain,
		Local:    g.owns,
	}
	if g.settings.script != nil {
		p.Script = g.settings.script
	}
	if g.settings.dns.enabled() {
		p.Name, p.Placeholder = g.nameOf, g.isFake
	}
	return p
}

// announce says what runs and what to check when a client is not captured.
func (g *gateway) announce(p plan) {
	s := g.settings
	if s.http.only {
		g.log.Info().Msg("nothing is captured: this is a proxy for clients that have proxy settings")
		p.capture.interfaces = nil
	} else {
		g.announceCapture(p)
	}
	if s.dns.hasPublic() && len(s.dns.private) == 0 && len(s.noProxy.Suffixes()) > 0 {
		g.log.Warn().Msg("the names of --no-proxy are asked of the public servers like all others: give --private-dns if those do not know them")
	}
	g.log.Info().
		Str("version", version).
		Str("upstream", s.upstreamText()).
		Stringer("engine", p.engine).
		Str("engine_why", p.engine.why).
		Strs("interfaces", p.capture.interfaces).
		Stringers("clients", stringers(p.clients)).
		Stringer("no_proxy", s.noProxy).
		Strs("dns", g.names.ways()).
		Strs("explicit", texts(append(g.families.usable(s.http.passing), g.families.usable(s.http.authenticating)...))).
		Int("max_conns", s.maxConns).
		Bool("ipv6", g.families.ipv6).
		Msg("ready")
}

func texts(addresses []netip.AddrPort) []string {
	var all []string
	for _, address := range addresses {
		all = append(all, address.String())
	}
	return all
}

// announceCapture says what may be wrong with what is captured.
func (g *gateway) announceCapture(p plan) {
	for _, name := range g.settings.interfaces {
		if !slices.Contains(p.capture.interfaces, name) {
			g.log.Warn().Str("interface", name).Msg("there is no such interface yet")
		}
	}
	if len(p.clients) == 0 {
		g.log.Warn().Msg("no client network yet: nothing is captured until a capturing interface has an address")
	}
	if len(p.capture.uplinks) > 0 {
		g.log.Info().Strs("uplinks", p.capture.uplinks).Msg("what comes in there is not captured; if clients are there, name it with --interface")
	}
	if g.netfilter != nil {
		g.verify(p)
	}
}

func stringers(prefixes []netip.Prefix) []fmt.Stringer {
	all := make([]fmt.Stringer, 0, len(prefixes))
	for _, prefix := range prefixes {
		all = append(all, prefix)
	}
	return all
}
