package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// The resolvers and what is measured of them.
const (
	oursName     = "transproxy-tproxy"
	capturedName = "captured"
	dnsmasqName  = "dnsmasq"
	unboundName  = "unbound"
	pipelineName = "through CONNECT"
	// The yardstick with no more tunnels than the one above; without a limit it goes by
	// yardstickName.
	sameTunnelsName = "one connection a query"
)

// names are those of the contenders.
var names = []string{oursName, capturedName, dnsmasqName, unboundName, pipelineName, yardstickName}

// contender is a resolver in one of its uses.
type contender struct {
	name    string
	command func() (*exec.Cmd, error)
	// work takes the figures of the process.
	work func(pid int) error
}

// bencher is one run of the benchmark.
type bencher struct {
	options
	dir     string
	load    load
	network *network
	results results
}

// contenders are all resolvers, in the order of a round.
func (b *bencher) contenders() []contender {
	cached := func(name string, server netip.AddrPort) func(int) error {
		return func(pid int) error { return b.measureCached(pid, name, server) }
	}
	return []contender{
		// By itself it changes nothing in the kernel, as the two below.
		{oursName, func() (*exec.Cmd, error) { return b.ours("--dns-over-tcp-disabled", "--disable-iptables"), nil }, cached(oursName, resolverAddress)},
		{capturedName, func() (*exec.Cmd, error) { return b.ours("--dns-over-tcp-disabled"), nil }, cached(capturedName, capturedAddress)},
		{dnsmasqName, b.dnsmasq, cached(dnsmasqName, resolverAddress)},
		{unboundName, b.unbound, cached(unboundName, resolverAddress)},
		{pipelineName, func() (*exec.Cmd, error) { return b.ours(), nil }, func(int) error { return b.measurePipeline() }},
		{yardstickName, func() (*exec.Cmd, error) { return exec.Command("/proc/self/exe", yardstickName), nil }, func(int) error { return b.measureYardstick() }},
	}
}

// ours is this program. Its cache is bounded in bytes, of which an entry of this load
// takes 144.
func (b *bencher) ours(arguments ...string) *exec.Cmd {
	return exec.Command(b.program, append([]string{
		"--upstream", "http://" + proxyAddress.String(), "--interface", "lan0", "--access-log", "off", "--loglevel", "warn",
		"--public-dns", upstreamAddress.Addr().String(), "--dns-proxy-listen", resolverAddress.String(),
		"--dns-cache", fmt.Sprint(160 * cacheEntries),
	}, arguments...)...)
}

func (b *bencher) dnsmasq() (*exec.Cmd, error) {
	command := exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts",
		"--log-facility=-", "--server="+upstreamAddress.Addr().String(),
		fmt.Sprintf("--cache-size=%d", cacheEntries), "--dns-forward-max=1000",
		"--bind-interfaces", "--listen-address="+resolverAddress.Addr().String())
	// As root it insists on changing its group, which this namespace denies: in one
	// more namespace the same user is an ordinary one.
	command.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 13, HostID: 0, Size: 1}},
	}
	return command, nil
}

// unbound bounds its cache in bytes as well; both parts have more than enough.
func (b *bencher) unbound() (*exec.Cmd, error) {
	config := filepath.Join(b.dir, "unbound.conf")
	err := os.WriteFile(config, fmt.Appendf(nil, `
server:
	directory: %q
	chroot: ""
	username: ""
	pidfile: ""
	logfile: ""
	use-syslog: no
	do-daemonize: no
	verbosity: 0
	num-threads: 1
	interface: %s
	access-control: 0.0.0.0/0 allow
	module-config: "iterator"
	msg-cache-size: %d
	rrset-cache-size: %d
forward-zone:
	name: "."
	forward-addr: %s
remote-control:
	control-enable: no
`, b.dir, resolverAddress.Addr(), 1000*cacheEntries, 1000*cacheEntries, upstreamAddress.Addr()), 0o600)
	return exec.Command("unbound", "-c", config), err
}

// measure starts a contender, waits until it answers, measures it and stops it.
func (b *bencher) measure(c contender) error {
	command, err := c.command()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(b.dir, "resolver.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	command.Stdout, command.Stderr = log, log
	if err := b.network.Gateway.Start(command); err != nil {
		return err
	}
	defer end(command)
	if err := b.waitFor(resolverAddress); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("%w: %s", err, text)
	}
	return c.work(command.Process.Pid)
}

// waitFor asks a resolver until it answers.
func (b *bencher) waitFor(server netip.AddrPort) error {
	query := []byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x05ready\x07example\x00\x00\x01\x00\x01")
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for ; ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		conn, err := b.network.Client.Dial(ctx, "udp4", server.String())
		if err != nil {
			return err
		}
		conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
		conn.Write(query)
		message := make([]byte, 512)
		length, err := conn.Read(message)
		conn.Close()
		if err == nil && length > len(query) && message[3]&0xf == 0 {
			return nil
		}
	}
	return errors.New("it does not answer")
}

// measureCached takes the figures of answers from the cache, as fast as they come
// and at a rate.
func (b *bencher) measureCached(pid int, name string, server netip.AddrPort) error {
	if err := b.waitFor(server); err != nil {
		return err
	}
	address := server.Addr().String()
	if _, err := b.dnsperf(address, cachedNames, 0, "-n", "2", "-q", "50"); err != nil {
		return fmt.Errorf("fill the cache: %w", err)
	}
	before, err := cpu(pid)
	if err != nil {
		return err
	}
	a, err := b.dnsperf(address, cachedNames, b.load.cached, "-c", "8", "-q", "100")
	if err != nil {
		return err
	}
	after, err := cpu(pid)
	if err != nil {
		return err
	}
	used := (after - before).Seconds()
	paced, err := b.dnsperf(address, cachedNames, b.load.paced, "-c", "8", "-v", "-Q", fmt.Sprint(b.load.pacedRate))
	if err != nil {
		return err
	}
	b.results.add(name, rate, a.perSecond)
	b.results.add(name, perCore, float64(a.queries)/used)
	b.results.add(name, cpuQuery, used*1e6/float64(a.queries))
	b.results.add(name, medianLatency, percentile(paced.latencies, 50).Seconds()*1e6)
	b.results.add(name, p99Latency, percentile(paced.latencies, 99).Seconds()*1e6)
	return nil
}

// uncachedInFlight is how many new names are asked for at once: what waits in a
// socket while its owner is busy must fit into the kernel's buffer (212,992 bytes,
// with 768 of them a small packet).
const uncachedInFlight = 200

// measurePipeline asks this program for new names.
func (b *bencher) measurePipeline() error {
	b.network.tunnels.reset()
	rate, err := b.uncached(uncachedInFlight)
	if err != nil {
		return err
	}
	b.results.add(pipelineName, uncachedRate, rate)
	b.results.add(pipelineName, tunnelsOpen, float64(b.network.tunnels.most()))
	return nil
}

// measureYardstick asks the yardstick for them, at first only as many at once as
// this program had tunnels.
func (b *bencher) measureYardstick() error {
	var same float64
	if tunnels := b.results[pipelineName][tunnelsOpen]; len(tunnels) > 0 {
		var err error
		if same, err = b.uncached(int(tunnels[len(tunnels)-1])); err != nil {
			return err
		}
	}
	all, err := b.uncached(uncachedInFlight)
	if err != nil {
		return err
	}
	b.results.add(yardstickName, uncachedRate, all)
	if same > 0 {
		b.results.add(sameTunnelsName, uncachedRate, same)
	}
	return nil
}

// uncached asks for new names and returns how many were answered in a second.
func (b *bencher) uncached(inFlight int) (float64, error) {
	a, err := b.dnsperf(resolverAddress.Addr().String(), newNames, b.load.uncached,
		"-c", fmt.Sprint(min(8, inFlight)), "-q", fmt.Sprint(inFlight))
	if err == nil && a.queries > b.load.newNames {
		err = fmt.Errorf("%d queries of %d names: some were in the cache", a.queries, b.load.newNames)
	}
	return a.perSecond, err
}
