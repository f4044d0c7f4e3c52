package test

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// TestNeighbourOnTheUplink: a stranger there is neither captured nor relayed nor
// answered, and what it is allowed to reach it still reaches.
func TestNeighbourOnTheUplink(t *testing.T) {
	w := newWorld(t)
	inside := lab.Origin{Label: "inside"}
	must(t, inside.Start(w.Server, nil, nil))
	t.Cleanup(inside.Close)
	must(t,
		w.Neighbour.Route("203.0.113.0/24", lab.Uplink4.String()), // it tries to use the gateway
		w.Neighbour.Route("2001:db8:3::/64", lab.Uplink6.String()),
	)
	g := w.gateway("--tcp-proxy-dports", "all")

	client := lab.HTTPClient(w.Neighbour, nil, nil)
	client.Timeout = 3 * time.Second
	for _, server := range []netip.Addr{lab.Server4, lab.Server6} {
		response, err := client.Get("http://" + netip.AddrPortFrom(server, 80).String() + "/")
		if err != nil {
			t.Fatalf("the neighbour does not reach the server %s: %v", server, err)
		}
		response.Body.Close()
	}
	for _, source := range inside.Sources() {
		if source.Addr() != lab.Neighbour4 && source.Addr() != lab.Neighbour6 {
			t.Errorf("the server saw %s and not the neighbour", source)
		}
	}
	for _, origin := range both {
		response, err := client.Get("http://" + netip.AddrPortFrom(origin, 80).String() + "/")
		if err != nil {
			continue
		}
		if body, _ := io.ReadAll(response.Body); !strings.HasPrefix(string(body), "direct ") {
			t.Errorf("the neighbour is carried: %q", body)
		}
		response.Body.Close()
	}
	if targets := w.proxy.Targets(); len(targets) > 0 {
		t.Errorf("the proxy carried %q for the neighbour", targets)
	}
	if flows := g.flows(); len(flows) > 0 {
		t.Errorf("the gateway carried %+v for the neighbour", flows)
	}
	for ns, addresses := range map[*netns.NS][]netip.Addr{
		w.Neighbour: {lab.Uplink4, lab.Uplink6},
		w.Client:    {lab.Gateway4, lab.Gateway6},
	} {
		for _, address := range addresses {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			conn, err := ns.Dial(ctx, "tcp", netip.AddrPortFrom(address, 15001).String())
			if err == nil {
				t.Errorf("the listener answers at %s", address)
				conn.Close()
			}
			cancel()
		}
	}
}

// TestRepliesOfInboundConnections: a client's answers to a connection from outside
// are not captured, whatever their port.
func TestRepliesOfInboundConnections(t *testing.T) {
	w := newWorld(t)
	inside := lab.Origin{Label: "inside"}
	must(t, inside.Start(w.Server, nil, nil))
	t.Cleanup(inside.Close)
	w.gateway("--tcp-proxy-dports", "all")
	for _, server := range []netip.Addr{lab.Server4, lab.Server6} {
		if got, err := banner(t, w.Neighbour, server, 22); got != lab.Banner {
			t.Errorf("%s: %q, %v", server, got, err)
		}
	}
}

// TestOwnServicesStayReachable: a service of the gateway itself, on a port that is
// captured, is the clients' to reach.
func TestOwnServicesStayReachable(t *testing.T) {
	w := newWorld(t)
	own := lab.Origin{Label: "gateway"}
	must(t, own.Start(w.Gateway, nil, nil))
	t.Cleanup(own.Close)
	w.gateway("--tcp-proxy-dports", "all")
	for _, address := range []netip.Addr{lab.Gateway4, lab.Gateway6, lab.Uplink4, lab.Uplink6} {
		body, err := w.get("http://" + netip.AddrPortFrom(address, 80).String() + "/")
		if err != nil || !strings.HasPrefix(body, "gateway ") {
			t.Errorf("%s: %q, %v", address, body, err)
		}
	}
}

// TestForeignSources: only --allow-clients are captured.
func TestForeignSources(t *testing.T) {
	w := newWorld(t)
	w.gateway("--allow-clients", "192.0.2.99, 2001:db8:1::99")
	for _, url := range []string{"http://origin.test/", "http://six.test/"} {
		if body, err := w.get(url); err != nil || !strings.HasPrefix(body, "direct ") {
			t.Errorf("%s: %q, %v", url, body, err)
		}
	}
}

// TestOneArmed: clients, gateway, router and proxy in one subnet. The client is
// captured; a server beside it, whose answers take another way than its questions,
// keeps its flows.
func TestOneArmed(t *testing.T) {
	w := newOneArmedWorld(t)
	upstream := "http://" + proxyUser + netip.AddrPortFrom(lab.OneArmedProxy4, lab.ProxyPort).String()
	startGateway(t, w.Gateway, "--upstream", upstream, "--tcp-proxy-dports", "all")
	for _, url := range []string{"https://origin.test/", "https://six.test/"} {
		if body, err := w.get(url); err != nil || !strings.HasPrefix(body, "origin ") {
			t.Errorf("%s: %q, %v", url, body, err)
		}
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
}

// TestAsymmetricRouting: a connection whose questions pass the gateway by and whose
// answers come through it is left alone, with all ports captured.
func TestAsymmetricRouting(t *testing.T) {
	w := newOneArmedWorld(t)
	inside := lab.Origin{Label: "inside"}
	must(t, inside.Start(w.Server, nil, nil))
	t.Cleanup(inside.Close)
	// The far host asks through the router; the server answers through the gateway.
	must(t,
		w.Server.Route("198.51.100.0/24", lab.Gateway4.String()),
		w.Server.Route("2001:db8:2::/64", lab.Gateway6.String()),
	)
	far, err := netns.New()
	must(t, err)
	t.Cleanup(func() { far.Close() })
	must(t,
		netns.Connect(far, "eth0", w.Router, "far"),
		far.Addr("eth0", "198.51.100.2/24", "2001:db8:2::2/64"),
		w.Router.Addr("far", "198.51.100.1/24", "2001:db8:2::1/64"),
		far.Route("0.0.0.0/0", "198.51.100.1"), far.Route("::/0", "2001:db8:2::1"),
	)
	upstream := "http://" + proxyUser + netip.AddrPortFrom(lab.OneArmedProxy4, lab.ProxyPort).String()
	g := startGateway(t, w.Gateway, "--upstream", upstream, "--tcp-proxy-dports", "all")
	for _, server := range []netip.Addr{lab.Server4, lab.Server6} {
		conn := dial(t, far, server, lab.PortSource)
		io.WriteString(conn, "3000000\n")
		if n, err := io.Copy(io.Discard, conn); n != 3000000 || err != nil {
			t.Errorf("%s: %d bytes, %v", server, n, err)
		}
	}
	if flows := g.flows(); len(flows) > 0 {
		t.Errorf("the gateway took %+v", flows)
	}
}

// TestLostClientNetwork: when the client network's address goes, the uplink does not
// become one.
func TestLostClientNetwork(t *testing.T) {
	w := newWorld(t)
	must(t,
		w.Neighbour.Route("203.0.113.0/24", lab.Uplink4.String()),
		w.Neighbour.Route("2001:db8:3::/64", lab.Uplink6.String()))
	g := w.gateway("--tcp-proxy-dports", "all")
	must(t, w.Gateway.Do(func() error { return flushAddresses("lan0") }))
	g.waitFor("the host's network has changed")
	for _, origin := range both {
		if got, err := banner(t, w.Neighbour, origin, 22); got != lab.Banner {
			t.Errorf("the neighbour does not reach %s directly: %q, %v", origin, got, err)
		}
	}
	if targets := w.proxy.Targets(); len(targets) > 0 {
		t.Errorf("the proxy carried %q for the neighbour", targets)
	}
}

// TestUnknownUplink: where the uplink cannot be told, one has to say what to capture.
func TestUnknownUplink(t *testing.T) {
	w := newWorld(t)
	must(t, w.Gateway.Do(func() error { return flushDefaultRoutes() }))
	output, err := w.run(program("--upstream", "http://proxy.test:3128"))
	if err == nil {
		t.Fatal("it starts")
	}
	wantOneLine(t, output, "--interface")
	// The way to a proxy that is given by address tells as well.
	w.gateway()
	if body, err := w.get("https://origin.test/"); err != nil {
		t.Errorf("%q, %v", body, err)
	}
}

func flushAddresses(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	for _, address := range addresses {
		err = errors.Join(err, netlink.AddrDel(link, &address))
	}
	return err
}

func flushDefaultRoutes() error {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	for _, route := range routes {
		if size, _ := route.Dst.Mask.Size(); size == 0 {
			err = errors.Join(err, netlink.RouteDel(&route))
		}
	}
	return err
}
