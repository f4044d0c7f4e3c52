// Package lab builds small networks of hosts in namespaces, and the stand-in
// servers that run on them: a company proxy that demands a password, origins, and
// a router that tells what reached it directly. Tests and the demo run in it.
package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// Addresses of the layouts, all from the ranges for documentation (RFC 5737, RFC 3849).
var (
	Client4    = netip.MustParseAddr("192.0.2.2")
	Client6    = netip.MustParseAddr("2001:db8:1::2")
	Gateway4   = netip.MustParseAddr("192.0.2.1") // on the client's side
	Gateway6   = netip.MustParseAddr("2001:db8:1::1")
	Server4    = netip.MustParseAddr("192.0.2.3") // a server beside the client
	Server6    = netip.MustParseAddr("2001:db8:1::3")
	Uplink4    = netip.MustParseAddr("198.51.100.1") // the gateway on the uplink
	Uplink6    = netip.MustParseAddr("2001:db8:2::1")
	Proxy4     = netip.MustParseAddr("198.51.100.10")
	Proxy6     = netip.MustParseAddr("2001:db8:2::10")
	Neighbour4 = netip.MustParseAddr("198.51.100.20") // a stranger on the uplink
	Neighbour6 = netip.MustParseAddr("2001:db8:2::20")
	Router4    = netip.MustParseAddr("198.51.100.254")
	Router6    = netip.MustParseAddr("2001:db8:2::fe")
	Origin4    = netip.MustParseAddr("203.0.113.7") // behind the proxy
	Origin6    = netip.MustParseAddr("2001:db8:3::7")
)

// ProxyPort is where the company proxy listens.
const ProxyPort = 3128

// Lab is one network. The fields that a layout does not have are nil.
type Lab struct {
	Client    *netns.NS
	Server    *netns.NS // beside the client
	Gateway   *netns.NS // interfaces lan0 and wan0, or eth0 alone
	Router    *netns.NS // the gateway's default route; owns the origin's addresses as far as direct traffic goes
	Proxy     *netns.NS
	Origin    *netns.NS // reached from Proxy only
	Neighbour *netns.NS // on the uplink

	all []*netns.NS
}

// Close gives all hosts up.
func (l *Lab) Close() error {
	var failure error
	for _, ns := range l.all {
		failure = errors.Join(failure, ns.Close())
	}
	return failure
}

// host adds a host to the lab.
func (l *Lab) host() (*netns.NS, error) {
	ns, err := netns.New()
	if err == nil {
		l.all = append(l.all, ns)
	}
	return ns, err
}

// Routed is a gateway with two cards between a client network and an uplink:
//
//	Client, Server ── lan0 Gateway wan0 ──┬── Router (default route; no way to Origin)
//	                                      ├── Neighbour
//	                                      └── Proxy ── Origin
//
// Whatever leaves the gateway directly for an address of the origin's network ends
// at Router.
func Routed() (*Lab, error) {
	l := new(Lab)
	err := l.hosts(&l.Client, &l.Server, &l.Gateway, &l.Router, &l.Proxy, &l.Origin, &l.Neighbour)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	lan, err := l.host()
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	err = run(
		func() error { return join(lan, end{l.Client, "eth0"}, end{l.Server, "eth0"}, end{l.Gateway, "lan0"}) },
		func() error { return netns.Connect(l.Gateway, "wan0", l.Router, "gateway") },
		func() error { return netns.Connect(l.Proxy, "eth0", l.Router, "proxy") },
		func() error { return netns.Connect(l.Neighbour, "eth0", l.Router, "neighbour") },
		func() error { return l.Router.Bridge("net", "gateway", "proxy", "neighbour") },
		func() error { return netns.Connect(l.Proxy, "origin", l.Origin, "eth0") },

		func() error { return address(l.Client, "eth0", Client4, Client6) },
		func() error { return address(l.Server, "eth0", Server4, Server6) },
		func() error { return address(l.Gateway, "lan0", Gateway4, Gateway6) },
		func() error { return address(l.Gateway, "wan0", Uplink4, Uplink6) },
		func() error { return address(l.Router, "net", Router4, Router6) },
		func() error { return address(l.Proxy, "eth0", Proxy4, Proxy6) },
		func() error { return address(l.Neighbour, "eth0", Neighbour4, Neighbour6) },

		func() error { return defaultRoute(l.Client, Gateway4, Gateway6) },
		func() error { return defaultRoute(l.Server, Gateway4, Gateway6) },
		func() error { return forward(l.Gateway) },
		func() error { return defaultRoute(l.Gateway, Router4, Router6) },
		func() error { return toClients(l.Router) },
		func() error { return toClients(l.Proxy) },
		func() error { return toClients(l.Neighbour) },
		l.origin,
	)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// OneArmed is a gateway with one card, in the same subnet as its clients, the real
// router and the proxy. Client sends everything through Gateway; Server's default
// route is Router, so that it answers past the gateway.
func OneArmed() (*Lab, error) {
	l := new(Lab)
	err := l.hosts(&l.Client, &l.Server, &l.Gateway, &l.Router, &l.Proxy, &l.Origin)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	lan, err := l.host()
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	err = run(
		func() error {
			return join(lan, end{l.Client, "eth0"}, end{l.Server, "eth0"}, end{l.Gateway, "eth0"},
				end{l.Router, "eth0"}, end{l.Proxy, "eth0"})
		},
		func() error { return netns.Connect(l.Proxy, "origin", l.Origin, "eth0") },
		func() error { return address(l.Client, "eth0", Client4, Client6) },
		func() error { return address(l.Server, "eth0", Server4, Server6) },
		func() error { return address(l.Gateway, "eth0", Gateway4, Gateway6) },
		func() error { return address(l.Router, "eth0", oneArmedRouter4, oneArmedRouter6) },
		func() error { return address(l.Proxy, "eth0", OneArmedProxy4, OneArmedProxy6) },
		func() error { return defaultRoute(l.Client, Gateway4, Gateway6) },
		func() error { return defaultRoute(l.Server, oneArmedRouter4, oneArmedRouter6) },
		func() error { return forward(l.Gateway) },
		func() error { return forward(l.Router) },
		func() error { return defaultRoute(l.Gateway, oneArmedRouter4, oneArmedRouter6) },
		l.origin,
	)
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Addresses in the one subnet of OneArmed.
var (
	OneArmedProxy4  = netip.MustParseAddr("192.0.2.10")
	OneArmedProxy6  = netip.MustParseAddr("2001:db8:1::10")
	oneArmedRouter4 = netip.MustParseAddr("192.0.2.254")
	oneArmedRouter6 = netip.MustParseAddr("2001:db8:1::fe")
)

// hosts creates the hosts that a layout names.
func (l *Lab) hosts(wanted ...**netns.NS) (err error) {
	for _, ns := range wanted {
		if *ns, err = l.host(); err != nil {
			return err
		}
	}
	return nil
}

// origin joins the proxy and the origin, and makes the router the end of what is
// sent to the origin's network past the proxy.
func (l *Lab) origin() error {
	return run(
		func() error { return l.Proxy.Addr("origin", "203.0.113.1/24", "2001:db8:3::1/64") },
		func() error { return address(l.Origin, "eth0", Origin4, Origin6) },
		func() error { return l.Router.Local("203.0.113.0/24") },
		func() error { return l.Router.Local("2001:db8:3::/64") },
	)
}

// end is one end of a cable.
type end struct {
	host *netns.NS
	link string
}

// join plugs hosts into a switch.
func join(lan *netns.NS, hosts ...end) error {
	ports := make([]string, 0, len(hosts))
	for i, host := range hosts {
		port := fmt.Sprintf("port%d", i)
		if err := netns.Connect(host.host, host.link, lan, port); err != nil {
			return err
		}
		ports = append(ports, port)
	}
	return lan.Bridge("lan", ports...)
}

func address(ns *netns.NS, link string, ipv4, ipv6 netip.Addr) error {
	return ns.Addr(link, ipv4.String()+"/24", ipv6.String()+"/64")
}

func defaultRoute(ns *netns.NS, via4, via6 netip.Addr) error {
	return errors.Join(ns.Route("0.0.0.0/0", via4.String()), ns.Route("::/0", via6.String()))
}

func toClients(ns *netns.NS) error {
	return errors.Join(ns.Route("192.0.2.0/24", Uplink4.String()), ns.Route("2001:db8:1::/64", Uplink6.String()))
}

func forward(ns *netns.NS) error {
	return errors.Join(ns.Sysctl("net.ipv4.ip_forward", "1"), ns.Sysctl("net.ipv6.conf.all.forwarding", "1"))
}

// run does the steps until one fails.
func run(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
