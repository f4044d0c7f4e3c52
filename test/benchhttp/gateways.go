package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// The contenders.
const (
	oursName    = "transproxy-tproxy"
	beforeName  = "before"
	squidName   = "squid"
	routingName = "kernel routing" // the limit: nobody stands between client and origin
)

var names = []string{oursName, beforeName, squidName, reverseProxyName, routingName}

// captureAddress is where the gateways other than this program get what is captured.
const captureAddress = "127.0.0.1:15001"

// contender is a gateway that is measured.
type contender struct {
	name    string
	command func() (*exec.Cmd, error) // nil: there is no process
	// capture tells whether the rules are to be installed on its behalf.
	capture bool
}

// contenders are all gateways, in the order of a round.
func (b *bencher) contenders() []contender {
	all := []contender{{oursName, program(b.program), false}}
	if b.before != "" {
		all = append(all, contender{beforeName, program(b.before), false})
	}
	return append(all,
		contender{squidName, b.squid, true},
		contender{reverseProxyName, func() (*exec.Cmd, error) { return exec.Command("/proc/self/exe", reverseProxyName), nil }, true},
		contender{routingName, nil, false})
}

// program is a build of this one.
func program(path string) func() (*exec.Cmd, error) {
	return func() (*exec.Cmd, error) {
		return exec.Command(path, "--upstream", "http://"+proxyAddress, "--interface", "lan0", "--access-log", "off", "--loglevel", "warn"), nil
	}
}

// squid is configured for what the others do: nothing is cached or logged, requests
// are passed on from the gateway's own address and without additions, and no hardware
// address is looked up. It looks up the Host of a captured request, to compare it with
// the destination, and the client's name; it has both at hand.
func (b *bencher) squid() (*exec.Cmd, error) {
	hosts, config := filepath.Join(b.dir, "hosts"), filepath.Join(b.dir, "squid.conf")
	err := errors.Join(
		os.WriteFile(hosts, fmt.Appendf(nil, "%s %s\n%s client.example\n", originAddress, originName, clientAddress), 0o600),
		os.WriteFile(config, fmt.Appendf(nil, `
http_port %s tproxy
http_port 127.0.0.1:15002
spoof_client_ip deny all
cache_peer %s parent 3128 0 no-query no-digest no-netdb-exchange default
never_direct allow all
http_access allow all
cache deny all
cache_mem 0
via off
forwarded_for delete
eui_lookup off
hosts_file %s
dns_nameservers 127.0.0.1
access_log none
cache_log stdio:/dev/stderr
pid_filename none
netdb_filename none
pinger_enable off
coredump_dir %s
visible_hostname gateway.test
shutdown_lifetime 0 seconds
`, captureAddress, upstreamAddress, hosts, b.dir), 0o600))
	// Its shared memory is named after the service: an instance that was killed must
	// not stand in the way of the next.
	service := fmt.Sprintf("benchhttp%d", time.Now().UnixNano())
	return exec.Command("squid", "-N", "-n", service, "-f", config), err
}

// measure starts a contender, waits until requests go through it, takes the figures
// of a load and stops it.
func (b *bencher) measure(c contender, load load) (err error) {
	if c.command == nil {
		if load.needsGateway {
			return nil
		}
		return load.measure(b, c.name, 0)
	}
	command, err := c.command()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(b.dir, "gateway.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	defer func() {
		if err != nil {
			text, _ := os.ReadFile(log.Name())
			err = fmt.Errorf("%w: %s", err, text[max(0, len(text)-2000):])
		}
	}()
	command.Stdout, command.Stderr = log, log
	if err := b.network.gateway.Start(command); err != nil {
		return err
	}
	defer end(command)
	if c.capture {
		undo, err := b.network.capture()
		if undo != nil {
			defer func() { err = errors.Join(err, undo()) }()
		}
		if err != nil {
			return err
		}
	}
	if err := b.network.warm(); err != nil {
		return err
	}
	if err := load.measure(b, c.name, command.Process.Pid); err != nil {
		return err
	}
	// A gateway that has ended leaves its traffic to the kernel.
	if server, err := b.network.getOnce(); err != nil || server != proxyServer {
		return fmt.Errorf("after the load it does not forward any more (answered by %q, %v)", server, err)
	}
	return nil
}

// warm waits until requests go through the gateway and sends some, each on a
// connection of its own and then on a kept one: code and caches are not what is
// measured.
func (n *network) warm() error {
	const some = 200
	server, err := n.getOnce()
	for end := time.Now().Add(15 * time.Second); server != proxyServer && time.Now().Before(end); server, err = n.getOnce() {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil || server != proxyServer {
		return fmt.Errorf("it does not forward (answered by %q, %v)", server, err)
	}
	for range some {
		if _, err := n.getOnce(); err != nil {
			return err
		}
	}
	conn, err := n.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	for range some {
		if _, err := get(conn); err != nil {
			return err
		}
	}
	return nil
}

// capture installs for another gateway what the program installs for itself.
func (n *network) capture() (undo func() error, err error) {
	err = n.gateway.Do(func() error {
		rules, err := netfilter.Open("benchhttp")
		if err != nil {
			return err
		}
		routes, err := routing.Open()
		if err != nil {
			return errors.Join(err, rules.Close())
		}
		undo = func() error { return errors.Join(rules.Close(), routes.Close()) }
		const mask, lan, local, bypass = 0x07000000, 0x01000000, 0x02000000, 0x04000000
		return errors.Join(
			routes.Apply(routing.Config{Table: 4219, Priority: 4218, Protocol: 219, Mask: mask, LAN: lan, Local: local, IPv4: true}),
			rules.Apply(netfilter.Config{
				Table: "benchhttp", Mask: mask, LAN: lan, Exempt: bypass,
				Listen:     []netip.AddrPort{netip.MustParseAddrPort(captureAddress)},
				Interfaces: []string{"lan0"},
				Clients:    []netip.Prefix{netip.MustParsePrefix(clientNetwork)},
				Ports:      []netfilter.PortRange{{First: 80, Last: 80}},
			}))
	})
	return undo, err
}

// end stops a gateway.
func end(process *exec.Cmd) {
	process.Process.Signal(unix.SIGTERM)
	killed := time.AfterFunc(5*time.Second, func() { process.Process.Kill() })
	defer killed.Stop()
	process.Wait() // how it ends is not what is measured
}
