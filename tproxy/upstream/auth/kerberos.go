package auth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jcmturner/gokrb5/v8/config"
	"github.com/jcmturner/gokrb5/v8/messages"
	"github.com/jcmturner/gokrb5/v8/types"
)

// KerberosConfig says where tickets come from: of CCache, Keytab and Password the first
// that is set.
type KerberosConfig struct {
	User     string // user, user@REALM or DOMAIN\user; may be empty with CCache
	Password string
	Keytab   string // a file with the account's keys
	CCache   string // a file with tickets that somebody else renews (kinit); FILE:PATH or PATH
	Conf     string // krb5.conf; one that is missing is an empty one
	// Control prepares every socket to a key distribution centre. See net.Dialer. Nil for nothing.
	Control func(network, address string, c syscall.RawConn) error
}

// Kerberos keeps an account's tickets. It is safe for concurrent use.
//
// Of the library it takes the messages and their cryptography, and not its client. That
// starts goroutines that nobody waits for, opens sockets of its own making, allocates
// what a length on the network says, takes no context, and answers a refused password
// with a second try, which counts as one more towards a lock.
type Kerberos struct {
	source      KerberosConfig
	user, realm string // with CCache they are the ticket's
	conf        *config.Config

	busy chan struct{} // holds one while somebody talks to the centre

	mutex    sync.Mutex
	granting *ticket            // by which others are had
	tickets  map[string]*ticket // by service
	failed   error              // of the latest fetch; nil if that went well
	until    time.Time          // no other is tried before
	last     time.Time          // of the latest proof: two must not have the same
}

// ticket is the right to use a service for a time.
type ticket struct {
	messages.Ticket
	client types.PrincipalName
	realm  string // the client's
	key    types.EncryptionKey
	start  time.Time // when it was fetched, or began
	end    time.Time
}

// holds reports whether the ticket can be used, and fresh whether it is not yet to be
// renewed: that is when a tenth of its time is left, some hours' notice for most.
func (t *ticket) holds(now time.Time) bool { return t != nil && now.Before(t.end.Add(-time.Minute)) }

func (t *ticket) fresh(now time.Time) bool {
	return t.holds(now) && t.end.Sub(now) > t.end.Sub(t.start)/10
}

// Why Kerberos cannot be used.
var (
	errNoKerberos = errors.New("there is no Kerberos account: give user@REALM with a password, a keytab or a ccache in --upstream-credentials")
	errNoRealm    = errors.New("the Kerberos realm is not known: write the user as user@REALM, or set default_realm in krb5.conf")
)

// NewKerberos reads the configuration. Files with secrets are read when a ticket is
// fetched, so that they may be renewed meanwhile.
func NewKerberos(source KerberosConfig) (*Kerberos, error) {
	k := &Kerberos{source: source, conf: config.New(), busy: make(chan struct{}, 1), tickets: make(map[string]*ticket)}
	if source.Conf != "" {
		conf, err := loadConf(source.Conf)
		if err != nil {
			return nil, err
		}
		k.conf = conf
	}
	if source.CCache != "" {
		kind, path, typed := strings.Cut(source.CCache, ":")
		if typed && kind != "FILE" {
			return nil, fmt.Errorf("ccache %q: only files can be read: set KRB5CCNAME=FILE:PATH for kinit, and ccache = PATH", source.CCache)
		} else if typed {
			k.source.CCache = path
		}
		return k, nil
	}
	user, realm, found := strings.Cut(source.User, "@")
	if !found {
		domain, name, slashed := strings.Cut(source.User, `\`)
		switch {
		case slashed && strings.Contains(domain, "."):
			user, realm = name, domain
		case slashed:
			user = name // the short name of a domain is no realm
		}
	}
	if realm == "" {
		realm = k.conf.LibDefaults.DefaultRealm
	}
	switch {
	case user == "":
		return nil, errNoKerberos
	case realm == "":
		return nil, errNoRealm
	}
	k.user, k.realm = user, strings.ToUpper(realm)
	return k, nil
}

// loadConf reads krb5.conf. What the library does not know of it is of no account here.
func loadConf(path string) (conf *config.Config, err error) {
	text, err := readFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return config.New(), nil
	}
	if err != nil {
		return nil, err
	}
	defer recovered(&err)
	conf, err = config.NewFromString(string(text))
	if errors.As(err, new(config.UnsupportedDirective)) {
		err = nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return conf, nil
}

// recovered makes an error of a panic of the library, which takes files and what comes
// from the network to be as long as they say.
func recovered(err *error) {
	if reason := recover(); reason != nil {
		*err = fmt.Errorf("malformed data of Kerberos: %v", reason)
	}
}

// same reports whether tickets of the one are those of the other.
func (k *Kerberos) same(other *Kerberos) bool {
	if k == nil || other == nil {
		return k == other
	}
	a, b := k.source, other.source
	return a.User == b.User && a.Password == b.Password && a.Keytab == b.Keytab && a.CCache == b.CCache && a.Conf == b.Conf
}

// ready reports whether there is a ticket that is not due.
func (k *Kerberos) ready(service string) bool {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	now := time.Now()
	t := k.tickets[service]
	return t.fresh(now) || t.holds(now) && k.failed != nil && now.Before(k.until)
}

// holds reports whether there is a ticket that can be used.
func (k *Kerberos) holds(service string) bool {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	return k.tickets[service].holds(time.Now())
}

// drop forgets a ticket that the service has refused.
func (k *Kerberos) drop(service string) {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	delete(k.tickets, service)
}

// failure is why no ticket could be fetched a short time ago; nil if that is not so.
func (k *Kerberos) failure() error {
	k.mutex.Lock()
	defer k.mutex.Unlock()
	if time.Now().Before(k.until) {
		return k.failed
	}
	return nil
}

// pause is the time from a failed fetch to the next: all flows wait for one.
const pause = 10 * time.Second

// prepare fetches a ticket that is missing or due. A ticket that is due and cannot be
// renewed is used to its end.
func (k *Kerberos) prepare(ctx context.Context, service string) error {
	select {
	case k.busy <- struct{}{}:
		defer func() { <-k.busy }()
	case <-ctx.Done():
		return fmt.Errorf("wait for a Kerberos ticket: %w", context.Cause(ctx))
	}
	if k.ready(service) {
		return nil
	}
	err := k.failure()
	if err == nil {
		err = k.fetch(ctx, service)
		k.mutex.Lock()
		k.failed, k.until = err, time.Now().Add(pause)
		if ctx.Err() != nil {
			k.failed = nil // it was only this flow that had no time
		}
		k.mutex.Unlock()
	}
	if err != nil && k.holds(service) && !isRefused(err) {
		return nil
	}
	return err
}

// isRefused reports whether it is the account that is wrong.
func isRefused(err error) bool { return errors.Is(err, ErrRefused) }

// fetch gets a ticket for a service, and before that the one by which it is had.
func (k *Kerberos) fetch(ctx context.Context, service string) (err error) {
	defer recovered(&err)
	k.mutex.Lock()
	granting := k.granting
	k.mutex.Unlock()
	if !granting.fresh(time.Now()) {
		if k.source.CCache != "" {
			granting, err = loadCCache(k.source.CCache)
		} else {
			granting, err = k.login(ctx)
		}
		if err != nil {
			return err
		}
	}
	t, err := k.grant(ctx, granting, service)
	if err != nil {
		return err
	}
	k.mutex.Lock()
	defer k.mutex.Unlock()
	k.granting, k.tickets[service] = granting, t
	return nil
}

// dialer opens the connections to a key distribution centre.
func (k *Kerberos) dialer() *net.Dialer {
	control := k.source.Control
	return &net.Dialer{Control: control, Resolver: k.resolver()}
}

// resolver is Go's own, because the system's would open sockets that Control does not see.
func (k *Kerberos) resolver() *net.Resolver {
	return &net.Resolver{
		PreferGo: true,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return (&net.Dialer{Control: k.source.Control}).DialContext(ctx, network, address)
		},
	}
}

// maxFile bounds the files that are read; a keytab or a ccache has a few KiB.
const maxFile = 1 << 20 // bytes

func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s: not a file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}
