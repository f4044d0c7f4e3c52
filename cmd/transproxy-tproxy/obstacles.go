package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter/firewalld"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// ways are the interfaces by which clients' packets come in.
func ways(c capture, host routing.Host) []netfilter.Way {
	var all []netfilter.Way
	for _, link := range host.Interfaces {
		if !slices.Contains(c.interfaces, link.Name) {
			continue
		}
		way := netfilter.Way{Name: link.Name, Networks: link.Prefixes}
		if len(host.Uplinks) > 0 && host.Uplinks[0] != link.Name {
			way.Uplink = host.Uplinks[0]
		}
		all = append(all, way)
	}
	return all
}

// clear has firewalld let captured packets pass if it is asked to, takes away what a
// killed instance has left there if not, and tells what stands in the way of what is to
// be captured. It comes before the rules.
func (g *gateway) clear(p plan) error {
	if g.netfilter == nil {
		return nil // who installs the rules by hand is told when they are printed
	}
	host, err := routing.Look()
	if err != nil {
		return err
	}
	if !g.settings.firewalld {
		err = g.openings.Close()
	} else {
		err = g.pass(p, host)
	}
	if err != nil {
		return err
	}
	found, err := netfilter.Obstacles(p.netfilter, ways(p.capture, host))
	if err != nil {
		g.log.Warn().Err(err).Msg("other programs' rules were not looked at")
	}
	for _, o := range found {
		g.log.Warn().Str("code", o.Code).Str("cure", o.Cure).Msg(describe(o))
	}
	return nil
}

// describe is what an obstacle is, in a line.
func describe(o netfilter.Obstacle) string {
	if o.Firewalld {
		return o.Found + "; --firewalld has it let them pass while this program runs"
	}
	return o.Found
}

// pass has firewalld let pass what the plan captures, if it is asked to.
func (g *gateway) pass(p plan, host routing.Host) error {
	if !g.settings.firewalld {
		return nil
	}
	var openings []firewalld.Opening
	for _, way := range ways(p.capture, host) {
		openings = append(openings, firewalld.Opening{Interface: way.Name, Rules: p.netfilter.RichRules(way)})
	}
	return g.openings.Set(openings)
}

// watchFirewalld has it let captured packets pass again after it was reloaded.
func (g *gateway) watchFirewalld(ctx context.Context) error {
	g.openings.Watch(ctx, func(err error) {
		g.log.Error().Err(err).Msg("firewalld may drop captured packets")
	})
	return nil
}

// obstaclesText is what stands in the way as comments, for the command that prints the
// rules, and what would keep run from starting.
func obstaclesText(p plan, host routing.Host) string {
	var text strings.Builder
	found, err := netfilter.Obstacles(p.netfilter, ways(p.capture, host))
	if err != nil {
		fmt.Fprintf(&text, "# Other programs' rules were not looked at: %v\n", err)
	}
	for _, o := range found {
		fmt.Fprintf(&text, "# In the way: %s\n# Cure: %s\n", describe(o), o.Cure)
	}
	handle, err := routing.Open()
	if err == nil {
		err = errors.Join(handle.Check(p.routing), handle.Close())
	}
	if err != nil {
		fmt.Fprintf(&text, "# In the way: %v\n", err)
	}
	return text.String()
}
