package test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// everyDNSFlag changes as much of the kernel as can be changed for DNS.
func everyDNSFlag(t *testing.T) []string {
	return []string{
		"--private-dns", lab.Neighbour4.String(), "--no-proxy", "corp.test",
		"--dns-proxy-listen", ":5300", "--fake-ip", "--fake-ip-store", filepath.Join(t.TempDir(), "fake-ips"),
	}
}

// TestStopUndoesDNS: a stopped gateway leaves the client's questions alone; so does
// one that was killed.
func TestStopUndoesDNS(t *testing.T) {
	w := newDNSWorld(t)
	before := w.kernelState()
	for i, end := range []func(*gateway){(*gateway).stop, (*gateway).kill} {
		g := w.gateway(everyDNSFlag(t)...)
		fake := resolve(t, w.Client, "a.public.test", "A")
		if !fakeRanges[0].Contains(fake) {
			t.Errorf("a.public.test is %s", fake)
		}
		if w.kernelState() == before {
			t.Fatal("a running gateway has changed nothing: the comparison is blind")
		}
		end(g)
		for j, server := range anywhere {
			for _, network := range networks {
				name := fmt.Sprintf("%s-%d-%d.public.test", network, i, j)
				wantAnswer(t, w.Client, network, server, name, "A", fromPast4)
				if asked := w.past.AskedFor(name); len(asked) != 1 || asked[0].Source.Addr() != []netip.Addr{lab.Client4, lab.Client6}[j] {
					t.Errorf("%s: the server was asked %v", name, asked)
				}
			}
		}
		if i == 1 {
			w.cleanUp()
		}
		if after := w.kernelState(); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	}
}

// TestKilledAndClosedLeaksNoQuestion: --fail closed holds for DNS.
func TestKilledAndClosedLeaksNoQuestion(t *testing.T) {
	w := newDNSWorld(t)
	before := w.kernelState()
	g := w.gateway("--public-dns", public4.String(), "--fail", "closed")
	wantAnswer(t, w.Client, "udp", anywhere[0], "a.public.test", "A", fromPublic4)
	g.kill()
	for _, server := range anywhere {
		for _, network := range networks {
			wantSilence(t, w.Client, network, netip.AddrPortFrom(server, 53), "b.public.test")
		}
	}
	w.wantNothingPast()
	w.cleanUp()
	if after := w.kernelState(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	wantAnswer(t, w.Client, "udp", anywhere[0], "c.public.test", "A", fromPast4)
}

// memory is what a process holds, in bytes.
func memory(t *testing.T, process *os.Process) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process.Pid))
	must(t, err)
	var kilobytes int
	_, rest, _ := bytes.Cut(status, []byte("VmRSS:"))
	if _, err := fmt.Sscan(string(rest), &kilobytes); err != nil {
		t.Fatalf("read the resident size: %v", err)
	}
	return kilobytes << 10
}

// sockets is how many of TCP and UDP a process has open. Other files come and go with Go's
// runtime, and those of netlink when the program watches the network.
func sockets(t *testing.T, process *os.Process) (n int) {
	t.Helper()
	internet := make(map[string]bool) // by inode
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", process.Pid, table))
		must(t, err)
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 9 {
				internet["socket:["+fields[9]+"]"] = true
			}
		}
	}
	directory := fmt.Sprintf("/proc/%d/fd/", process.Pid)
	entries, err := os.ReadDir(directory)
	must(t, err)
	for _, entry := range entries {
		if what, _ := os.Readlink(directory + entry.Name()); internet[what] {
			n++
		}
	}
	return n
}

// The flood: from how many sockets is asked at once, and how much the cache and all
// else may take beside what a program takes that has just started.
const (
	floodSockets = 32
	floodCache   = 4 << 20
	floodBeside  = 20 << 20
)

// TestFlood: while very many distinct questions are asked, and the public server
// goes and comes back, memory stays bounded, and so does the time without service.
func TestFlood(t *testing.T) {
	questions := 50_000
	if testing.Short() {
		questions = 3_000
	}
	w := newDNSWorld(t)
	g := w.gateway("--public-dns", public4.String(), "--dns-cache", fmt.Sprint(floodCache))
	wantAnswer(t, w.Client, "udp", anywhere[0], "first.public.test", "A", fromPublic4)
	process := g.command.Process
	atStart, openAtStart := memory(t, process), sockets(t, process)
	look := func(when string) {
		t.Helper()
		now := memory(t, process)
		t.Logf("%s: %d KiB", when, now>>10)
		if now > atStart+floodCache+floodBeside {
			t.Errorf("%s: the program holds %d KiB, and held %d at its start", when, now>>10, atStart>>10)
		}
	}
	look("at the start")

	w.flood("before", questions/3, true)
	look("while all is well")
	w.public.Close()
	w.flood("without", questions/3, false)
	look("without the server")
	must(t, w.public.Start(w.publicHost))
	back := time.Now()
	for i := 0; ; i++ {
		query := newQuestion(fmt.Sprintf("back-%d.public.test", i), "A")
		answer, err := exchange(t.Context(), w.Client, "udp", netip.AddrPortFrom(anywhere[0], 53), query, 200*time.Millisecond)
		if err == nil && data(answer) == fromPublic4 {
			break
		}
		if time.Since(back) > 2*time.Second {
			t.Fatalf("there is no service %v after the server's return: %v, %v", time.Since(back), answer, err)
		}
		if err == nil { // it was quick to say no
			time.Sleep(20 * time.Millisecond)
		}
	}
	t.Logf("service is back after %v", time.Since(back))
	w.flood("after", questions/3, true)
	look("afterwards")
	if !within(5*time.Second, func() bool { return sockets(t, process) <= openAtStart+floodSockets }) {
		t.Errorf("the program has %d sockets open, and had %d at its start", sockets(t, process), openAtStart)
	}
	w.wantNothingPast()
	g.stop()
}

// flood asks for distinct names, from four clients as far as the gateway can tell.
// Either each question waits for the answer to the one before, or none does.
func (w *dnsWorld) flood(label string, questions int, wait bool) {
	w.t.Helper()
	var sockets sync.WaitGroup
	var lost atomic.Int64
	for s := range floodSockets {
		host, server := []*netns.NS{w.Client, w.Server}[s/2%2], anywhere[s%2]
		sockets.Go(func() {
			socket, err := host.Dial(w.t.Context(), "udp", netip.AddrPortFrom(server, 53).String())
			if err != nil {
				w.t.Error(err)
				return
			}
			defer socket.Close()
			for i := range questions / floodSockets {
				query := newQuestion(fmt.Sprintf("%s-%d-%d.public.test", label, s, i), "A")
				if !wait {
					if err := (&dns.Conn{Conn: socket}).WriteMsg(query); err != nil {
						w.t.Error(err)
						return
					}
					time.Sleep(time.Millisecond) // a pace that the gateway's receive buffer can take
					continue
				}
				socket.SetDeadline(time.Now().Add(questionLimit))
				if answer, err := converse(socket, query); err != nil || data(answer) != fromPublic4 {
					lost.Add(1)
				}
			}
		})
	}
	sockets.Wait()
	if lost.Load() > 0 {
		w.t.Errorf("%d of %d questions %q were not answered", lost.Load(), questions, label)
	}
}
