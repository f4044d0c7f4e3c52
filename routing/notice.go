package routing

import (
	"bytes"
	"errors"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// notice sums up notices of the kernel's about the network's configuration (rtnetlink(7)).
type notice struct {
	ours    bool // a rule or route of ours has come or gone, or its interface has changed
	changed bool // something of the host's has, that others look at
}

// receive waits, no longer than timeout, for notices. None is no error, and lost ones count as notices of everything. What is
// ours it asks when they have come.
func receive(socket *nl.NetlinkSocket, timeout time.Duration, config func() Config) (notice, error) {
	limit := unix.NsecToTimeval(max(timeout, time.Microsecond).Nanoseconds())
	if err := socket.SetReceiveTimeout(&limit); err != nil {
		return notice{}, err
	}
	messages, sender, err := socket.Receive()
	switch {
	case errors.Is(err, unix.EAGAIN):
		return notice{}, nil
	case errors.Is(err, unix.ENOBUFS):
		return notice{ours: true, changed: true}, nil
	case err != nil:
		return notice{}, err
	case sender.Pid != nl.PidKernel:
		return notice{}, nil // any process may send to this socket
	}
	c := config()
	var sum notice
	for _, message := range messages {
		n := read(message, c)
		sum.ours = sum.ours || n.ours
		sum.changed = sum.changed || n.changed
	}
	return sum, nil
}

// read says what one message is about.
func read(message syscall.NetlinkMessage, c Config) notice {
	switch message.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		// An interface that goes down takes routes with it, without further notice.
		return notice{ours: true, changed: true}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return notice{changed: true}
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		if len(message.Data) < unix.SizeofRtMsg {
			return notice{}
		}
		protocol, _ := attribute(message.Data[unix.SizeofRtMsg:], nl.FRA_PROTOCOL)
		// Before Apply, c.Protocol is 0, as that of many a rule of others.
		if c.Protocol != unix.RTPROT_UNSPEC && bytes.Equal(protocol, []byte{c.Protocol}) {
			return notice{ours: true}
		}
		return notice{changed: true}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(message.Data) < unix.SizeofRtMsg {
			return notice{}
		}
		route := nl.DeserializeRtMsg(message.Data)
		table := int(route.Table)
		if number, ok := attribute(message.Data[unix.SizeofRtMsg:], unix.RTA_TABLE); ok && len(number) == 4 {
			table = int(nl.NativeEndian().Uint32(number))
		}
		if table == c.Table {
			return notice{ours: true}
		}
		// Routes to single networks come and go by the thousand on a router. Those that make
		// addresses this host's own are few.
		own := route.Type == unix.RTN_LOCAL || route.Type == unix.RTN_BROADCAST || route.Type == unix.RTN_ANYCAST
		return notice{changed: route.Dst_len == 0 || own}
	}
	return notice{}
}

// attribute returns the value of the one of a kind among attributes; a kind that has others in it may be marked so.
func attribute(attributes []byte, kind uint16) (value []byte, ok bool) {
	parsed, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return nil, false
	}
	for _, a := range parsed {
		if a.Attr.Type&^unix.NLA_F_NESTED == kind {
			return a.Value, true
		}
	}
	return nil, false
}
