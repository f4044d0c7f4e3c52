package pac

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/publicsuffix"
)

const (
	// maxCandidates bounds the names that discovery looks up: six search domains
	// (what resolv.conf(5) allowed for long) with some parents each.
	maxCandidates = 16

	// candidateLimit bounds the time for one of them. A name that does not exist is
	// answered in milliseconds; a server that is there serves a small file.
	candidateLimit = 3 * time.Second
)

// Discover finds a script's location as browsers do by the Web Proxy
// Auto-Discovery Protocol over DNS (draft-ietf-wrec-wpad-01 section 4.4.2): the
// first of http://wpad.DOMAIN/wpad.dat that can be had, for each of the search
// domains and its parents, the longest first. Of config it uses Resolve and
// Control. An error names what was tried.
//
// Who owns the name wpad decides about all traffic. It is therefore never looked
// up under a domain under which anybody can register names (publicsuffix.org),
// and a single label such as "lan" counts as one: such a network names the
// script's location itself. The DHCP option 252 is not asked for.
func Discover(ctx context.Context, config Config, domains []string) (location string, err error) {
	if !built {
		return "", ErrNotBuilt
	}
	hosts := wpadHosts(domains)
	if len(hosts) == 0 {
		return "", fmt.Errorf("find a PAC script: no search domain in which to look for wpad in %.200q: give its URL or file", domains)
	}
	var faults []error
	for _, host := range hosts {
		location := "http://" + host + "/wpad.dat"
		if err := wpadAt(ctx, config, location); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", host, err))
			continue
		}
		return location, nil
	}
	return "", fmt.Errorf("find a PAC script: none of %d places has one (first: %w): give its URL or file", len(hosts), faults[0])
}

// wpadAt tells by an error when there is no script at a location.
func wpadAt(ctx context.Context, config Config, location string) error {
	ctx, cancel := context.WithTimeout(ctx, candidateLimit)
	defer cancel()
	config.Location = location
	source, err := newSource(config)
	if err != nil {
		return err
	}
	text, err := source.load(ctx)
	if err != nil {
		return err
	}
	// Servers for every name, such as those of a sign-in page, have pages to offer.
	if !strings.Contains(text, "FindProxyForURL") {
		return errors.New("what is there is no PAC script")
	}
	return nil
}

// wpadHosts are the names to try for search domains.
func wpadHosts(domains []string) []string {
	var hosts []string
	known := make(map[string]bool)
	for _, domain := range domains {
		domain = strings.ToLower(strings.Trim(domain, "."))
		if _, err := netip.ParseAddr(domain); err == nil || !plainName(domain) {
			continue
		}
		// The shortest domain that somebody in particular owns. It is an error for
		// a public suffix.
		owned, err := publicsuffix.EffectiveTLDPlusOne(domain)
		if err != nil {
			continue
		}
		for {
			host := "wpad." + domain
			if !known[host] && len(host) <= maxName && len(hosts) < maxCandidates {
				known[host] = true
				hosts = append(hosts, host)
			}
			if domain == owned {
				break
			}
			_, domain, _ = strings.Cut(domain, ".")
		}
	}
	return hosts
}
