package udp

import (
	"container/list"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// replies are the sockets from which replies leave, by the address that was asked.
type replies struct {
	sockets map[netip.AddrPort]*list.Element // of *reply
	order   list.List                        // the one that was not used for longest in front
}

type reply struct {
	from   netip.AddrPort
	socket int
	used   time.Duration
}

// replySocket returns the socket from which replies of an address leave. One that was not
// used for longest makes room for it where there are too many: it costs no more than to
// open it again.
func (l *loop) replySocket(from netip.AddrPort) (socket int, err error) {
	if element := l.replies.sockets[from]; element != nil {
		l.replies.order.MoveToBack(element)
		found := element.Value.(*reply)
		found.used = l.now
		return found.socket, nil
	}
	if l.replies.order.Len() >= l.config.MaxReplies {
		l.closeReply(l.replies.order.Front())
	}
	if socket, err = openReply(from, l.config.Mark); err != nil {
		return none, err
	}
	l.replies.sockets[from] = l.replies.order.PushBack(&reply{from: from, socket: socket, used: l.now})
	l.counters.replies.Add(1)
	return socket, nil
}

func (l *loop) closeReply(element *list.Element) {
	old := l.replies.order.Remove(element).(*reply)
	if l.out.socket == old.socket {
		l.out.flush()
	}
	delete(l.replies.sockets, old.from)
	unix.Close(old.socket)
	l.counters.replies.Add(-1)
}

// expireReplies closes the sockets that were not used for as long as a session may be idle.
func (l *loop) expireReplies() {
	for e := l.replies.order.Front(); e != nil && e.Value.(*reply).used+l.config.Timeout <= l.now; e = l.replies.order.Front() {
		l.closeReply(e)
	}
}

func (l *loop) closeReplies() {
	for e := l.replies.order.Front(); e != nil; e = l.replies.order.Front() {
		l.closeReply(e)
	}
}
