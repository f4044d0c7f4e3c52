package fakeip

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// roleVariable, in the environment of this test program, makes it another program;
// storeVariable is its store.
const (
	roleVariable  = "FAKEIP_TEST_ROLE"
	storeVariable = "FAKEIP_TEST_STORE"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "churn":
		churn()
	case "full":
		os.Exit(fullDisk())
	}
	os.Exit(m.Run())
}

// churned is how many names the program that is killed has; fewer than it asks for.
const churned = 20

// churn looks up names without end and says what their addresses are.
func churn() {
	p, err := Open(Config{IPv4: ipv4, IPv6: ipv6, Max: churned, Store: os.Getenv(storeVariable)})
	for i := 0; err == nil; i++ {
		name := fmt.Sprintf("%d-%d.test", os.Getpid(), i)
		var address netip.Addr
		if address, _, err = p.Lookup(name); err == nil {
			_, err = fmt.Println(name, address)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestKilledProcessForgetsNoAddressThatItGave(t *testing.T) {
	config := stored(t, goodHeader)
	config.Max = churned
	ranges, err := newRanges(ipv4, ipv6)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 8 {
		command := exec.Command("/proc/self/exe")
		command.Env = append(os.Environ(), roleVariable+"=churn", storeVariable+"="+config.Store)
		command.Stderr = os.Stderr
		output, err := command.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		var given []entry // as the program said, the oldest first
		said := func(line string) {
			name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
			address, err := netip.ParseAddr(text)
			offset, ok := ranges.offset(address)
			if err != nil || !ok {
				t.Errorf("the program said %q", line)
			}
			given = append(given, entry{name, offset})
		}
		lines := bufio.NewReader(output)
		for range 700 * (round + 1) { // the store is written anew at about 1,100
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			said(line)
		}
		if err := command.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				break // with or without a part of a line, which nobody was told
			}
			said(line)
		}
		command.Wait() // signal: killed

		p, err := Open(config)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Notes()) > 0 {
			t.Error(p.Notes())
		}
		wantWhole(t, p)
		// One more may be in the store that the program had no time to tell of.
		for i, e := range given[len(given)-churned+1:] {
			if at, ok := p.table.byName[e.name]; !ok || p.table.places[at].offset != e.offset {
				t.Errorf("round %d: name %d of the last ones, %v, is forgotten", round, i, e)
			}
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
