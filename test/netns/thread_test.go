package netns

import (
	"context"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDo holds that Do returns what f returns, and leaves no thread behind in
// the namespace.
func TestDo(t *testing.T) {
	ns := create(t)
	sentinel := errors.New("sentinel")
	if err := ns.Do(func() error { return sentinel }); err != sentinel {
		t.Errorf("Do returned %v", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error although f never returned")
	}
	home, inside := namespaceOf(t, "thread-self"), ""
	if err := ns.Do(func() error { inside = namespaceOf(t, "thread-self"); return nil }); err != nil {
		t.Fatal(err)
	}
	if inside == home {
		t.Error("f ran outside of the namespace")
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if name, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); err == nil && name == inside {
			t.Errorf("thread %s is left in the namespace", task.Name())
		}
	}
}

// TestSysctl holds that a namespace has parameters of its own, and that a new
// one forwards nothing even where the host does.
func TestSysctl(t *testing.T) {
	a, b := create(t), create(t)
	if err := a.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	for ns, want := range map[*NS]string{a: "1", b: "0"} {
		if got, err := ns.ReadSysctl("net.ipv4.ip_forward"); err != nil || got != want {
			t.Errorf("ip_forward = %q, %v, want %q", got, err, want)
		}
	}
	if err := a.Sysctl("net.ipv4.no_such_key", "1"); err == nil {
		t.Error("a parameter that does not exist was set")
	}
}

// TestLocal holds that a namespace answers for a whole prefix, both families.
func TestLocal(t *testing.T) {
	a, b := create(t), create(t)
	for _, err := range []error{
		Connect(a, "eth0", b, "eth0"),
		a.Addr("eth0", "192.0.2.2/24", "2001:db8:1::2/64"),
		b.Addr("eth0", "192.0.2.1/24", "2001:db8:1::1/64"),
		a.Route("0.0.0.0/0", "192.0.2.1"),
		a.Route("::/0", "2001:db8:1::1"),
		b.Local("203.0.113.0/24"),
		b.Local("2001:db8:f::/48"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	listener, err := b.Listen("tcp", "[::]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	for _, address := range []string{"203.0.113.77:80", "[2001:db8:f::77]:80"} {
		conn, err := a.Dial(ctx, "tcp", address)
		if err != nil {
			t.Error(err)
			continue
		}
		conn.Close()
	}
}

func TestErrorsNameTheObject(t *testing.T) {
	ns := create(t)
	for want, err := range map[string]error{
		"missing0":         ns.Up("missing0"),
		"missing1":         ns.Addr("missing1", "192.0.2.1/24"),
		"192.0.2.300/24":   ns.Addr("lo", "192.0.2.300/24"),
		"203.0.113.0/24":   ns.Route("203.0.113.0/24", "192.0.2.1"),
		"198.51.100.0/240": ns.Local("198.51.100.0/240"),
		"missing2":         ns.Bridge("br0", "missing2"),
		"localhost:1":      dialError(ns, "localhost:1"),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
	if _, err := ns.Listen("tcp", "localhost:1"); err == nil || errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("listening on a name: %v", err)
	}
}

func dialError(ns *NS, address string) error {
	_, err := ns.Dial(context.Background(), "tcp", address)
	return err
}

// namespaceOf names the network namespace of a process or thread in /proc.
func namespaceOf(t *testing.T, task string) string {
	t.Helper()
	name, err := os.Readlink("/proc/" + task + "/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func create(t *testing.T) *NS {
	t.Helper()
	ns, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}
