package routing

import (
	"context"
	"fmt"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Event is what Watch has to tell. Exactly one field is set.
type Event struct {
	// Restored is a rule or route that another program had removed and that is back, in iproute2 syntax.
	Restored string
	// Changed: addresses, interfaces, default routes, rules of others or what makes [Interface].Frames have changed (or may
	// have: there are false alarms). It is told once at the beginning, too. What [Look] said is out of date, and [Handle.Verify] may come to another result.
	Changed bool
	// Err is why something stays missing. It is tried again, and an error that stays the same is reported once.
	Err error
}

const (
	// settle is the time from the first of a burst of notices to the work: short against the second within which a
	// repair is due, long enough to take a whole flush or the start of a container for one change.
	settle = 100 * time.Millisecond
	// pollInterval bounds how long a removal without a notice stays (the kernel does not announce every one).
	pollInterval = 10 * time.Second
)

// Watch puts back what others remove of our rules and routes (ip rule flush, ip route flush, a restart of systemd-networkd),
// within a second, until ctx ends; it then returns nil. It reports also that the host's network has changed. The calls of
// report come one after the other, from Watch itself; they may use the handle. An error means that notices can no longer be had.
func (h *Handle) Watch(ctx context.Context, report func(Event)) error {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE,
		unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE,
		unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		return fmt.Errorf("subscribe to netlink notices: %w", err)
	}
	defer socket.Close()
	defer context.AfterFunc(ctx, socket.Close)()

	// Something may have gone since Apply, and something have changed since the caller's Look.
	news, due := notice{changed: true}, time.Now()
	var lastErr string
	_, frames, _ := bridgesFiltered() // has no notices; what it cannot read it does not tell of
	for ctx.Err() == nil {
		if wait := time.Until(due); wait > 0 {
			received, err := receive(socket, wait, h.config)
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				return fmt.Errorf("receive netlink notices: %w", err)
			case received != (notice{}):
				news.changed = news.changed || received.changed
				if soon := time.Now().Add(settle); soon.Before(due) {
					due = soon
				}
			}
			continue
		}
		restored, err := h.repair()
		for _, e := range restored {
			report(Event{Restored: e.String()})
		}
		if err == nil {
			lastErr = ""
		} else if err.Error() != lastErr {
			lastErr = err.Error()
			report(Event{Err: err})
		}
		if _, now, err := bridgesFiltered(); err == nil && now != frames {
			news.changed, frames = true, now
		}
		if news.changed {
			report(Event{Changed: true})
		}
		news, due = notice{}, time.Now().Add(pollInterval)
	}
	return nil
}

// config returns what is applied, or zero.
func (h *Handle) config() Config {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.applied == nil {
		return Config{}
	}
	return *h.applied
}

// repair adds what is missing of the applied entries. Unlike Apply it goes on after an error, and returns the first.
func (h *Handle) repair() (restored []entry, err error) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.applied == nil {
		return nil, nil
	}
	missing, err := h.missing(*h.applied)
	if err != nil {
		return nil, err
	}
	for _, e := range missing {
		if failure := h.add(e); failure == nil {
			restored = append(restored, e)
		} else if err == nil {
			err = failure
		}
	}
	return restored, err
}
