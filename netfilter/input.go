package netfilter

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

const inputChain = "input"

func inputHook() *hook {
	return &hook{
		text:   "type filter hook input priority mangle",
		number: nftables.ChainHookInput, priority: nftables.ChainPriorityMangle,
	}
}

// input looks at what was captured once more, where it is delivered: only a transparent socket may have it. On its way the kernel
// forgets the listener of a frame (Config.Steered), and who assigns listeners may just have gone, or not have come yet. Then
// another service of this host that has the port would answer, over IPv6 (over IPv4 the kernel does not let it answer from
// an address that is not its own). Such packets are dropped, not refused: they are sent again, to the next engine.
func (c *Config) input() chain {
	rules := []rule{{"only what begins a flow", []clause{notOpening(), leave()}}}
	marks := []uint32{c.LAN}
	if c.Output.captured() {
		marks = append(marks, c.Output.Mark)
	}
	for _, mark := range marks {
		is := marked(mark, c.Mask)
		rules = append(rules,
			rule{"captured, and a transparent socket has it", []clause{is, ofTransparentSocket(), leave()}},
			rule{"captured, and none has it: no other service may", []clause{is, tcp(), discard()}})
		if c.DNS.UDP || c.capturesUDP() {
			rules = append(rules, rule{"captured, and none has it: no other service may", []clause{is, udp(), discard()}})
		}
	}
	if c.Steered {
		// Who assigns learns of a new address of this host after the kernel.
		for _, port := range c.listenPorts() {
			rules = append(rules, rule{"to a listener itself", []clause{tcpPort(port), leave()}})
		}
		rules = append(rules, rule{
			"not captured, but a listener has it: to an address that has just become this host's own",
			[]clause{tcp(), ofTransparentSocket(), ofSocketMarked(c.Exempt, c.Mask), discard()},
		})
	}
	return chain{name: inputChain, hook: inputHook(), rules: rules}
}

// listenPorts are those of all transparent listeners, each once.
func (c *Config) listenPorts() []uint16 {
	var ports []uint16
	for _, listener := range slices.Concat(c.Listen, c.DNS.Listen) {
		ports = append(ports, listener.Port())
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// ofSocketMarked matches packets for which this host has a socket with such a mark (SO_MARK of socket(7)).
func ofSocketMarked(mark, mask uint32) clause {
	return clause{fmt.Sprintf("socket mark & %#08x == %#08x", mask, mark), []expr.Any{
		&expr.Socket{Key: expr.SocketKeyMark, Register: register}, masked(native(mask), native(0)), equal(native(mark)),
	}}
}
