package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
)

// run is the gateway: lock, sockets, routing, netfilter (the one step after which
// traffic changes), serve; a failing step undoes the ones before it.
func run(s *settings) (err error) {
	if err := s.resolve(); err != nil {
		return usageError{err}
	}
	if err := errors.Join(s.validateDNS(), s.http.validate(), s.validateEngine(), s.validateTLS(), s.validateUDP()); err != nil {
		return usageError{err}
	}
	if s.upstream == nil && s.pac == "" {
		return usageError{errors.New("no upstream proxy: give --upstream http://host:port, or set https_proxy")}
	}
	if err := s.logIn(); err != nil {
		return usageError{err}
	}
	share(s.upstreams())
	// From here on a signal to stop undoes what was done. A log whose reader has
	// gone must not end the program.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGHUP)
	defer signal.Stop(signals)
	signal.Ignore(unix.SIGPIPE)

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

	if s.dns.enabled() && os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
	gateway, plan, err := newGateway(s, log, access)
	if err != nil {
		return err
	}
	if err := gateway.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, gateway.close()) }()
	if err := gateway.clear(plan); err != nil {
		return err
	}
	dial, err := newDialers(s)
	if err != nil {
		return err
	}
	gateway.dialers = dial
	if s.pac != "" {
		if s.script, err = gateway.openScript(dial); err != nil {
			return err
		}
		defer s.script.pac.Close()
	}
	server, err := tproxy.Listen(gateway.tproxy(dial), gateway.policy())
	if err != nil {
		return err
	}
	gateway.server = server
	if gateway.datagrams, err = gateway.openDatagrams(dial); err != nil {
		server.Close()
		return err
	}
	if gateway.names, err = gateway.openNames(dial); err != nil {
		server.Close()
		gateway.closeDatagrams()
		return err
	}
	defer func() { err = errors.Join(err, gateway.names.close()) }()
	if err := gateway.install(&plan); err != nil {
		server.Close()
		gateway.closeDatagrams()
		gateway.names.stop()
		return err
	}
	gateway.warnOfSecrets()
	gateway.announce(plan)
	return gateway.serve(signals)
}

// garbagePercent keeps memory within what is promised when questions pile up because
// no DNS server answers: of Go's usual 100, garbage alone would take as much as all
// that is held. Flows hardly allocate, so that they do not notice.
const garbagePercent = 50

// newGateway looks at the host and works out what the settings mean on it. Nothing
// is changed but the limit of open files.
func newGateway(s *settings, log zerolog.Logger, access *accessLog) (*gateway, plan, error) {
	_, _, captured := s.udpPorts()
	fits, err := raiseFileLimit(s.dns.enabled(), len(captured) > 0 && !s.http.only)
	if err != nil {
		return nil, plan{}, err
	}
	s.fitSessions(&fits, log)
	if s.maxConns > fits.flows {
		log.Warn().Int("max_conns", s.maxConns).Int("possible", fits.flows).Msg("--max-conns is more than the limit of open files allows")
	}
	if s.maxConns == 0 || s.maxConns > fits.flows {
		s.maxConns = fits.flows
	}
	f, err := lookFamilies()
	if err != nil {
		return nil, plan{}, err
	}
	host, err := routing.Look()
	if err != nil {
		return nil, plan{}, err
	}
	r, err := newRoles(s.interfaces, host, s.upstreamAddresses())
	if err != nil && !s.http.only {
		return nil, plan{}, usageError{err}
	}
	p, err := s.newPlan(f, r, host)
	if err != nil {
		return nil, plan{}, err
	}
	if err := p.validate(); err != nil {
		return nil, plan{}, err
	}
	if !f.ipv6 && p.capture.hasIPv6() {
		const off = "the client networks have IPv6, but ::1 cannot be used: IPv6 passes uncaptured"
		const cure = "switch it on with `sysctl net.ipv6.conf.lo.disable_ipv6=0`"
		if s.failClosed {
			return nil, plan{}, fmt.Errorf("--fail closed: %s: %s", off, cure)
		}
		log.Warn().Msg(off + ": " + cure)
	}
	g := &gateway{settings: s, families: f, roles: r, capacity: fits, log: log, access: access, uplink: uplinkOf(host)}
	g.setLocal(host, p.capture)
	for _, source := range s.sources {
		if !g.owns(source) {
			return nil, plan{}, usageError{fmt.Errorf("--upstream-source: %s is not an address of this host: add it with `ip address add`, or leave it out", source)}
		}
	}
	return g, p, nil
}
