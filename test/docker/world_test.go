package docker

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// What the company's proxy demands, and the URL that says so.
const (
	user, password = "us er", "p@ss:w/o%rd"
	proxyUser      = "us%20er:p%40ss%3Aw%2Fo%25rd@"
)

// Name servers that exist nowhere: the Docker host and its containers were told of
// them, perhaps at home. What goes to them uncaptured ends at the router.
const (
	hostServer = "203.0.113.53"
	runServer  = "203.0.113.99"
	runServer6 = "2001:db8:3::53"
)

// pastAddress is what the router answers to questions that got past the gateway.
const pastAddress = "192.0.2.66"

// world is a Docker host, the gateway of the lab, in its company's network.
type world struct {
	*lab.Lab
	t        *testing.T
	proxy    *lab.ConnectProxy
	origin   *lab.Origin     // behind the proxy
	intranet *lab.Origin     // a server of the company, reached directly
	past     *lab.Origin     // what is reached past the proxy
	public   *lab.Nameserver // behind the proxy
	private  *lab.Nameserver // in the company's network
	deceived *lab.Nameserver // who asks it has got past the gateway
	ca       []byte          // of the origin's certificate, PEM
}

func newWorld(t *testing.T) *world {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &world{
		Lab: l, t: t,
		proxy:    &lab.ConnectProxy{User: user, Password: password},
		origin:   &lab.Origin{Label: "origin"},
		intranet: &lab.Origin{Label: "intranet"},
		past:     &lab.Origin{Label: "past"},
		public: &lab.Nameserver{Records: []string{
			fmt.Sprintf("*.public.test 300 A %s", lab.Origin4),
			fmt.Sprintf("*.six.test 300 AAAA %s", lab.Origin6),
		}},
		private:  &lab.Nameserver{Records: []string{fmt.Sprintf("intranet.corp.test 300 A %s", lab.Neighbour4)}},
		deceived: &lab.Nameserver{Records: []string{"*. 300 A " + pastAddress}},
	}
	names, addresses := []string{"*.public.test", "*.six.test"}, []netip.Addr{lab.Origin4, lab.Origin6}
	for _, server := range []struct {
		start func() error
		close func()
	}{
		{func() error { return w.origin.Start(l.Origin, names, addresses) }, w.origin.Close},
		{func() error { return w.intranet.Start(l.Neighbour, nil, nil) }, w.intranet.Close},
		{func() error { return w.past.Start(l.Router, names, addresses) }, w.past.Close},
		{func() error { return w.public.Start(l.Origin) }, w.public.Close},
		{func() error { return w.private.Start(l.Neighbour) }, w.private.Close},
		{func() error { return w.deceived.Start(l.Router) }, w.deceived.Close},
		{func() error { return w.proxy.Start(l.Proxy, lab.ProxyPort) }, w.proxy.Close},
	} {
		must(t, server.start())
		t.Cleanup(server.close)
	}
	w.ca = authority(t, l.Origin)
	return w
}

// authority is the certificate of the origin, which is its own authority.
func authority(t *testing.T, origin *netns.NS) []byte {
	t.Helper()
	conn, err := origin.Dial(t.Context(), "tcp", netip.AddrPortFrom(lab.Origin4, 443).String())
	must(t, err)
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	must(t, client.HandshakeContext(t.Context()))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: client.ConnectionState().PeerCertificates[0].Raw})
}

// gateway starts the program on the Docker host.
func (w *world) gateway(t *testing.T, arguments ...string) *process {
	t.Helper()
	command := exec.Command(binary("transproxy-tproxy"), append([]string{
		"--upstream", fmt.Sprintf("http://%s%s:%d", proxyUser, lab.Proxy4, lab.ProxyPort),
		"--private-dns", lab.Neighbour4.String(), "--public-dns", lab.Origin4.String(), "--no-proxy", "corp.test",
		"--log-format", "json",
	}, arguments...)...)
	command.Env = []string{"PATH=" + os.Getenv("PATH")}
	p := background(t, w.Gateway, command)
	p.waitFor(`"message":"ready"`)
	return p
}

// name puts a name on the public network. Each test has its own, so that what the proxy
// was asked tells who asked.
func (w *world) name(label, domain string) string {
	name := label + "." + domain
	address := lab.Origin4
	if domain == "six.test" {
		address = lab.Origin6
	}
	w.proxy.Change(func() {
		hosts := maps.Clone(w.proxy.Hosts)
		if hosts == nil {
			hosts = make(map[string]netip.Addr)
		}
		hosts[name] = address
		w.proxy.Hosts = hosts
	})
	return name
}

// container runs the client with arguments and returns what it prints.
type container func(arguments ...string) (string, error)

// wantOutside wants a container to reach the public network by name, over HTTPS and
// HTTP, through the proxy, and the company's own network past it.
func (w *world) wantOutside(t *testing.T, label, domain string, client container) {
	t.Helper()
	name := w.name(label, domain)
	text := fmt.Sprintf("origin https://%s/secure\norigin http://%s/plain\nintranet http://intranet.corp.test/\n", name, name)
	if want(t, client, text, "fetch", "https://"+name+"/secure", "http://"+name+"/plain", "http://intranet.corp.test/") {
		w.wantProxied(t, name)
	}
}

// wantProxied wants the proxy to have been given the name, in both ways.
func (w *world) wantProxied(t *testing.T, name string) {
	t.Helper()
	if targets := w.proxy.Targets(); !slices.Contains(targets, name+":443") {
		t.Errorf("the proxy was asked for %q and not for %s:443", targets, name)
	}
	if requests := w.proxy.Requests(); !slices.Contains(requests, "GET http://"+name+"/plain") {
		t.Errorf("the proxy was asked %q and not for http://%s/plain", requests, name)
	}
}

// wantNothingPast wants everything so far to have gone through the gateway's hands.
func (w *world) wantNothingPast(t *testing.T) {
	t.Helper()
	if sources := w.past.Sources(); len(sources) > 0 {
		t.Errorf("connections past the proxy: %v", sources)
	}
	if questions := w.deceived.Asked(); len(questions) > 0 {
		t.Errorf("questions past the gateway: %+v", questions)
	}
}

// wantNoFlowTo wants the program, which has ended, to have carried nothing to addresses
// that are no business of its: the containers', and the Docker host's with the ports that
// are published there.
func wantNoFlowTo(t *testing.T, g *process, containers ...string) {
	t.Helper()
	for _, f := range g.flows() {
		destination, err := netip.ParseAddrPort(f.Destination)
		must(t, err)
		for _, network := range append(containers, lab.Uplink4.String()+"/32", lab.Gateway4.String()+"/32", lab.Uplink6.String()+"/128") {
			if netip.MustParsePrefix(network).Contains(destination.Addr()) {
				t.Errorf("captured: %+v", f)
			}
		}
	}
}

// want wants a container's client to print a text, and reports whether it does.
func want(t *testing.T, client container, text string, arguments ...string) bool {
	t.Helper()
	output, err := client(arguments...)
	if err != nil || output != text {
		t.Errorf("client %s: %v\n%s\nand not\n%s", strings.Join(arguments, " "), err, output, text)
		return false
	}
	return true
}

// bridgeCalls are the two values of the kernel parameters by which bridged packets pass
// the rules of IP. Docker and Kubernetes hosts have 1.
var bridgeCalls = []string{"0", "1"}

// setBridgeCalls sets both parameters of a namespace, and reports whether the kernel
// has them (br_netfilter).
func setBridgeCalls(t *testing.T, ns *netns.NS, value string) bool {
	t.Helper()
	const ipv4 = "net.bridge.bridge-nf-call-iptables"
	if _, err := ns.ReadSysctl(ipv4); err != nil {
		return false
	}
	must(t, ns.Sysctl(ipv4, value), ns.Sysctl("net.bridge.bridge-nf-call-ip6tables", value))
	return true
}

// writeRoot makes a directory that is a container's root, with nothing in it but the
// client and the authority that it trusts.
func (w *world) writeRoot(t *testing.T, root string) {
	t.Helper()
	for _, dir := range []string{"bin", "tmp", "etc/ssl/certs"} {
		must(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	must(t,
		copyFile(filepath.Join(root, "bin/client"), binary("client")),
		os.WriteFile(filepath.Join(root, "etc/ssl/certs/ca-certificates.crt"), w.ca, 0o644))
}

func copyFile(to, from string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o755)
}

// get fetches a URL with a literal address from a host that has no part in any of this.
func get(t *testing.T, ns *netns.NS, url string) (string, error) {
	client := lab.HTTPClient(ns, nil, nil)
	client.Timeout = 5 * time.Second
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	must(t, err)
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}
