package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// loadVariable names, in the environment, for how many seconds each load of TestUDPLoad runs.
const loadVariable = "TRANSPROXY_TEST_UDP_LOAD"

// TestUDPLoad prints what a relayed datagram costs the gateway: clients have datagrams of
// 1,200 bytes echoed by the origin, a few of them under way at any time.
func TestUDPLoad(t *testing.T) {
	seconds, err := strconv.Atoi(os.Getenv(loadVariable))
	if err != nil {
		t.Skipf("it measures, and takes a while: set %s to seconds", loadVariable)
	}
	const size, window = 1200, 8
	for _, clients := range []int{1, 10, 100, 1000} {
		t.Run(fmt.Sprintf("%d clients", clients), func(t *testing.T) {
			w := newUDPWorld(t, 443)
			g := w.gateway()
			g.waitFor(carriesUDP)
			before := memory(t, g.command.Process)
			var running sync.WaitGroup
			var mutex sync.Mutex
			echoes := 0
			began, end := time.Now(), time.Now().Add(time.Duration(seconds)*time.Second)
			cpu := processorTime(t, g)
			for range clients {
				conn, err := w.Client.Dial(t.Context(), "udp", netip.AddrPortFrom(lab.Origin4, 443).String())
				must(t, err)
				running.Go(func() {
					defer conn.Close()
					n := keepEchoingUDP(conn, size, max(1, window*10/clients), end)
					mutex.Lock()
					echoes += n
					mutex.Unlock()
				})
			}
			running.Wait()
			took, used := time.Since(began), processorTime(t, g)-cpu
			t.Logf("%d datagrams a second, %.1f µs of the gateway's processor time each, %.0f %% of one; %d KiB more memory",
				int(2*float64(echoes)/took.Seconds()), used.Seconds()*1e6/float64(2*echoes), 100*used.Seconds()/took.Seconds(), (memory(t, g.command.Process)-before)>>10)
			g.stop()
		})
	}
}

// keepEchoingUDP keeps so many datagrams under way, and says how many came back.
func keepEchoingUDP(conn net.Conn, size, window int, end time.Time) (echoes int) {
	buffer := make([]byte, size)
	for time.Now().Before(end) {
		for range window {
			conn.Write(buffer)
		}
		for range window {
			conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := conn.Read(buffer); err != nil {
				break
			}
			echoes++
		}
	}
	return echoes
}

// processorTime is what the gateway has used (proc(5): utime and stime, in hundredths of a
// second).
func processorTime(t *testing.T, g *gateway) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", g.command.Process.Pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	must(t, err1, err2)
	return time.Duration(user+system) * 10 * time.Millisecond
}
