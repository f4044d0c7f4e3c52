// Package firewalld has firewalld let captured packets pass (firewalld.dbus(5)): they are delivered to this host though they
// are for others, so that the zones of clients refuse them.
//
// What is opened is opened at runtime only: it is gone when firewalld reloads or restarts, upon which [Rules.Watch] opens it
// again, and [Rules.Close] takes it away. So that what a killed process left is known, it is kept in a file as well.
//
// The package is the only one that speaks D-Bus.
package firewalld

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// Names of firewalld's on the system bus.
const (
	service       = "org.fedoraproject.FirewallD1"
	zoneInterface = service + ".zone"
	object        = dbus.ObjectPath("/org/fedoraproject/FirewallD1")
)

// answerTimeout bounds the wait for an answer: firewalld loads all its rules anew at some changes, which takes seconds on a small
// host.
const answerTimeout = 20 * time.Second

// Opening is what is to pass that comes in by an interface: rules of the rich language (firewalld.richlanguage(5)).
type Opening struct {
	Interface string
	Rules     []string
}

// rule is one of a zone.
type rule struct{ Zone, Text string }

// Rules are those that firewalld has from us. The methods may be called concurrently.
type Rules struct {
	file string

	mutex  sync.Mutex
	bus    *dbus.Conn // nil before the first use
	wanted []Opening
	added  []rule // and not removed yet, as the file has it
}

// Open takes over what a killed process has left in the file, which need not be there. It does not speak to firewalld yet.
func Open(file string) (*Rules, error) {
	r := &Rules{file: file}
	text, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return r, nil
	case err != nil:
		return nil, err
	}
	if err := json.Unmarshal(text, &r.added); err != nil {
		return nil, fmt.Errorf("%s: %w: it holds the rules that firewalld has from this program; correct or remove it", file, err)
	}
	return r, nil
}

// Set makes firewalld's rules from us those of the openings, in the zones that their interfaces are in now. Rules that are there
// and not from us stay so.
func (r *Rules) Set(openings []Opening) error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.wanted = openings
	return r.apply()
}

// apply is Set for what is wanted.
func (r *Rules) apply() error {
	if err := r.connect(); err != nil {
		return err
	}
	var wanted []rule
	for _, opening := range r.wanted {
		zone, err := r.zone(opening.Interface)
		if err != nil {
			return err
		}
		for _, text := range opening.Rules {
			if next := (rule{zone, text}); !slices.Contains(wanted, next) {
				wanted = append(wanted, next)
			}
		}
	}
	if err := r.remove(wanted); err != nil {
		return err
	}
	for _, next := range wanted {
		there, err := r.has(next)
		switch {
		case err != nil:
			return err
		case there:
			continue
		}
		if !slices.Contains(r.added, next) {
			r.added = append(r.added, next)
			if err := r.store(); err != nil {
				return err
			}
		}
		if err := r.call("add", zoneInterface+".addRichRule", nil, next.Zone, next.Text, int32(0)); err != nil {
			return err
		}
	}
	return nil
}

// Close removes what was added, and ends the connection. Where firewalld is gone, so are the rules.
func (r *Rules) Close() error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.wanted = nil
	var failure error
	if len(r.added) > 0 {
		if failure = r.connect(); failure == nil {
			failure = r.remove(nil)
		} else if isAbsent(failure) {
			r.added = nil
			failure = r.store()
		}
	}
	if r.bus != nil {
		failure = errors.Join(failure, r.bus.Close())
		r.bus = nil
	}
	return failure
}

// The pauses between two tries to reach the system bus, each twice the one before: it is restarted within seconds.
const (
	firstPause = time.Second
	lastPause  = time.Minute
)

// Watch adds the rules again when firewalld has lost them, until ctx ends. What goes wrong it reports, and goes on: that the
// bus is gone once, until it is back.
func (r *Rules) Watch(ctx context.Context, report func(error)) {
	pause := time.Duration(0)
	for ctx.Err() == nil {
		err := r.watch(ctx, report, func() { pause = 0 })
		if ctx.Err() != nil {
			return
		}
		if pause == 0 {
			report(err)
		}
		pause = min(max(2*pause, firstPause), lastPause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// watch is Watch for as long as the bus is there; it calls connected once it is.
func (r *Rules) watch(ctx context.Context, report func(error), connected func()) error {
	signals := make(chan *dbus.Signal, 16)
	bus, err := r.subscribe(signals)
	if err != nil {
		return err
	}
	defer bus.RemoveSignal(signals)
	connected()
	// What was lost meanwhile nobody tells.
	for {
		r.mutex.Lock()
		err := r.apply()
		r.mutex.Unlock()
		if err != nil && !isAbsent(err) {
			report(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-signals:
			if !open {
				return errors.New("the system bus has gone, over which firewalld is asked: it is tried again")
			}
		}
	}
}

// subscribe has the bus tell when firewalld has reloaded, or has been started.
func (r *Rules) subscribe(signals chan<- *dbus.Signal) (*dbus.Conn, error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if err := r.connect(); err != nil {
		return nil, err
	}
	err := errors.Join(
		r.bus.AddMatchSignal(dbus.WithMatchInterface(service), dbus.WithMatchMember("Reloaded")),
		r.bus.AddMatchSignal(dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"),
			dbus.WithMatchArg(0, service)))
	if err != nil {
		return nil, fmt.Errorf("watch firewalld: %w", err)
	}
	r.bus.Signal(signals)
	return r.bus, nil
}

func (r *Rules) connect() error {
	if r.bus != nil && r.bus.Connected() {
		return nil
	}
	bus, err := dbus.ConnectSystemBus()
	if err != nil {
		return &absentError{err}
	}
	r.bus = bus
	return nil
}

// absentError says that there is no firewalld to talk to.
type absentError struct{ error }

// Error names the remedy.
func (e *absentError) Error() string {
	return fmt.Sprintf("firewalld does not answer on the system bus: %v: start it, or leave out --firewalld", e.error)
}

func isAbsent(err error) bool {
	var absent *absentError
	return errors.As(err, &absent)
}

// call asks firewalld for something, and stores what it answers unless that is nil.
func (r *Rules) call(what, method string, answer any, arguments ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	call := r.bus.Object(service, object).CallWithContext(ctx, method, dbus.FlagNoAutoStart, arguments...)
	err := call.Err
	if err == nil && answer != nil {
		err = call.Store(answer)
	}
	var refusal dbus.Error
	if errors.As(err, &refusal) && (refusal.Name == "org.freedesktop.DBus.Error.ServiceUnknown" || refusal.Name == "org.freedesktop.DBus.Error.NameHasNoOwner") {
		return &absentError{err}
	}
	if err != nil {
		return fmt.Errorf("firewalld: %s %v: %w", what, arguments, err)
	}
	return nil
}

// zone is that of an interface, or the one of interfaces that have none.
func (r *Rules) zone(name string) (zone string, err error) {
	if err := r.call("zone of", zoneInterface+".getZoneOfInterface", &zone, name); err != nil || zone != "" {
		return zone, err
	}
	return zone, r.call("default zone", service+".getDefaultZone", &zone)
}

func (r *Rules) has(wanted rule) (there bool, err error) {
	return there, r.call("look for", zoneInterface+".queryRichRule", &there, wanted.Zone, wanted.Text)
}

// remove takes away what we have added, but for what is wanted.
func (r *Rules) remove(wanted []rule) error {
	var left []rule
	var failure error
	for _, old := range r.added {
		if slices.Contains(wanted, old) {
			left = append(left, old)
			continue
		}
		there, err := r.has(old)
		if err == nil && there {
			err = r.call("remove", zoneInterface+".removeRichRule", nil, old.Zone, old.Text)
		}
		if err != nil {
			left = append(left, old)
			failure = errors.Join(failure, err)
		}
	}
	if isAbsent(failure) {
		left, failure = nil, nil // gone with it
	}
	if len(left) == len(r.added) {
		return failure
	}
	r.added = left
	return errors.Join(failure, r.store())
}

// store writes the file, whole or not at all; none if there is nothing to keep.
func (r *Rules) store() error {
	if len(r.added) == 0 {
		if err := os.Remove(r.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(r.added)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(r.file), 0o755); err != nil {
		return err
	}
	fresh := r.file + ".new"
	if err := os.WriteFile(fresh, text, 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, r.file)
}
