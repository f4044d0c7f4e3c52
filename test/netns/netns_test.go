package netns_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

func TestMain(m *testing.M) { os.Exit(netns.Main(m)) }

func newNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestHostsAreApartUntilConnected(t *testing.T) {
	a, b := newNS(t), newNS(t)
	listener, err := a.Listen("tcp", "127.0.0.1:80")
	must(t, err)
	defer listener.Close()

	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := b.Dial(ctx, "tcp", "127.0.0.1:80"); err == nil {
		t.Error("b reaches a's loopback")
	}
	conn, err := a.Dial(ctx, "tcp", "127.0.0.1:80")
	must(t, err)
	conn.Close()
}

func TestRouterBetweenTwoHosts(t *testing.T) {
	a, router, b := newNS(t), newNS(t), newNS(t)
	must(t,
		netns.Connect(a, "eth0", router, "a"), netns.Connect(b, "eth0", router, "b"),
		a.Addr("eth0", "192.0.2.2/24"), router.Addr("a", "192.0.2.1/24"),
		a.Addr("eth0", "2001:db8:1::2/64"), router.Addr("a", "2001:db8:1::1/64"),
		b.Addr("eth0", "198.51.100.2/24"), router.Addr("b", "198.51.100.1/24"),
		b.Addr("eth0", "2001:db8:2::2/64"), router.Addr("b", "2001:db8:2::1/64"),
		a.Route("0.0.0.0/0", "192.0.2.1"), a.Route("::/0", "2001:db8:1::1"),
		b.Route("192.0.2.0/24", "198.51.100.1"), b.Route("2001:db8:1::/64", "2001:db8:2::1"),
		router.Sysctl("net.ipv4.ip_forward", "1"), router.Sysctl("net.ipv6.conf.all.forwarding", "1"),
	)
	for _, address := range []string{"198.51.100.2:80", "[2001:db8:2::2]:81"} {
		listener, err := b.Listen("tcp", address)
		must(t, err)
		defer listener.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		conn, err := a.Dial(ctx, "tcp", address)
		if err != nil {
			t.Fatalf("%s: %v", address, err)
		}
		conn.Close()
	}
}

func TestBridgeJoinsHosts(t *testing.T) {
	a, b, lan := newNS(t), newNS(t), newNS(t)
	must(t,
		netns.Connect(a, "eth0", lan, "a"), netns.Connect(b, "eth0", lan, "b"), lan.Bridge("lan", "a", "b"),
		a.Addr("eth0", "192.0.2.1/24"), b.Addr("eth0", "192.0.2.2/24"),
	)
	listener, err := b.Listen("tcp", "192.0.2.2:80")
	must(t, err)
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	conn, err := a.Dial(ctx, "tcp", "192.0.2.2:80")
	must(t, err)
	conn.Close()
}

func TestStartedCommandIsInTheNamespace(t *testing.T) {
	ns := newNS(t)
	inside := new(strings.Builder)
	command := exec.Command("/proc/self/exe", "-test.run", "^TestPrintNamespace$")
	command.Env = append(os.Environ(), printNamespace+"=1")
	command.Stdout = inside
	must(t, ns.Start(command), command.Wait())
	var wanted string
	must(t, ns.Do(func() (err error) {
		wanted, err = os.Readlink("/proc/thread-self/ns/net")
		return err
	}))
	if !strings.Contains(inside.String(), wanted) {
		t.Errorf("the command printed %q, and the namespace is %s", inside, wanted)
	}
}

const printNamespace = "PRINT_NAMESPACE"

// TestPrintNamespace is the command that TestStartedCommandIsInTheNamespace starts.
func TestPrintNamespace(t *testing.T) {
	if os.Getenv(printNamespace) == "" {
		t.Skip("started by another test only")
	}
	link, err := os.Readlink("/proc/self/ns/net")
	must(t, err)
	fmt.Println(link)
}
