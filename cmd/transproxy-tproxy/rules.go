package main

import (
	"errors"
	"os"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter/firewalld"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// rules prints what run would install on this host and changes nothing. The whole
// is text for `nft -f`; the ip commands stand in it as comments. Without an
// upstream only the exemption of its address is missing.
func rules(s *settings) error {
	if err := s.resolve(); err != nil {
		return usageError{err}
	}
	if err := errors.Join(s.validateDNS(), s.validateUDP()); err != nil {
		return usageError{err}
	}
	f, err := lookFamilies()
	if err != nil {
		return err
	}
	host, err := routing.Look()
	if err != nil {
		return err
	}
	r, err := newRoles(s.interfaces, host, s.upstreamAddresses())
	if err != nil {
		return usageError{err}
	}
	p, err := s.newPlan(f, r, host)
	if err != nil {
		return err
	}
	if err := p.validate(); err != nil {
		return err
	}
	_, err = os.Stdout.WriteString(obstaclesText(p, host) + p.text())
	return err
}

// text is the plan for people and for `nft -f`. The plan is valid.
func (p plan) text() string {
	var text strings.Builder
	text.WriteString(p.engine.text())
	for line := range strings.Lines(routing.Text(p.routing)) {
		text.WriteString("# " + strings.TrimPrefix(line, "# "))
	}
	for _, setting := range p.router {
		text.WriteString("# sysctl -w " + setting.String() + "\n")
	}
	return text.String() + "\n" + netfilter.Text(p.netfilter)
}

// cleanUp removes what a killed instance left. It needs no upstream.
func cleanUp(s *settings) error {
	// While an instance lives, its table says so before its rules are touched.
	if err := netfilter.CleanUp(s.nftTable); err != nil {
		return err
	}
	parameters, err := routing.OpenParameters(s.parametersFile())
	if err == nil {
		err = parameters.Restore()
	}
	openings, openingsErr := firewalld.Open(s.openingsFile())
	if openingsErr == nil {
		openingsErr = openings.Close()
	}
	return errors.Join(err, openingsErr, routing.CleanUp(routing.Config{Table: s.table, Protocol: routeProtocol}))
}
