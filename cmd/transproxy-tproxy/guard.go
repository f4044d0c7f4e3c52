package main

import (
	"errors"
	"fmt"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// guard installs what --fail closed leaves when the program is gone, for the time
// before there is one: interfaces are known by their names, and as long as no client
// network is known, all sources are refused. It needs no upstream.
func guard(s *settings) error {
	if err := s.resolve(); err != nil {
		return usageError{err}
	}
	if err := errors.Join(s.validateDNS(), s.validateUDP()); err != nil {
		return usageError{err}
	}
	switch {
	case s.http.only:
		return usageError{errors.New("--explicit-proxy-only captures nothing: there is nothing to guard")}
	case !s.install:
		return usageError{errors.New("--disable-iptables changes nothing in the kernel: `transproxy-tproxy rules --fail closed` prints the guard")}
	}
	host, err := routing.Look()
	if err != nil {
		return err
	}
	r, err := newRoles(s.interfaces, host, s.upstreamAddresses())
	if err != nil {
		return usageError{err}
	}
	// Either family may appear later.
	p, err := s.newPlan(families{ipv4: true, ipv6: true}, r, host)
	if err != nil {
		return err
	}
	if err := p.validate(); err != nil {
		return err
	}
	if err := netfilter.Guard(p.netfilter); err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	return nil
}
