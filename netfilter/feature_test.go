package netfilter

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// faulty is the kernel with errors put between.
type faulty struct {
	kernel
	read   error
	change func([]operation) error
}

func (f faulty) holder(name string) (holder, error) {
	if f.read != nil {
		return nobody, f.read
	}
	return f.kernel.holder(name)
}

func (f faulty) commit(change []operation) error {
	if f.change != nil {
		if err := f.change(change); err != nil {
			return err
		}
	}
	return f.kernel.commit(change)
}

// openFaulty is Open on a faulty kernel.
func openFaulty(t *testing.T, f faulty) (*Handle, error) {
	t.Helper()
	real, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { real.close() })
	f.kernel = real
	return open(testConfig().Table, f)
}

// owner returns err for transactions that create an owned table.
func owner(err error) func([]operation) error {
	return func(change []operation) error {
		for _, o := range change {
			if o.table.owned {
				return err
			}
		}
		return nil
	}
}

func always(err error) func([]operation) error { return func([]operation) error { return err } }

func TestOpenErrors(t *testing.T) {
	const modules = "this kernel has no nf_tables for family inet: install its modules or build it with CONFIG_NF_TABLES and " +
		"CONFIG_NF_TABLES_INET (modprobe nf_tables): "
	for _, test := range []struct {
		name  string
		fault faulty
		want  string
	}{
		{"no capability", faulty{read: unix.EPERM}, "nftables: operation not permitted: run as root or with CAP_NET_ADMIN"},
		{"no nfnetlink", faulty{read: unix.EPROTONOSUPPORT}, modules + "protocol not supported"},
		{"no nf_tables", faulty{read: unix.EINVAL}, modules + "invalid argument"},
		{"no family inet", faulty{change: always(unix.EAFNOSUPPORT)}, modules + "address family not supported by protocol"},
		{"no family inet, later", faulty{change: always(unix.EOPNOTSUPP)}, modules + "operation not supported"},
		{
			"outrun by an instance",
			faulty{change: always(unix.EPERM)},
			"another instance runs in this network namespace (it holds nft table transproxy): stop it first",
		},
		{
			"outrun by a stranger",
			faulty{change: always(unix.EEXIST)},
			"nft table inet transproxy exists and is not ours: choose another with --nft-table, or delete it",
		},
		{"no memory", faulty{change: always(unix.ENOMEM)}, "create nft table inet transproxy: cannot allocate memory"},
	} {
		t.Run(test.name, func(t *testing.T) {
			within(t, func() {
				if _, err := openFaulty(t, test.fault); err == nil || err.Error() != test.want {
					t.Errorf("got %v\nwant %s", err, test.want)
				}
				wantTables(t)
				// Nothing of the failed attempt is in the way of the next.
				mustOpen(t)
			})
		})
	}
}

func TestNoOwnerFlag(t *testing.T) {
	for _, errno := range []error{unix.EOPNOTSUPP, unix.EINVAL} {
		t.Run(errno.Error(), func(t *testing.T) {
			within(t, func() {
				old := faulty{change: owner(errno)}
				h, err := openFaulty(t, old)
				if err != nil {
					t.Fatal(err)
				}
				if h.Owned() {
					t.Error("the table has an owner")
				}
				mustApply(t, h, testConfig())
				wantIntact(t, h, testConfig())

				_, err = openFaulty(t, old)
				wantInUse(t, err)
				wantInUse(t, CleanUp("transproxy"))
				wantIntact(t, h, testConfig())

				kill(t, h, true)
				wantTables(t, "transproxy", "transproxy_guard")
				if h, err = openFaulty(t, old); err != nil {
					t.Fatal(err)
				}
				if rules, err := h.kernel.intact(captureTable(pointer(testConfig()))); rules || err != nil {
					t.Errorf("the leftover was kept: %v", err)
				}
				wantTables(t, "transproxy", "transproxy_guard")

				kill(t, h, true)
				if err := CleanUp("transproxy"); err != nil {
					t.Fatal(err)
				}
				wantTables(t)

				if h, err = openFaulty(t, old); err != nil {
					t.Fatal(err)
				}
				if err := h.Close(); err != nil {
					t.Fatal(err)
				}
				wantTables(t)
			})
		})
	}
}

func pointer(c Config) *Config { return &c }

func TestMissingFeature(t *testing.T) {
	for _, test := range []struct {
		expression string
		want       string
		is         func(expr.Any) bool
	}{
		{"tproxy", "CONFIG_NFT_TPROXY (modprobe nft_tproxy)", isA[*expr.TProxy]},
		{"socket", "CONFIG_NFT_SOCKET (modprobe nft_socket)", isA[*expr.Socket]},
		{"fib", "CONFIG_NFT_FIB_INET (modprobe nft_fib_inet)", isA[*expr.Fib]},
		{"ct", "CONFIG_NFT_CT (modprobe nft_ct)", isA[*expr.Ct]},
		{"reject", "CONFIG_NFT_REJECT (modprobe nft_reject_inet)", isA[*expr.Reject]},
	} {
		t.Run(test.expression, func(t *testing.T) {
			within(t, func() {
				h, err := openFaulty(t, faulty{change: func(change []operation) error {
					if contains(change, test.is) {
						return fmt.Errorf("receive: %w", unix.ENOENT)
					}
					return nil
				}})
				if err != nil {
					t.Fatal(err)
				}
				c := testConfig()
				c.FailClosed = true
				err = h.Apply(c)
				if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), test.expression+" expression") ||
					!strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want it to name %s", err, test.want)
				}
				wantTables(t, "transproxy")
			})
		})
	}
}

func isA[T expr.Any](e expr.Any) bool { _, ok := e.(T); return ok }

// contains reports whether the change has such an expression.
func contains(change []operation, is func(expr.Any) bool) bool {
	for _, o := range change {
		for _, c := range o.table.chains {
			for _, r := range c.rules {
				for _, part := range r.clauses {
					for _, e := range part.expressions {
						if is(e) {
							return true
						}
					}
				}
			}
		}
	}
	return false
}

// TestFeaturesOfThisKernel runs the probes where all features are.
func TestFeaturesOfThisKernel(t *testing.T) {
	within(t, func() {
		h := mustOpen(t)
		if f, ok := h.missing(); ok {
			t.Errorf("%s is missing", f.expression)
		}
		for _, f := range features() {
			probe := table{name: "probe", sets: captureSets(&Config{}), chains: []chain{
				{name: "probe", rules: []rule{{f.expression, []clause{f.probe}}}},
			}}
			if err := h.kernel.commit([]operation{{verb: create, table: probe}, {verb: drop, table: probe}}); err != nil {
				t.Errorf("the probe of %s: %v", f.expression, err)
			}
		}
		wantTables(t, "transproxy")
	})
}

func TestApplyErrors(t *testing.T) {
	for _, test := range []struct {
		errno unix.Errno
		want  string
	}{
		{unix.EMSGSIZE, "raise net.core.wmem_max"},
		{unix.EPERM, "needs CAP_NET_ADMIN"},
		{unix.ENOBUFS, "install nft table inet transproxy: no buffer space available"},
	} {
		within(t, func() {
			faults := false
			h, err := openFaulty(t, faulty{change: func([]operation) error {
				if faults {
					return test.errno
				}
				return nil
			}})
			if err != nil {
				t.Fatal(err)
			}
			mustApply(t, h, testConfig())
			faults = true
			c := testConfig()
			c.Bypass = nil
			if err := h.Apply(c); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want it to say %s", err, test.want)
			}
			wantIntact(t, h, testConfig())
		})
	}
}
