package netns

import (
	"os"
	"path/filepath"
	"strings"
)

// Sysctl sets a kernel parameter of the namespace, such as net.ipv4.ip_forward.
// Where an interface's name has dots, write the key with slashes, as for
// sysctl(8): net/ipv4/conf/eth0.5/rp_filter.
func (ns *NS) Sysctl(key, value string) error {
	return ns.Do(func() error { return os.WriteFile(sysctlFile(key), []byte(value), 0) })
}

// ReadSysctl returns a kernel parameter of the namespace, without the line's end.
func (ns *NS) ReadSysctl(key string) (string, error) {
	var value []byte
	err := ns.Do(func() (err error) {
		value, err = os.ReadFile(sysctlFile(key))
		return err
	})
	return strings.TrimSpace(string(value)), err
}

// sysctlFile is the file that holds a kernel parameter. /proc/sys/net shows
// each thread its own namespace.
func sysctlFile(key string) string {
	if !strings.Contains(key, "/") {
		key = strings.ReplaceAll(key, ".", "/")
	}
	return filepath.Join("/proc/sys", key)
}
