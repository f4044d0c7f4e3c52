package netfilter

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// feature is a part of nf_tables that a kernel can be built without.
type feature struct {
	expression, option, module string
	probe                      clause // needs no other feature
}

// features are those that our rules need; options as in the kernel's net/netfilter/Kconfig.
func features() []feature {
	ipv4 := families()[0]
	return []feature{
		{"tproxy", "CONFIG_NFT_TPROXY", "nft_tproxy", ipv4.deliver(netip.MustParseAddrPort("127.0.0.1:1"))},
		{"socket", "CONFIG_NFT_SOCKET", "nft_socket", ofTransparentSocket()},
		{"fib", "CONFIG_NFT_FIB_INET", "nft_fib_inet", destinationKindIn(kindsSet)},
		{"ct", "CONFIG_NFT_CT", "nft_ct", reply()},
		{"reject", "CONFIG_NFT_REJECT", "nft_reject_inet", refuse()},
	}
}

// probeSuffix makes the name of a table, that nobody ever sees, of the table's.
const probeSuffix = "_probe"

// missing returns the first feature that the kernel lacks. It tries each in a table that is gone at the end of the same
// transaction.
func (h *Handle) missing() (feature, bool) {
	for _, f := range features() {
		probe := table{name: h.name + probeSuffix, sets: captureSets(&Config{}), chains: []chain{
			{name: interceptChain, rules: []rule{{f.expression, []clause{f.probe}}}},
		}}
		err := h.kernel.commit([]operation{{verb: create, table: probe}, {verb: drop, table: probe}})
		if errors.Is(err, unix.ENOENT) {
			return f, true
		}
	}
	return feature{}, false
}

// explain says why rules could not be installed.
func (h *Handle) explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		if f, ok := h.missing(); ok {
			return fmt.Errorf("nft rules need the kernel's %s expression: install its modules or build it with %s (modprobe %s): %w",
				f.expression, f.option, f.module, err)
		}
	case errors.Is(err, unix.EMSGSIZE):
		return fmt.Errorf("rules and prefixes of nft table inet %s exceed the netlink send buffer: raise net.core.wmem_max, "+
			"or give shorter prefixes in place of many: %w", h.name, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("install nft table inet %s: %w (needs CAP_NET_ADMIN)", h.name, err)
	}
	return fmt.Errorf("install nft table inet %s: %w", h.name, err)
}

// unavailable says why nf_tables cannot be used at all.
func unavailable(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("nftables: %w: run as root or with CAP_NET_ADMIN", err)
	case isUnavailable(err):
		return fmt.Errorf("this kernel has no nf_tables for family inet: install its modules or build it with CONFIG_NF_TABLES and "+
			"CONFIG_NF_TABLES_INET (modprobe nf_tables): %w", err)
	}
	return fmt.Errorf("read nftables: %w", err)
}

// isUnavailable reports whether err is what kernels say without nfnetlink, the subsystem nf_tables, or its family inet.
func isUnavailable(err error) bool {
	for _, errno := range []unix.Errno{
		unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.EOPNOTSUPP, unix.EINVAL, unix.ENOENT, unix.ENOSYS,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
