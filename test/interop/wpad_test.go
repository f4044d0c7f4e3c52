//go:build interop

package interop

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/pac"
)

// wpadDomains is set in the environment of the process that looks for a script.
const wpadDomains = "TRANSPROXY_TEST_WPAD_DOMAINS"

// TestWPAD: on a host whose name server is a real dnsmasq, the script is found under
// the parent of the search domain, past a server that has a page for everything, and
// no public suffix is asked about.
func TestWPAD(t *testing.T) {
	ns, err := netns.New()
	must(t, err)
	t.Cleanup(func() { ns.Close() })
	loopback := netip.MustParseAddr("127.0.0.1")
	names := startDnsmasq(t, ns, loopback,
		"--host-record=wpad.eng.corp.co.uk,127.0.0.2", "--host-record=wpad.corp.co.uk,127.0.0.1", "--host-record=wpad.co.uk,127.0.0.1")
	for address, body := range map[string]string{
		"127.0.0.1:80": `function FindProxyForURL(url, host) { return "DIRECT"; }`,
		"127.0.0.2:80": "<html>Sign in</html>",
	} {
		listener, err := ns.Listen("tcp", address)
		must(t, err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/wpad.dat" {
				http.NotFound(w, r)
				return
			}
			fmt.Fprint(w, body)
		})}
		go server.Serve(listener) // ends with Close
		t.Cleanup(func() { server.Close() })
	}
	for domains, want := range map[string]string{
		"lab.eng.corp.co.uk": "found http://wpad.corp.co.uk/wpad.dat",
		"co.uk":              "find a PAC script: no search domain",
		"else.org":           "find a PAC script: none of 1 places has one (first: wpad.else.org: ",
	} {
		// What Discover starts must be in the namespace too: a process of its own.
		command := exec.Command("/proc/self/exe", "-test.run", "^TestWPADClient$", "-test.v")
		command.Env = append(os.Environ(), wpadDomains+"="+domains)
		said := background(t, ns, command)
		<-said.ended
		if !strings.Contains(said.text(), want) {
			t.Errorf("%s: got %s, want %s", domains, said.text(), want)
		}
	}
	log, err := os.ReadFile(names.log)
	must(t, err)
	for _, name := range []string{"wpad.lab.eng.corp.co.uk", "wpad.eng.corp.co.uk", "wpad.corp.co.uk", "wpad.else.org"} {
		if !strings.Contains(string(log), " "+name+" from ") {
			t.Errorf("%s was not asked for", name)
		}
	}
	if strings.Contains(string(log), " wpad.co.uk from ") {
		t.Errorf("a public suffix was asked about:\n%s", log)
	}
}

// TestWPADClient is the process that TestWPAD starts in its namespace.
func TestWPADClient(t *testing.T) {
	domains := os.Getenv(wpadDomains)
	if domains == "" {
		t.Skip("TestWPAD runs it")
	}
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "udp", "127.0.0.1:53")
	}}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	location, err := pac.Discover(ctx, pac.Config{Resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
		return resolver.LookupNetIP(ctx, "ip", host+".")
	}}, strings.Fields(domains))
	if err != nil {
		t.Log(err)
		return
	}
	t.Log("found " + location)
}
