//go:build interop

package interop

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// nameServer is a real DNS server in a namespace that logs what it is asked.
type nameServer struct {
	log     string         // its file
	queries *regexp.Regexp // finds the name and the type of a query in a line of it
}

// asked are the questions so far, as "name TYPE", in lower case, without the
// trailing dot, each once and in order.
func (s *nameServer) asked(t *testing.T) []string {
	t.Helper()
	log, err := os.ReadFile(s.log)
	must(t, err)
	var all []string
	for _, match := range s.queries.FindAllStringSubmatch(string(log), -1) {
		name := strings.TrimSuffix(strings.ToLower(match[s.queries.SubexpIndex("name")]), ".")
		all = append(all, name+" "+match[s.queries.SubexpIndex("type")])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// below are the questions for names at or below one of the suffixes.
func below(questions []string, suffixes ...string) (found []string) {
	for _, question := range questions {
		name, _, _ := strings.Cut(question, " ")
		for _, suffix := range suffixes {
			if name == suffix || strings.HasSuffix(name, "."+suffix) {
				found = append(found, question)
			}
		}
	}
	return found
}

// certificate is of a name server: its files and that of its authority, which is
// itself.
type certificate struct{ chain, key string }

func newCertificate(t *testing.T, names []string, addresses ...netip.Addr) certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		Subject: pkix.Name{CommonName: "Public CA"},
		IsCA:    true, BasicConstraintsValid: true, DNSNames: names,
		// That it is logged, as public ones are (RFC 6962 section 3.3): an empty list.
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11129, 2, 4, 2}, Value: []byte{4, 2, 0, 0}}},
	}
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	dir := t.TempDir()
	c := certificate{filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")}
	must(t,
		os.WriteFile(c.chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(c.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	return c
}

// startUnbound serves zones, by name, at port 53 over UDP and TCP, 853 over TLS and
// 443 over HTTPS of the addresses.
func startUnbound(t *testing.T, ns *netns.NS, c certificate, zones map[string]string, addresses ...netip.Addr) *nameServer {
	t.Helper()
	dir := t.TempDir()
	s := &nameServer{
		log: filepath.Join(dir, "log"),
		// [1763863200] unbound[4711:0] info: 203.0.113.1 www.public.test. A IN
		queries: regexp.MustCompile(`(?m)^\[\d+\] unbound\[\d+:\d+\] info: [0-9a-f.:]+ (?P<name>\S+) (?P<type>\S+) IN$`),
	}
	var config strings.Builder
	fmt.Fprintf(&config, `
server:
	directory: %q
	chroot: ""
	username: ""
	pidfile: ""
	logfile: %q
	use-syslog: no
	log-queries: yes
	do-daemonize: no
	num-threads: 1
	ip-freebind: yes
	module-config: "iterator"
	access-control: 0.0.0.0/0 allow
	access-control: ::/0 allow
	tls-service-pem: %q
	tls-service-key: %q
	tls-port: 853
	https-port: 443
	local-zone: "test." nodefault
	local-zone: "113.0.203.in-addr.arpa." nodefault
	local-zone: "8.b.d.0.1.0.0.2.ip6.arpa." nodefault
`, dir, s.log, c.chain, c.key)
	for _, address := range addresses {
		for _, port := range []int{53, 853, 443} {
			fmt.Fprintf(&config, "\tinterface: %s@%d\n", address, port)
		}
	}
	config.WriteString("remote-control:\n\tcontrol-enable: no\n")
	for name, text := range zones {
		file := filepath.Join(dir, name+".zone")
		must(t, os.WriteFile(file, []byte(text), 0o600))
		fmt.Fprintf(&config, "auth-zone:\n\tname: %q\n\tzonefile: %q\n\tfor-downstream: yes\n\tfor-upstream: no\n", name+".", file)
	}
	file := filepath.Join(dir, "unbound.conf")
	must(t, os.WriteFile(file, []byte(config.String()), 0o600))
	background(t, ns, exec.Command("unbound", "-c", file))
	for _, address := range addresses {
		for _, port := range []uint16{53, 853, 443} {
			if !within(func() bool { return listens(ns, netip.AddrPortFrom(address, port)) }) {
				log, _ := os.ReadFile(s.log)
				t.Fatalf("unbound does not listen on port %d of %s:\n%s", port, address, log)
			}
		}
	}
	return s
}

// startDnsmasq serves what the arguments say at port 53 of all addresses of a host,
// to which the given one belongs. It knows no other server.
func startDnsmasq(t *testing.T, ns *netns.NS, address netip.Addr, arguments ...string) *nameServer {
	t.Helper()
	s := &nameServer{
		log: filepath.Join(t.TempDir(), "log"),
		// Nov 23 03:02:46 dnsmasq[11515]: query[AAAA] www.corp.test from 198.51.100.1
		queries: regexp.MustCompile(`(?m) query\[(?:type=)?(?P<type>[^]]+)\] (?P<name>\S+) from `),
	}
	command := exec.Command("dnsmasq", append([]string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts",
		"--log-queries", "--log-facility=" + s.log, "--local-ttl=60",
	}, arguments...)...)
	// As root it insists on changing its group, which this namespace denies: in one
	// more namespace the same user is an ordinary one, who may then use port 53.
	must(t, ns.Sysctl("net.ipv4.ip_unprivileged_port_start", "0"))
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
	}
	background(t, ns, command)
	if !within(func() bool { return listens(ns, netip.AddrPortFrom(address, 53)) }) {
		log, _ := os.ReadFile(s.log)
		t.Fatalf("dnsmasq does not listen:\n%s", log)
	}
	return s
}

// dig runs dig in a namespace, once, with two seconds to wait for the answer.
func dig(t *testing.T, ns *netns.NS, at netip.Addr, arguments ...string) string {
	t.Helper()
	output, err := run(t, ns, "dig", append([]string{"@" + at.String(), "+tries=1", "+time=2"}, arguments...)...)
	if err != nil {
		output += "\n;; " + err.Error()
	}
	return output
}
