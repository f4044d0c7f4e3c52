package netfilter

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// InUseError says that another instance lives in the network namespace.
type InUseError struct {
	// Table is the name of the table that it holds.
	Table string
}

// Error names the table and the remedy.
func (e *InUseError) Error() string {
	return fmt.Sprintf("another instance runs in this network namespace (it holds nft table %s): stop it first", e.Table)
}

// notOurs says that some other program's table has the name.
func notOurs(table string) error {
	return fmt.Errorf("nft table inet %s exists and is not ours: choose another with --nft-table, or delete it", table)
}

// errClosed is a mistake of the caller's.
var errClosed = errors.New("nft table is closed")

// lock stands in for the owner flag where the kernel does not know it. An abstract socket has no file that could be left
// behind, and is one for each network namespace, as tables are (unix(7)). Where there is the flag, the lock is not taken for
// long: anybody can bind the address.
func lock(table string) (net.Listener, error) {
	listener, err := net.Listen("unix", "@transproxy-tproxy/nft")
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, &InUseError{Table: table}
	}
	if err != nil {
		return nil, fmt.Errorf("lock nftables against other instances: %w", err)
	}
	return listener, nil
}
