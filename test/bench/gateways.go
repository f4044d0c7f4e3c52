package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/routing"
)

// contender is a gateway that is measured. start runs it in the gateway's
// namespace and returns once it captures; undo takes back what the kernel was told
// on its behalf.
type contender struct {
	name  string
	start func(n *network, dir string) (process *exec.Cmd, undo func() error, err error)
}

// contenders are the gateways that can be had on this machine.
func contenders(o options) []contender {
	all := []contender{program(oursName, o.program)}
	if o.before != "" {
		all = append(all, program("before", o.before))
	}
	all = append(all, contender{yardstickName, func(n *network, _ string) (*exec.Cmd, func() error, error) {
		command := exec.Command("/proc/self/exe", yardstickName)
		if err := n.launch(command); err != nil {
			return nil, nil, err
		}
		undo, err := n.capture()
		return command, undo, err
	}})
	if _, err := exec.LookPath("nft"); err != nil {
		return all
	}
	redsocks, err := exec.LookPath("redsocks")
	if err != nil {
		return all
	}
	return append(all, contender{"redsocks", func(n *network, dir string) (*exec.Cmd, func() error, error) {
		config := filepath.Join(dir, "redsocks.conf")
		err := os.WriteFile(config, fmt.Appendf(nil, `
base { log_debug = off; log_info = off; log = "stderr"; daemon = off; redirector = iptables; redsocks_conn_max = 9800; }
redsocks { local_ip = 0.0.0.0; local_port = 12345; ip = %s; port = %d; type = http-connect; listenq = 4096; }
`, serverAddress, proxyPort), 0o600)
		if err != nil {
			return nil, nil, err
		}
		command := exec.Command(redsocks, "-c", config)
		if err := n.launch(command); err != nil {
			return nil, nil, err
		}
		redirect := "table ip redsocks { chain p { type nat hook prerouting priority dstnat;\n iifname lan0 tcp dport 9001-9009 redirect to :12345\n }\n}\n"
		if err := n.nft(redirect); err != nil {
			return command, nil, err
		}
		return command, func() error { return n.nft("delete table ip redsocks\n") }, nil
	}})
}

// program is a build of this one.
func program(name, path string, more ...string) contender {
	return contender{name, func(n *network, _ string) (*exec.Cmd, func() error, error) {
		command := exec.Command(path, append([]string{
			"--upstream", fmt.Sprintf("http://%s:%d", serverAddress, proxyPort),
			"--interface", "lan0", "--tcp-proxy-dports", "9001-9009", "--access-log", "off", "--loglevel", "warn",
		}, more...)...)
		return command, nil, n.launch(command)
	}}
}

// launch starts a gateway and waits until it listens.
func (n *network) launch(command *exec.Cmd) error {
	command.Stderr = os.Stderr
	if err := n.gateway.Start(command); err != nil {
		return err
	}
	time.Sleep(300 * time.Millisecond)
	return nil
}

func (n *network) nft(text string) error {
	command := exec.Command("nft", "-f", "-")
	command.Stdin = strings.NewReader(text)
	return n.gateway.Do(func() error {
		if output, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, output)
		}
		return nil
	})
}

// capture installs for the yardstick what the program installs for itself.
func (n *network) capture() (undo func() error, err error) {
	err = n.gateway.Do(func() error {
		rules, err := netfilter.Open("yardstick")
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
				Table: "yardstick", Mask: mask, LAN: lan, Exempt: bypass,
				Listen:     []netip.AddrPort{netip.MustParseAddrPort(yardstickAddress)},
				Interfaces: []string{"lan0"},
				Clients:    []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
				Ports:      []netfilter.PortRange{{First: 9001, Last: 9009}},
			}))
	})
	return undo, err
}

// The yardstick: what a competent hour gives. A goroutine for each direction,
// io.Copy, half-close.
const (
	yardstickName    = "yardstick"
	yardstickAddress = "127.0.0.1:15001"
)

// yardstick relays until accepting fails, and returns why.
func yardstick() error {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failure error
		err := raw.Control(func(fd uintptr) { failure = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1) })
		return errors.Join(err, failure)
	}}
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp4", yardstickAddress)
	if err != nil {
		return err
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer client.Close()
			relay(client.(*net.TCPConn))
		}()
	}
}

func relay(client *net.TCPConn) {
	dialer := net.Dialer{}
	dialer.SetMultipathTCP(false)
	conn, err := dialer.Dial("tcp4", net.JoinHostPort(serverAddress, fmt.Sprint(proxyPort)))
	if err != nil {
		return
	}
	defer conn.Close()
	upstream := conn.(*net.TCPConn)
	target := client.LocalAddr().String()
	if _, err := fmt.Fprintf(upstream, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target); err != nil {
		return
	}
	var head [1024]byte
	for read := 0; !strings.HasSuffix(string(head[:read]), "\r\n\r\n"); {
		got, err := upstream.Read(head[read:])
		if err != nil {
			return
		}
		read += got
	}
	done := make(chan struct{})
	go func() {
		io.Copy(upstream, client)
		upstream.CloseWrite()
		close(done)
	}()
	io.Copy(client, upstream)
	client.CloseWrite()
	<-done
}

// usage is what a process has used and holds.
type usage struct {
	cpu         time.Duration // user and system
	memory      int64         // bytes, proportional set size
	descriptors int
}

// measure reads the figures of a process. The processor time is the sum over its
// threads of what the scheduler counted, in nanoseconds: the clock ticks of
// /proc/PID/stat are too coarse for the slow loads. No contender ends threads.
func measure(pid int) (usage, error) {
	var u usage
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(threads) == 0 {
		return u, fmt.Errorf("process %d has gone", pid)
	}
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		if err != nil {
			continue
		}
		nanoseconds, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(nanoseconds, 10, 64)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(n)
	}
	memory, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(memory)) {
		if rest, found := strings.CutPrefix(line, "Pss:"); found {
			fmt.Sscanf(rest, "%d", &u.memory)
			u.memory <<= 10
			break
		}
	}
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	u.descriptors = len(descriptors)
	return u, err
}
