// Package sklookup assigns packets that are marked and delivered to this host to transparent sockets where nftables' tproxy
// statement cannot: with net.bridge.bridge-nf-call-iptables the rules see a packet of a bridge while it is a frame still, and the
// kernel takes away the socket that tproxy gave it when it becomes a packet.
//
// A BPF program of type sk_lookup (Documentation/bpf/prog_sk_lookup.rst of the kernel) runs when the kernel looks for the
// socket of a packet that belongs to no connection. It sees no mark. So it decides by what else tells a captured packet from one
// for a service of this host: it came in on a capturing interface, and its destination is none of this host's own addresses.
//
// The program is written in package asm of cilium/ebpf, which no other package imports; nothing is compiled when the gateway is
// built or run. It is attached by a link that is not pinned: when the process ends, however that happens, the kernel removes link,
// program and maps.
package sklookup

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Bounds of the maps. Each is far above what a host has, and small in memory, since entries are allocated when they are there.
const (
	maxInterfaces = 4096
	maxOwn        = 1 << 16
)

// Handle is the program in one network namespace. Its methods must not be called concurrently.
type Handle struct {
	maps     maps
	program  *ebpf.Program
	attached link.Link

	interfaces map[uint32]struct{}
	own        map[netip.Prefix]struct{}
}

// Open loads the program, tries it, and attaches it to the network namespace of the calling thread. It leaves every packet alone until Set names
// interfaces; from then on it refuses what Assign has no socket for. The caller closes the handle.
//
// It needs CAP_BPF and CAP_NET_ADMIN in the initial user namespace, and Linux 5.9.
func Open() (h *Handle, err error) {
	if err := rlimit.RemoveMemlock(); err != nil { // before Linux 5.11 maps count as locked memory
		return nil, explain("allow memory for BPF maps", err)
	}
	h = &Handle{interfaces: make(map[uint32]struct{}), own: make(map[netip.Prefix]struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
			h = nil
		}
	}()
	if h.maps, err = newMaps(); err != nil {
		return h, explain("create BPF maps", err)
	}
	h.program, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "transproxy", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup,
		Instructions: instructions(h.maps), License: "MIT",
	})
	if err != nil {
		return h, explain("load the sk_lookup program", err)
	}
	if err = h.test(); err != nil {
		return h, err
	}
	namespace, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return h, fmt.Errorf("open the network namespace: %w", err)
	}
	defer namespace.Close()
	if h.attached, err = link.AttachNetNs(int(namespace.Fd()), h.program); err != nil {
		return h, explain("attach the sk_lookup program", err)
	}
	return h, nil
}

// explain adds to an error of the kernel's what an administrator can do about it.
func explain(action string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w: it needs root, or CAP_BPF and CAP_NET_ADMIN, outside of any user namespace", action, err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s: %w: it needs Linux 5.9 with CONFIG_BPF_SYSCALL", action, err)
	}
	return fmt.Errorf("%s: %w", action, err)
}

// maps are what the program looks things up in. Two of them are keyed by what is in a packet's lookup, the third by slot.
type maps struct {
	interfaces *ebpf.Map // index of the incoming interface → anything
	own        *ebpf.Map // longest prefix of the destination → anything
	sockets    *ebpf.Map // slot → socket
}

func newMaps() (m maps, err error) {
	for _, spec := range []struct {
		to   **ebpf.Map
		spec ebpf.MapSpec
	}{
		{&m.interfaces, ebpf.MapSpec{Name: "interfaces", Type: ebpf.Hash, KeySize: 4, ValueSize: 1, MaxEntries: maxInterfaces, Flags: unix.BPF_F_NO_PREALLOC}},
		{&m.own, ebpf.MapSpec{Name: "own", Type: ebpf.LPMTrie, KeySize: keySize, ValueSize: 1, MaxEntries: maxOwn, Flags: unix.BPF_F_NO_PREALLOC}},
		{&m.sockets, ebpf.MapSpec{Name: "sockets", Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: slots}},
	} {
		if *spec.to, err = ebpf.NewMap(&spec.spec); err != nil {
			return m, errors.Join(err, m.close())
		}
	}
	return m, nil
}

func (m maps) close() (err error) {
	for _, each := range []*ebpf.Map{m.interfaces, m.own, m.sockets} {
		if each != nil {
			err = errors.Join(err, each.Close())
		}
	}
	return err
}

// Set replaces the indexes of the interfaces whose packets are assigned, and the destinations that are left alone: this
// host's own addresses, those of broadcasts and of multicast. Where both change, an address is known before the interface is.
func (h *Handle) Set(interfaces []int, own []netip.Prefix) error {
	if len(interfaces) > maxInterfaces || len(own) > maxOwn {
		return fmt.Errorf("%d interfaces and %d own prefixes are more than the %d and %d that the sk_lookup program knows",
			len(interfaces), len(own), maxInterfaces, maxOwn)
	}
	wanted := make(map[uint32]struct{}, len(interfaces))
	for _, index := range interfaces {
		wanted[uint32(index)] = struct{}{}
	}
	prefixes := make(map[netip.Prefix]struct{}, len(own))
	for _, prefix := range own {
		prefixes[prefix.Masked()] = struct{}{}
	}
	err := update(h.maps.own, h.own, prefixes, key)
	if err == nil {
		err = update(h.maps.interfaces, h.interfaces, wanted, func(index uint32) any { return index })
	}
	if err != nil {
		return fmt.Errorf("tell the sk_lookup program of interfaces and addresses: %w", err)
	}
	return nil
}

// update makes a map's entries those that are wanted; known are those that it has, and is kept so.
func update[K comparable](m *ebpf.Map, known, wanted map[K]struct{}, key func(K) any) error {
	for entry := range wanted {
		if _, has := known[entry]; has {
			continue
		}
		if err := m.Update(key(entry), uint8(1), ebpf.UpdateAny); err != nil {
			return err
		}
		known[entry] = struct{}{}
	}
	for entry := range known {
		if _, stays := wanted[entry]; stays {
			continue
		}
		if err := m.Delete(key(entry)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		delete(known, entry)
	}
	return nil
}

// Assign has packets assigned to a socket: a listening one for TCP, an unconnected one for UDP, of one family, with
// IP_TRANSPARENT or IPV6_TRANSPARENT; with dns those to port 53, else all others (and over TCP those to port 53 as well, if
// there is no socket for them). Of sockets that share a port (SO_REUSEPORT) one is enough: the kernel spreads among all. The socket
// stays the caller's; when it is closed its entry goes.
func (h *Handle) Assign(socket int, dns bool) error {
	domain, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return fmt.Errorf("look at a socket: %w", err)
	}
	kind, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("look at a socket: %w", err)
	}
	slot := slotOf(domain == unix.AF_INET6, kind == unix.SOCK_DGRAM, dns)
	if err := h.maps.sockets.Update(slot, uint64(socket), ebpf.UpdateAny); err != nil {
		return fmt.Errorf("give the sk_lookup program a socket: %w", err)
	}
	return nil
}

// Refuse forgets all sockets of Assign: what begins now is refused.
func (h *Handle) Refuse() error {
	for slot := range uint32(slots) {
		if err := h.maps.sockets.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("take a socket from the sk_lookup program: %w", err)
		}
	}
	return nil
}

// Close detaches the program.
func (h *Handle) Close() (err error) {
	if h.attached != nil {
		err = h.attached.Close()
	}
	if h.program != nil {
		err = errors.Join(err, h.program.Close())
	}
	if err = errors.Join(err, h.maps.close()); err != nil {
		return fmt.Errorf("detach the sk_lookup program: %w", err)
	}
	return nil
}
