//go:build interop

package interop

import (
	"bufio"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

// traceSplice attaches strace to a process.
func traceSplice(pid int, file string) *exec.Cmd {
	return exec.Command("strace", "-f", "-qq", "-e", "trace=splice", "-o", file, "-p", strconv.Itoa(pid))
}

// splicedBytes is how many bytes splice(2) has moved from socket to socket,
// according to a trace: each byte is spliced into a pipe and out of it.
func splicedBytes(file string) (total int64, err error) {
	trace, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer trace.Close()
	lines := bufio.NewScanner(trace)
	for lines.Scan() {
		// 4711 splice(7, NULL, 9, NULL, 65536, SPLICE_F_NONBLOCK) = 65536
		if _, result, found := strings.Cut(lines.Text(), ") = "); found {
			if n, err := strconv.ParseInt(strings.TrimSpace(result), 10, 64); err == nil && n > 0 {
				total += n
			}
		}
	}
	return total / 2, lines.Err()
}

func dial(t *testing.T, w *world, address netip.Addr, port uint16) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := w.Client.Dial(ctx, "tcp", netip.AddrPortFrom(address, port).String())
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(2*time.Minute)))
	return conn.(*net.TCPConn)
}
