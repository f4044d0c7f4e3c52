package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/pac"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

const (
	// evaluatorCommand is what this program is called with to evaluate a PAC script in a
	// process of its own. It is no command for people.
	evaluatorCommand = "pac-evaluator"

	// pacAuto is the --pac that has the script looked for.
	pacAuto = "auto"

	// scriptProxies bounds the proxies that a script names, all answers together.
	scriptProxies = 64

	// scriptLoad bounds the first load of the script, the search for it included.
	scriptLoad = 30 * time.Second
)

// script says by a PAC script which proxies carry a flow. It is a tproxy.Script.
type script struct {
	pac      *pac.Script
	settings *settings
	log      zerolog.Logger
	direct   *upstream.Proxy
	origin   string               // where it is
	joined   chan *upstream.Group // those that the script has named and nobody watches yet

	mutex   sync.Mutex
	proxies map[string]*upstream.Proxy // by URL
}

// openScript loads the script that --pac names.
func (g *gateway) openScript(d dialers) (*script, error) {
	s := g.settings
	config := pac.Config{
		Location:  s.pac,
		Evaluator: []string{"/proc/self/exe", evaluatorCommand},
		Resolve:   d.tunnel.Lookup,
		Addresses: g.addresses,
		Control:   d.direct.Control,
		Logger:    g.log,
	}
	ctx, cancel := context.WithTimeout(context.Background(), scriptLoad)
	defer cancel()
	var err error
	if config.Location == pacAuto {
		if config.Location, err = pac.Discover(ctx, config, systemNames(resolvConf, resolvedConf).search); err != nil {
			return nil, usageError{fmt.Errorf("--pac %s: %w", pacAuto, err)}
		}
		g.log.Info().Str("script", config.Location).Msg("the network's PAC script is used")
	}
	direct, err := upstream.Parse("direct://")
	if err != nil {
		return nil, err
	}
	t := &script{
		settings: s, log: g.log, direct: direct, origin: config.Location,
		joined: make(chan *upstream.Group, scriptProxies), proxies: make(map[string]*upstream.Proxy),
	}
	if t.pac, err = pac.Open(ctx, config); err != nil {
		return nil, usageError{fmt.Errorf("--pac: %w", err)}
	}
	return t, nil
}

// addresses are the gateway's own as scripts ask for them: those of the uplinks first.
func (g *gateway) addresses() []netip.Addr {
	var all []netip.Addr
	for address := range *g.local.Load() {
		if !address.IsLoopback() && !address.IsLinkLocalUnicast() {
			all = append(all, address)
		}
	}
	neighbours := *g.neighbours.Load()
	towards := func(address netip.Addr) int { // the clients or not
		if slices.ContainsFunc(neighbours, func(network netip.Prefix) bool { return network.Contains(address) }) {
			return 1
		}
		return 0
	}
	slices.SortFunc(all, func(a, b netip.Addr) int {
		if order := towards(a) - towards(b); order != 0 {
			return order
		}
		return a.Compare(b)
	})
	return all
}

// serve keeps the script fresh and looks after the proxies that it names.
func (t *script) serve(ctx context.Context, dialer *upstream.Dialer, tell func(upstream.Change)) error {
	var running sync.WaitGroup
	defer running.Wait()
	var failure error
	running.Go(func() { failure = t.pac.Serve(ctx) })
	for {
		select {
		case <-ctx.Done():
			running.Wait()
			return failure
		case group := <-t.joined:
			running.Go(func() {
				group.Watch(ctx, dialer, func(change upstream.Change) {
					change.None = false // of the script's others nothing is known here
					tell(change)
				})
			})
		}
	}
}

// scheme is what the script is told that a flow to a port is.
func (t *script) scheme(port uint16) string {
	if port == 80 || t.settings.http.plain(port) {
		return "http"
	}
	return "https"
}

// Cached answers at once if the script was asked before.
func (t *script) Cached(host string, port uint16) ([]*upstream.Proxy, bool) {
	choices, ok := t.pac.Cached(t.scheme(port), host, port)
	if !ok {
		return nil, false
	}
	return t.take(choices), true
}

// Find asks the script. Where that fails, --upstream carries the flow if it was given.
func (t *script) Find(ctx context.Context, host string, port uint16) ([]*upstream.Proxy, error) {
	choices, err := t.pac.Find(ctx, t.scheme(port), host, port)
	var proxies []*upstream.Proxy
	switch {
	case err == nil:
		proxies, err = t.take(choices), upstream.ErrAllDown
	case t.settings.upstream != nil:
		proxies = t.settings.upstream.Candidates(netip.Addr{})
	}
	if len(proxies) == 0 {
		return nil, err
	}
	return proxies, nil
}

// take returns the proxies of an answer that are up.
func (t *script) take(choices []pac.Choice) []*upstream.Proxy {
	proxies := make([]*upstream.Proxy, 0, len(choices))
	for _, choice := range choices {
		proxy := t.direct
		if !choice.Direct {
			proxy = t.proxy(choice.Proxy)
		}
		if proxy != nil && proxy.Up() {
			proxies = append(proxies, proxy)
		}
	}
	return proxies
}

// proxy returns the one of a URL, with the credentials that there are for it; nil for one
// that cannot be used, which is told once.
func (t *script) proxy(url string) *upstream.Proxy {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	if proxy, known := t.proxies[url]; known {
		return proxy
	}
	if len(t.proxies) == scriptProxies {
		return nil
	}
	proxy, err := upstream.Parse(url)
	if err == nil {
		err = t.settings.logInAll([]*upstream.Proxy{proxy}, t.trusted())
	}
	if err != nil {
		t.log.Error().Err(err).Msg("a proxy of the PAC script is left out")
		t.proxies[url] = nil
		return nil
	}
	share(append(t.settings.configured(), proxy))
	t.proxies[url] = proxy
	t.joined <- upstream.NewGroup(upstream.First, proxy) // has room for all
	return proxy
}

// trusted reports whether nobody on the way can have put proxies of his own into the script:
// only then are those that it names shown the account for all proxies. The script may be nil.
func (t *script) trusted() bool {
	return t != nil && !strings.HasPrefix(strings.ToLower(t.origin), "http://")
}

// named are the proxies that the script has named so far. The script may be nil.
func (t *script) named() (proxies []*upstream.Proxy) {
	if t == nil {
		return nil
	}
	t.mutex.Lock()
	defer t.mutex.Unlock()
	for _, proxy := range t.proxies {
		if proxy != nil {
			proxies = append(proxies, proxy)
		}
	}
	return proxies
}

// evaluate is the process that evaluates a script.
func evaluate() error {
	if err := pac.Evaluate(os.Stdin, os.Stdout); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
