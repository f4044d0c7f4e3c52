package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"sync/atomic"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
)

// run is the gateway: lock, sockets, routing, netfilter (the one step after which
// traffic changes), serve; a failing step undoes the ones before it.
func run(s *settings) (err error) {
	if err := s.resolveUpstream(); err != nil {
		return usageError{err}
	}
	// From here on a signal to stop undoes what was done.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(signals)

	log, sink := newLogger(s)
	defer sink.close()
	for _, note := range s.notes {
		log.Warn().Msg(note)
	}
	access, err := openAccessLog(s, log)
	if err != nil {
		return usageError{err}
	}
	defer access.close()

	fits, err := raiseFileLimit()
	if err != nil {
		return err
	}
	if s.maxConns > fits.flows {
		log.Warn().Int("max_conns", s.maxConns).Int("possible", fits.flows).Msg("--max-conns is more than the limit of open files allows")
	}
	if s.maxConns == 0 || s.maxConns > fits.flows {
		s.maxConns = fits.flows
	}

	f, err := lookFamilies()
	if err != nil {
		return err
	}
	host, err := routing.Look()
	if err != nil {
		return err
	}
	if err := s.netfilter(f, host).Validate(); err != nil {
		return usageError{err}
	}
	gateway := &gateway{settings: s, families: f, capacity: fits, log: log, access: access}
	gateway.setLocal(host)
	for _, source := range s.sources {
		if !gateway.owns(source) {
			return usageError{fmt.Errorf("--upstream-source: %s is not an address of this host: add it with `ip address add`, or leave it out", source)}
		}
	}

	if s.install {
		if err := gateway.open(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, gateway.close()) }()
	}
	server, err := tproxy.Listen(gateway.tproxy(), gateway.policy())
	if err != nil {
		return err
	}
	defer server.Close()
	if s.install {
		if err := gateway.install(host); err != nil {
			return err
		}
	} else {
		text, err := s.installation()
		if err != nil {
			return err
		}
		fmt.Print(text)
	}
	gateway.announce(host)
	return gateway.serve(server, signals)
}

// gateway is one run of the program: the parts and what they share.
type gateway struct {
	settings *settings
	families families
	capacity capacity
	log      zerolog.Logger
	access   *accessLog
	local    atomic.Pointer[map[netip.Addr]struct{}] // the gateway's own addresses

	// Both nil with --disable-iptables.
	netfilter *netfilter.Handle
	routing   *routing.Handle
}

// open takes the lock and looks for clashes; no traffic is touched yet.
func (g *gateway) open() (err error) {
	if g.netfilter, err = netfilter.Open(g.settings.nftTable); err != nil {
		return err
	}
	if !g.netfilter.Owned() {
		g.log.Warn().Msg("this kernel has no owner flag for nftables tables (it came with 5.12): if this program is killed, run `transproxy-tproxy cleanup`")
	}
	if g.routing, err = routing.Open(); err != nil {
		return errors.Join(err, g.netfilter.Close())
	}
	return nil
}

// install changes the kernel: what receives captured packets first, what captures
// them last.
func (g *gateway) install(host routing.Host) error {
	if err := g.routing.Apply(g.settings.routing(g.families)); err != nil {
		return err
	}
	return g.netfilter.Apply(g.settings.netfilter(g.families, host))
}

// close undoes open and install.
func (g *gateway) close() error {
	return errors.Join(g.netfilter.Close(), g.routing.Close())
}

// serve runs all parts until a signal or the failure of one, then stops them in
// the order that loses nothing: no new flow is captured, the running ones drain.
func (g *gateway) serve(server *tproxy.Server, signals <-chan os.Signal) error {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	parts := []func(context.Context) error{server.Serve}
	if g.settings.install {
		parts = append(parts, g.netfilter.Watch, g.watchRouting)
	}
	ended := make(chan error, len(parts))
	for _, part := range parts {
		go func() { ended <- part(ctx) }()
	}
	failure, running := g.wait(signals, ended), len(parts)
	if failure != nil {
		running--
	}

	// From here on the kernel's default applies: a second signal ends the program.
	signal.Reset(unix.SIGINT, unix.SIGTERM)
	if g.settings.install {
		failure = errors.Join(failure, g.netfilter.Drain())
	}
	stop()
	for range running {
		failure = errors.Join(failure, <-ended)
	}
	stats := server.Stats()
	g.log.Info().
		Int64("flows", stats.Accepted).
		Int64("refused", stats.Refused).
		Int64("accept_errors", stats.AcceptErrors).
		Int64("ports_exhausted", stats.PortsExhausted).
		Int64("spliced_bytes", stats.Spliced).
		Msg("stopped")
	return failure
}

// wait returns nil at a signal to stop, or the error of a part that ended.
func (g *gateway) wait(signals <-chan os.Signal, ended <-chan error) error {
	for {
		select {
		case err := <-ended:
			return err
		case signal := <-signals:
			if signal != unix.SIGHUP {
				g.log.Info().Stringer("signal", signal).Msg("stopping")
				return nil
			}
			g.reload()
		}
	}
}

// reload is what SIGHUP asks for.
func (g *gateway) reload() {
	for _, proxy := range g.settings.upstreams() {
		proxy.Reset()
	}
	if err := g.access.reopen(); err != nil {
		g.log.Error().Err(err).Msg("the access log stays as it was")
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
	g.setLocal(host)
	if err := g.netfilter.Apply(g.settings.netfilter(g.families, host)); err != nil {
		g.log.Error().Err(err).Msg("the capture rules stay as they were")
	}
	g.verify(host)
}

// verify says so when marked packets would not be delivered.
func (g *gateway) verify(host routing.Host) {
	if err := g.routing.Verify(g.settings.capture(host).interfaces...); err != nil {
		g.log.Error().Err(err).Msg("captured flows are not delivered")
	}
}

func (g *gateway) setLocal(host routing.Host) {
	local := make(map[netip.Addr]struct{})
	for _, link := range host.Interfaces {
		for _, address := range link.Addrs {
			local[address] = struct{}{}
		}
	}
	g.local.Store(&local)
}

// owns reports whether an address is the gateway's own.
func (g *gateway) owns(address netip.Addr) bool {
	_, own := (*g.local.Load())[address]
	return own
}

// tproxy is what the settings ask of the package tproxy.
func (g *gateway) tproxy() tproxy.Config {
	s := g.settings
	return tproxy.Config{
		Listen:           s.listen(g.families),
		Mark:             splitMask(s.mark).bypass,
		Sources:          s.sources,
		MaxFlows:         s.maxConns,
		MaxPipes:         g.capacity.pipes,
		PeekTimeout:      s.peekTimeout,
		ConnectTimeout:   s.connectTimeout,
		HandshakeTimeout: s.replyTimeout,
		IdleTimeout:      s.idleTimeout,
		HalfCloseTimeout: s.halfClose,
		DrainTimeout:     s.drainTimeout,
		Access:           g.access.write,
		Log:              g.log,
	}
}

func (g *gateway) policy() tproxy.Policy {
	return tproxy.Policy{
		Bypass:   g.settings.noProxy,
		Upstream: g.settings.upstream,
		HTTP:     g.settings.httpUpstream,
		Local:    g.owns,
	}
}

// announce says what runs and what to check when a client is not captured.
func (g *gateway) announce(host routing.Host) {
	s, found := g.settings, g.settings.capture(host)
	for _, name := range s.interfaces {
		if !slices.Contains(found.interfaces, name) {
			g.log.Warn().Str("interface", name).Msg("there is no such interface yet")
		}
	}
	clients := s.clients
	if len(clients) == 0 {
		clients = found.networks
	}
	if len(clients) == 0 {
		g.log.Warn().Msg("no client network yet: nothing is captured until a capturing interface has an address")
	}
	g.log.Info().
		Str("version", version).
		Stringer("upstream", s.upstream).
		Strs("interfaces", found.interfaces).
		Stringers("clients", stringers(clients)).
		Stringer("no_proxy", s.noProxy).
		Int("max_conns", s.maxConns).
		Bool("ipv6", g.families.ipv6).
		Msg("ready")
	if s.install {
		g.verify(host)
	}
}

func stringers(prefixes []netip.Prefix) []fmt.Stringer {
	all := make([]fmt.Stringer, 0, len(prefixes))
	for _, prefix := range prefixes {
		all = append(all, prefix)
	}
	return all
}
