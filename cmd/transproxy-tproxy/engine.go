package main

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter/sklookup"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// What gives captured packets to the listeners.
const (
	engineAuto   = "auto"
	engineTPROXY = "tproxy"
	engineLookup = "sk_lookup"
)

// engine is what the settings mean for that on this host.
type engine struct {
	lookup bool     // a sk_lookup program does, instead of the rules' tproxy statements
	why    string   // in words
	frames []string // capturing interfaces whose packets tproxy cannot deliver

	// For the program: the incoming interfaces that it serves, by index, and the destinations that it leaves alone.
	interfaces []int
	own        []netip.Prefix
}

// notOneHosts are destinations of which none is one host's: multicast (RFC 5771, RFC 4291 section 2.7) and the limited broadcast
// (RFC 919 section 7). With link-local addresses only neighbours are reached (RFC 4291 section 2.5.6).
var notOneHosts = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("ff00::/8"), netip.MustParsePrefix("fe80::/10"),
}

// newEngine chooses by what the host is like now.
func (s *settings) newEngine(c capture, host routing.Host) engine {
	e := engine{own: slices.Concat(host.Local, notOneHosts)}
	for _, link := range host.Interfaces {
		captures := slices.Contains(c.interfaces, link.Name)
		if captures && link.Frames {
			e.frames = append(e.frames, link.Name)
		}
		if captures || link.Loopback && s.output.on {
			e.interfaces = append(e.interfaces, link.Index)
		}
	}
	switch {
	case s.engine == engineLookup:
		e.lookup, e.why = true, "--engine says so"
	case s.engine == engineTPROXY:
		e.why = "--engine says so"
	case !s.install:
		e.why = "--disable-iptables leaves the kernel as it is"
	case len(e.frames) > 0:
		e.lookup = true
		e.why = fmt.Sprintf("packets of %s pass nftables as frames of a bridge (bridge-nf-call-iptables)", strings.Join(e.frames, ", "))
	default:
		e.why = "no packet of a bridge passes nftables as a frame (bridge-nf-call-iptables)"
	}
	return e
}

func (e engine) String() string {
	if e.lookup {
		return engineLookup
	}
	return engineTPROXY
}

// text is the choice for people who read the rules.
func (e engine) text() string {
	if !e.lookup {
		return fmt.Sprintf("# engine: %s: %s\n", e, e.why)
	}
	return fmt.Sprintf("# engine: %s: %s\n# The rules only mark. A BPF program that run attaches gives what is marked to the listeners.\n", e, e.why)
}

// validateEngine finds what cannot go together.
func (s *settings) validateEngine() error {
	if s.engine == engineLookup && !s.install {
		return errors.New("--engine sk_lookup and --disable-iptables: the first attaches a program to the kernel, the second changes nothing there: leave one out")
	}
	return nil
}

// applyRules makes the capture rules and the engine those of the plan, with what the upstream says about UDP, and reports
// whether the rules have changed. In between, for a moment, what begins finds no listener; the rules drop it, and the client
// sends it again. What is there goes on.
func (g *gateway) applyRules(p *plan) (changed bool, err error) {
	g.planning.Lock()
	defer g.planning.Unlock()
	planned := *p
	g.planned = &planned
	return g.fitRules(p)
}

// fitRules is applyRules under the lock planning.
func (g *gateway) fitRules(p *plan) (changed bool, err error) {
	if !g.carried {
		p.netfilter = withoutUDP(p.netfilter)
	}
	if p.engine.lookup {
		if err := g.steer(p.engine); err != nil {
			if g.settings.engine == engineLookup {
				return false, fmt.Errorf("--engine sk_lookup: %w", err)
			}
			g.unsteered(err, p.engine)
			p.engine.lookup, p.engine.why = false, "the other engine cannot be had"
			p.netfilter.Steered = false
		}
	}
	if p.engine.lookup || len(p.engine.frames) == 0 {
		g.uncaptured = nil
	}
	if !p.engine.lookup && g.steering != nil {
		g.assigned = false
		if err := g.steering.Refuse(); err != nil {
			return false, err
		}
	}
	if !reflect.DeepEqual(p.netfilter, g.applied) {
		if err := g.netfilter.Apply(p.netfilter); err != nil {
			return false, err
		}
		g.applied, changed = p.netfilter, true
	}
	if p.engine.lookup {
		return changed, g.assign()
	}
	return changed, g.unsteer()
}

// steer attaches the sk_lookup program if it is not, and tells it of the host.
func (g *gateway) steer(e engine) (err error) {
	if g.steering == nil {
		if g.steering, err = sklookup.Open(); err != nil {
			g.steering = nil
			return err
		}
	}
	return g.steering.Set(e.interfaces, e.own)
}

// unsteer detaches the program.
func (g *gateway) unsteer() error {
	if g.steering == nil {
		return nil
	}
	err := g.steering.Close()
	g.steering, g.assigned = nil, false
	return err
}

// engineInUse is the name of the one that the kernel has.
func (g *gateway) engineInUse() string {
	g.planning.Lock()
	defer g.planning.Unlock()
	return engine{lookup: g.steering != nil}.String()
}

// assign gives the listeners to the program, once.
func (g *gateway) assign() error {
	if g.assigned {
		return nil
	}
	err := g.server.Listeners(func(socket int) error { return g.steering.Assign(socket, false) })
	if err == nil && g.datagrams != nil {
		err = g.datagrams.Listeners(func(socket int) error { return g.steering.Assign(socket, false) })
	}
	if err == nil && g.names != nil {
		err = g.names.server.Listeners(func(socket int) error { return g.steering.Assign(socket, true) })
	}
	g.assigned = err == nil
	return err
}

// unsteered tells, once for each set of interfaces, that these are not captured.
func (g *gateway) unsteered(err error, e engine) {
	if slices.Equal(g.uncaptured, e.frames) {
		return
	}
	g.uncaptured = e.frames
	g.log.Error().Err(err).Strs("interfaces", e.frames).
		Msg("what comes in there is not captured, but lost: let the program load, or run `sysctl -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0`")
}
