//go:build interop

package interop

import (
	"crypto/md5"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// squidUser and squidPassword are what the company demands; squidUserInfo is how
// that is written in a URL.
const (
	squidUser     = "us er"
	squidPassword = "p@ss:w/o%rd"
	squidUserInfo = "us%20er:p%40ss%3Aw%2Fo%25rd"
)

const squidPort = 3128

// squidPorts are those to which CONNECT is allowed where a test says nothing else.
var squidPorts = []int{22, 80, 443, lab.PortSized, lab.PortSource}

// squid is a real squid in a namespace, with Basic authentication and CONNECT for
// listed ports only.
type squid struct {
	dir string
}

func startSquid(t *testing.T, ns *netns.NS, hosts map[string]netip.Addr, ports []int) *squid {
	t.Helper()
	return startSquidWith(t, ns, hosts, ports, "")
}

// startSquidWith is startSquid with more lines of configuration.
func startSquidWith(t *testing.T, ns *netns.NS, hosts map[string]netip.Addr, ports []int, more string) *squid {
	t.Helper()
	return startSquidFull(t, ns, hosts, ports, basicParams, more, nil)
}

// basicParams have squid authenticate by Basic.
const basicParams = "auth_param basic program /usr/lib/squid/basic_ncsa_auth DIR/password\nauth_param basic realm company\n"

// startSquidAuth is squid with other auth_param; prepare is called before it starts, with its directory.
func startSquidAuth(t *testing.T, ns *netns.NS, hosts map[string]netip.Addr, params string, prepare func(dir string)) *squid {
	t.Helper()
	return startSquidFull(t, ns, hosts, squidPorts, params, "", prepare)
}

func startSquidFull(t *testing.T, ns *netns.NS, hosts map[string]netip.Addr, ports []int, params, more string, prepare func(dir string)) *squid {
	t.Helper()
	s := &squid{dir: t.TempDir()}
	if prepare != nil {
		prepare(s.dir)
		must(t, os.WriteFile(filepath.Join(s.dir, "traced"), []byte(strings.ReplaceAll(tracedScript, "DIR", s.dir)), 0o700))
	}
	var names strings.Builder
	for name, address := range hosts {
		fmt.Fprintf(&names, "%s %s\n", address, name)
	}
	for file, content := range map[string]string{
		"hosts":    names.String(),
		"password": fmt.Sprintf("%s:%x\n", squidUser, md5.Sum([]byte(squidPassword))),
		"squid.conf": strings.ReplaceAll(fmt.Sprintf(`
http_port %d
hosts_file DIR/hosts
%sacl authenticated proxy_auth REQUIRED
acl CONNECT method CONNECT
acl listed port %s
http_access deny CONNECT !listed
http_access allow authenticated
http_access deny all
access_log stdio:DIR/access.log
cache_log DIR/cache.log
pid_filename DIR/squid.pid
coredump_dir DIR
cache deny all
netdb_filename none
visible_hostname proxy.test
dns_nameservers 127.0.0.1
shutdown_lifetime 0 seconds
%s`, squidPort, params, strings.Trim(fmt.Sprint(ports), "[]"), more), "DIR", s.dir),
	} {
		must(t, os.WriteFile(filepath.Join(s.dir, file), []byte(content), 0o600))
	}
	// Its shared memory is named after the service: an instance that was killed
	// must not stand in the way of the next.
	service := fmt.Sprintf("interop%d", time.Now().UnixNano())
	command := exec.Command("squid", "-N", "-n", service, "-f", filepath.Join(s.dir, "squid.conf"))
	// Squid refuses to run as root, and this namespace has no other user: in one
	// more namespace the same user has another number.
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
	}
	process := background(t, ns, command)
	t.Cleanup(func() { process.end(syscall.SIGTERM) })
	if !within(func() bool { return listens(ns, netip.AddrPortFrom(lab.Proxy4, squidPort)) }) {
		log, _ := os.ReadFile(filepath.Join(s.dir, "cache.log"))
		t.Fatalf("squid does not listen:\n%s", log)
	}
	return s
}

// log is squid's access log so far.
func (s *squid) log(t *testing.T) string {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(s.dir, "access.log"))
	must(t, err)
	return string(log)
}

// demands is how many requests it has answered with 407. One is the gateway's first, with which
// it finds out what squid takes.
func (s *squid) demands(t *testing.T) int {
	t.Helper()
	return strings.Count(s.log(t), "/407 ")
}

// wantLog wants a text in the access log, to which squid adds a tunnel at its end.
func (s *squid) wantLog(t *testing.T, text string) {
	t.Helper()
	if !within(func() bool { return strings.Contains(s.log(t), text) }) {
		t.Errorf("squid's log has no %q", text)
	}
}
