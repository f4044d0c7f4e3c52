package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
)

func TestUDP(t *testing.T) {
	for _, row := range []struct{ upstream, value, want string }{
		{"http", "", "refused [443] dropped [] captured []"},
		{"http", "443=direct", "refused [] dropped [] captured []"},
		{"http", "443=drop,8000-8002=reject", "refused [8000-8002] dropped [443] captured []"},
		{"http", "other=drop,123=direct", "refused [443] dropped [1-52 54-122 124-442 444-65535] captured []"},
		{"http", "other=reject,53=drop,443=direct", "refused [1-52 54-442 444-65535] dropped [53] captured []"},
		{"http", "1-65535=direct,123=drop,123=reject", "refused [123] dropped [] captured []"},
		{"socks5", "", "refused [] dropped [] captured [443]"},
		{"socks5", "443=reject,123=upstream", "refused [443] dropped [] captured [123]"},
		{"socks5", "other=upstream,123=direct", "refused [] dropped [] captured [443 1-52 54-122 124-442 444-65535]"},
		{"socks5", "53=upstream", "refused [] dropped [] captured [443 53]"},
	} {
		var s settings
		if err := setUDP(&s, row.value); err != nil {
			t.Errorf("%q: %v", row.value, err)
		}
		proxy, err := upstream.Parse(row.upstream + "://proxy")
		if err != nil {
			t.Fatal(err)
		}
		s.upstream = upstream.NewGroup(upstream.First, proxy)
		if err := s.validateUDP(); err != nil {
			t.Errorf("%q: %v", row.value, err)
		}
		refused, dropped, captured := s.udpPorts()
		if got := fmt.Sprint("refused ", refused, " dropped ", dropped, " captured ", captured); got != row.want {
			t.Errorf("%q with %s: %s and not %s", row.value, row.upstream, got, row.want)
		}
	}
	for _, value := range []string{"443", "443=refuse", "x=drop", "70000=drop", "=drop"} {
		if err := setUDP(new(settings), value); err == nil {
			t.Errorf("%q is taken", value)
		}
	}
}

func TestWithout(t *testing.T) {
	ranges := []netfilter.PortRange{{First: 1, Last: 9}, {First: 20, Last: 20}, {First: 30, Last: 31}}
	for port, want := range map[uint16]string{5: "[1-4 6-9 20 30-31]", 1: "[2-9 20 30-31]", 9: "[1-8 20 30-31]", 20: "[1-9 30-31]", 25: "[1-9 20 30-31]", 31: "[1-9 20 30]"} {
		if got := fmt.Sprint(without(ranges, port)); got != want {
			t.Errorf("without %d: %s and not %s", port, got, want)
		}
	}
}

func TestUDPWithoutSOCKS(t *testing.T) {
	var s settings
	if err := setUDP(&s, "8000-8100=upstream"); err != nil {
		t.Fatal(err)
	}
	if err := s.validateUDP(); err == nil || !strings.Contains(err.Error(), "--udp 8000-8100=upstream: only a SOCKS5 proxy carries UDP") {
		t.Error(err)
	}
}
