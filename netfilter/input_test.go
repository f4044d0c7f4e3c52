package netfilter

import (
	"net"
	"testing"
	"time"
)

// TestOnlyListenersHaveWhatIsCaptured has nobody assign what is captured, as when the kernel forgets a listener: it is lost, and
// no service of the gateway that has the same port gets it.
func TestOnlyListenersHaveWhatIsCaptured(t *testing.T) {
	l := newLab(t)
	var resolver net.PacketConn
	if err := l.gateway.Do(func() (err error) {
		resolver, err = net.ListenPacket("udp", "[::]:53")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer resolver.Close()
	c := dnsConfig()
	c.Steered = true
	h := l.open()
	mustApply(t, h, c)

	// What is for the gateway itself, and what is not captured.
	l.want(l.client, "[fd02::1]:80", "gateway")
	l.want(l.client, "10.2.0.1:80", "gateway")
	l.want(l.client, "[2001:db8:51::7]:80", "origin")

	asked := make(chan string, 1)
	go func() {
		buffer := make([]byte, 512)
		n, from, err := resolver.ReadFrom(buffer)
		if err == nil {
			asked <- from.String() + ": " + string(buffer[:n])
		}
	}()
	for _, server := range []string{"192.0.2.2:53", "[2001:db8::2]:53"} {
		query, err := l.client.Dial(t.Context(), "udp", server)
		if err != nil {
			t.Fatal(err)
		}
		defer query.Close()
		if _, err := query.Write([]byte("a query")); err != nil {
			t.Fatal(err)
		}
	}
	if _, got := l.dial(l.client, "[2001:db8::2]:80"); got == "gateway" || got == "origin" || got == "refused" {
		t.Errorf("a captured flow was answered: %s", got)
	}
	select {
	case query := <-asked:
		t.Errorf("the gateway's resolver was asked by %s", query)
	case <-time.After(50 * time.Millisecond):
	}
}
