package routing

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Setting is a kernel parameter and its value. Key is its path below /proc/sys, such as net/ipv4/ip_forward.
type Setting struct{ Key, Value string }

// String returns the setting as sysctl(8) takes it.
func (s Setting) String() string {
	// Dots in the name of an interface stand where others have slashes (sysctl(8)).
	return strings.NewReplacer("/", ".", ".", "/").Replace(s.Key) + "=" + s.Value
}

// Parameters that make a router (Documentation/networking/ip-sysctl.rst of the kernel).
const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
)

// fellows are the parameters that the kernel changes together with one: those of all interfaces.
var fellows = map[string][]string{
	forward4: {"net/ipv4/conf/*/forwarding", "net/ipv4/conf/all/accept_redirects"},
	forward6: {"net/ipv6/conf/*/forwarding"},
}

// RouterSettings are the parameters of a router with clients on some interfaces: it forwards, it does not tell clients of
// shorter ways past it, and it goes on to learn its own default route by router advertisements if that is how it has it,
// which a host that forwards otherwise does not.
func RouterSettings(host Host, clients []string, ipv6 bool) ([]Setting, error) {
	var settings []Setting
	if ipv6 {
		advertised, err := advertisedLinks()
		if err != nil {
			return nil, err
		}
		for _, i := range host.Interfaces {
			if advertised[i.Index] {
				settings = append(settings, Setting{"net/ipv6/conf/" + i.Name + "/accept_ra", "2"})
			}
		}
		settings = append(settings, Setting{forward6, "1"})
	}
	settings = append(settings, Setting{forward4, "1"}, Setting{"net/ipv4/conf/all/send_redirects", "0"})
	for _, name := range clients {
		settings = append(settings, Setting{"net/ipv4/conf/" + name + "/send_redirects", "0"})
	}
	return settings, nil
}

// advertisedLinks are the interfaces of the default routes that came with router advertisements.
func advertisedLinks() (map[int]bool, error) {
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_RA}
	routes, err := complete(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(unix.AF_INET6, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST|netlink.RT_FILTER_PROTOCOL)
	})
	if err != nil && !unsupported(err) {
		return nil, fmt.Errorf("list default routes of router advertisements: %w", err)
	}
	indexes := map[int]bool{}
	for _, route := range routes {
		indexes[route.LinkIndex] = true
	}
	return indexes, nil
}

// Parameters are the kernel's parameters that were changed, with the values they had before. These are kept in a file as
// well, so that they come back after the process was killed.
type Parameters struct {
	root   string // /proc/sys
	file   string
	former []Setting // in the order in which they are to come back
}

// OpenParameters takes over what a killed process has left in the file, which need not be there.
func OpenParameters(file string) (*Parameters, error) { return openParameters("/proc/sys", file) }

func openParameters(root, file string) (*Parameters, error) {
	p := &Parameters{root: root, file: file}
	text, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return p, nil
	case err != nil:
		return nil, err
	}
	if err := json.Unmarshal(text, &p.former); err != nil {
		return nil, fmt.Errorf("%s: %w: it holds the kernel's parameters from before; correct or remove it", file, err)
	}
	for _, s := range p.former {
		if path.Clean(s.Key) != s.Key || !strings.HasPrefix(s.Key, "net/") {
			return nil, fmt.Errorf("%s: %q is no parameter of the network: correct or remove the file", file, s.Key)
		}
	}
	return p, nil
}

// Set gives parameters their values, those first that differ and were never changed taken note of. It may be called again
// with other settings. What it cannot do it tells, and goes on.
func (p *Parameters) Set(settings []Setting) error {
	var differ []Setting
	var failure error
	for _, s := range settings {
		switch value, err := p.read(s.Key); {
		case errors.Is(err, fs.ErrNotExist): // an interface that has just gone
		case err != nil:
			failure = errors.Join(failure, err)
		case value != s.Value:
			differ = append(differ, s)
		}
	}
	if len(differ) == 0 {
		return failure
	}
	for _, s := range differ {
		if err := p.remember(s.Key); err != nil {
			return errors.Join(failure, err)
		}
	}
	if err := p.store(); err != nil {
		return errors.Join(failure, err)
	}
	for _, s := range differ {
		failure = errors.Join(failure, p.write(s))
	}
	return failure
}

// remember takes note of a parameter's value, and of those that change with it.
func (p *Parameters) remember(key string) error {
	keys := []string{key}
	for _, pattern := range fellows[key] {
		found, err := filepath.Glob(filepath.Join(p.root, pattern))
		if err != nil {
			return err
		}
		for _, name := range found {
			keys = append(keys, strings.TrimPrefix(name, p.root+"/"))
		}
	}
	for _, key := range keys {
		if slices.ContainsFunc(p.former, func(s Setting) bool { return s.Key == key }) {
			continue
		}
		value, err := p.read(key)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		p.former = append(p.former, Setting{key, value})
	}
	return nil
}

// store writes the file, whole or not at all.
func (p *Parameters) store() error {
	text, err := json.Marshal(p.former)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.file), 0o755); err != nil {
		return err
	}
	fresh := p.file + ".new"
	if err := os.WriteFile(fresh, text, 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, p.file)
}

// Restore gives all parameters the values that they had, and removes the file. Interfaces may have gone meanwhile.
func (p *Parameters) Restore() error {
	// Those that take others along come first, so that the others come back behind them.
	former := slices.Clone(p.former)
	slices.SortStableFunc(former, func(a, b Setting) int { return cmp.Compare(rank(a.Key), rank(b.Key)) })
	var failure error
	for _, s := range former {
		value, err := p.read(s.Key)
		if errors.Is(err, fs.ErrNotExist) || err == nil && value == s.Value {
			continue
		}
		failure = errors.Join(failure, p.write(s))
	}
	if failure != nil {
		return failure
	}
	p.former = nil
	if err := os.Remove(p.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func rank(key string) int {
	if _, leads := fellows[key]; leads {
		return 0
	}
	return 1
}

func (p *Parameters) read(key string) (string, error) {
	value, err := os.ReadFile(filepath.Join(p.root, key))
	return strings.TrimSpace(string(value)), err
}

func (p *Parameters) write(s Setting) error {
	err := os.WriteFile(filepath.Join(p.root, s.Key), []byte(s.Value), 0)
	if err != nil {
		return fmt.Errorf("sysctl %s: %w", s, err)
	}
	return nil
}
