package main

import (
	"os"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// rules prints what run would install on this host and changes nothing. The whole
// is text for `nft -f`; the ip commands stand in it as comments.
func rules(s *settings) error {
	if err := s.resolveUpstream(); err != nil {
		return usageError{err}
	}
	text, err := s.installation()
	if err != nil {
		return err
	}
	_, err = os.Stdout.WriteString(text)
	return err
}

// commented makes shell text a comment of nft(8).
func commented(text string) string {
	var all strings.Builder
	for line := range strings.Lines(text) {
		all.WriteString("# " + strings.TrimPrefix(line, "# "))
	}
	return all.String()
}

// installation is the text of rules.
func (s *settings) installation() (string, error) {
	f, err := lookFamilies()
	if err != nil {
		return "", err
	}
	host, err := routing.Look()
	if err != nil {
		return "", err
	}
	config := s.netfilter(f, host)
	if err := config.Validate(); err != nil {
		return "", usageError{err}
	}
	return commented(routing.Text(s.routing(f))) + "\n" + netfilter.Text(config), nil
}

// cleanUp removes what a killed instance left. It needs no upstream.
func cleanUp(s *settings) error {
	f, err := lookFamilies()
	if err != nil {
		return err
	}
	// While an instance lives, its table says so before its rules are touched.
	if err := netfilter.CleanUp(s.nftTable); err != nil {
		return err
	}
	return routing.CleanUp(s.routing(f))
}
