package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/netfilter"
)

// outputSettings is what is asked for about this host's own programs.
type outputSettings struct {
	on            bool
	users, groups []uint32 // left alone, as is what runs in the control groups
	cgroups       []netfilter.Cgroup
}

// outputOptions are the flags about this host's own programs.
func outputOptions() []option {
	return []option{
		{
			groupCapture, "output", "", "", "capture what this host's own programs send as well",
			setSwitch(func(s *settings, on bool) { s.output.on = on }),
		},
		{
			groupCapture, "output-exclude-user", "USER,...", "", "but not what these users' programs do: names or numbers",
			func(s *settings, v string) (err error) {
				s.output.users, err = parseOwners(v, "user", func(name string) (string, error) {
					account, err := user.Lookup(name)
					if err != nil {
						return "", err
					}
					return account.Uid, nil
				})
				return err
			},
		},
		{
			groupCapture, "output-exclude-group", "GROUP,...", "", "nor those of these groups",
			func(s *settings, v string) (err error) {
				s.output.groups, err = parseOwners(v, "group", func(name string) (string, error) {
					group, err := user.LookupGroup(name)
					if err != nil {
						return "", err
					}
					return group.Gid, nil
				})
				return err
			},
		},
		{
			groupCapture, "output-exclude-cgroup", "PATH,...", "", "nor what runs in these control groups (system.slice/dnsmasq.service)",
			func(s *settings, v string) (err error) {
				s.output.cgroups, err = parseCgroups(v, cgroupRoot)
				return err
			},
		},
	}
}

// parseOwners reads names and numbers; find turns a name into a number.
func parseOwners(value, what string, find func(name string) (string, error)) (owners []uint32, err error) {
	for _, text := range splitList(value) {
		number, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			found, lookupErr := find(text)
			if lookupErr != nil {
				return nil, fmt.Errorf("%q is no %s of this host: give its name or number", text, what)
			}
			if number, err = strconv.ParseUint(found, 10, 32); err != nil {
				return nil, fmt.Errorf("%q has no number but %q", text, found)
			}
		}
		owners = append(owners, uint32(number))
	}
	return owners, nil
}

// cgroupRoot is where the control groups of version 2 are, by systemd's custom and the kernel's documentation.
const cgroupRoot = "/sys/fs/cgroup"

// parseCgroups reads paths of control groups, below the root of their hierarchy.
func parseCgroups(value, root string) (groups []netfilter.Cgroup, err error) {
	for _, text := range splitList(value) {
		path := strings.Trim(filepath.Clean("/"+strings.TrimPrefix(text, root)), "/")
		if path == "" {
			return nil, fmt.Errorf("%q is all of this host: leave out --output instead", text)
		}
		var stat unix.Stat_t
		if err := unix.Stat(filepath.Join(root, path), &stat); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("there is no control group %s below %s: see systemd-cgls", path, root)
			}
			return nil, fmt.Errorf("control group %s: %w", path, err)
		}
		groups = append(groups, netfilter.Cgroup{Path: path, ID: stat.Ino})
	}
	return groups, nil
}
