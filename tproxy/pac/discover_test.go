package pac

import (
	"slices"
	"strings"
	"testing"
)

func TestNamesToTry(t *testing.T) {
	for domains, want := range map[string]string{
		"":                               "",
		"corp.example.com":               "wpad.corp.example.com wpad.example.com",
		"A.B.Example.CO.UK.":             "wpad.a.b.example.co.uk wpad.b.example.co.uk wpad.example.co.uk",
		"co.uk com lan github.io":        "", // anybody may have a name there
		"x.github.io":                    "wpad.x.github.io",
		"home.lan":                       "wpad.home.lan",
		"eng.corp.com hr.corp.com":       "wpad.eng.corp.com wpad.corp.com wpad.hr.corp.com",
		"10.0.0.1 a/b .. a..com x@y.com": "",
	} {
		if got := strings.Join(wpadHosts(strings.Fields(domains)), " "); got != want {
			t.Errorf("%q: got %q, want %q", domains, got, want)
		}
	}
	deep := strings.Repeat("a.", 100) + "example.com"
	if got := wpadHosts([]string{deep}); len(got) != maxCandidates {
		t.Errorf("%d names are tried", len(got))
	}
}

func FuzzNamesToTry(f *testing.F) {
	f.Add("corp.example.com")
	f.Add("a..b")
	f.Add("co.uk")
	f.Fuzz(func(t *testing.T, domain string) {
		hosts := wpadHosts([]string{domain})
		if len(hosts) > maxCandidates || slices.ContainsFunc(hosts, func(host string) bool {
			return !plainName(host) || strings.Count(host, ".") < 2
		}) {
			t.Errorf("%q: %q", domain, hosts)
		}
	})
}
