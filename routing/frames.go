package routing

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// markFrames sets Frames of the interfaces that links are.
func markFrames(interfaces []Interface, links []netlink.Link) error {
	present, all, err := bridgesFiltered()
	if err != nil || !present {
		return err
	}
	bridges := make(map[int]bool) // whether packets of a bridge, by its index, pass the hooks as frames
	parents := make(map[int]int)
	some := false
	for _, link := range links {
		attrs := link.Attrs()
		parents[attrs.Index] = attrs.ParentIndex
		if _, ok := link.(*netlink.Bridge); ok {
			bridges[attrs.Index], some = all, true
		}
	}
	if some && !all {
		err := eachFiltered(func(index int) {
			if _, is := bridges[index]; is { // the numbers mean other things of other kinds
				bridges[index] = true
			}
		})
		if err != nil {
			return err
		}
	}
	for i := range interfaces {
		// An interface lies upon few others, and no loop can be made.
		for index, depth := interfaces[i].Index, 0; index != 0 && depth < len(links); index, depth = parents[index], depth+1 {
			interfaces[i].Frames = interfaces[i].Frames || bridges[index]
		}
	}
	return nil
}

// bridgesFiltered reports whether the kernel has br_netfilter, and whether it is switched on for all bridges of the network
// namespace, for either family.
func bridgesFiltered() (present, all bool, err error) {
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		value, err := os.ReadFile("/proc/sys/net/bridge/" + name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, false, fmt.Errorf("read sysctl net.bridge.%s: %w", name, err)
		}
		present = true
		all = all || strings.TrimSpace(string(value)) != "0"
	}
	return present, all, nil
}

// eachFiltered calls found with the index of every bridge for which it is switched on by itself, and perhaps of interfaces that
// are none. The library does not read these attributes (IFLA_BR_NF_CALL_IPTABLES of linux/if_link.h).
func eachFiltered(found func(index int)) error {
	messages, err := complete(func() ([][]byte, error) {
		request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
		request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		return request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	})
	if err != nil {
		return fmt.Errorf("list bridges: %w", err)
	}
	for _, message := range messages {
		if len(message) < unix.SizeofIfInfomsg {
			continue
		}
		data := message[unix.SizeofIfInfomsg:]
		for _, kind := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA} {
			data, _ = attribute(data, kind)
		}
		for _, kind := range []uint16{nl.IFLA_BR_NF_CALL_IPTABLES, nl.IFLA_BR_NF_CALL_IP6TABLES} {
			if value, _ := attribute(data, kind); len(value) > 0 && value[0] != 0 {
				found(int(nl.DeserializeIfInfomsg(message).Index))
			}
		}
	}
	return nil
}
