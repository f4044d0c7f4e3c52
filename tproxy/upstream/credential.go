package upstream

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// ErrCredentialRefused says that a flow was not carried because the proxy has
// refused the credential before. Nothing was sent. The error that wraps it says
// when the next try is due if there will be one.
var ErrCredentialRefused = errors.New("the proxy refused the user name or the password before, and retries lock accounts: " +
	"nothing was sent; correct them and restart, or send SIGHUP to have them tried once more")

// patience is how long the answer to a first use keeps the others from trying. A
// proxy refuses a credential at once; a slow answer means that it took it and is
// dialling the destination.
const patience = 2 * time.Second

// The pauses before the single retries of a suspended credential are 1, 2, 4, 8,
// 15, 15, ... minutes. The first is of the order of a restart of what checks the
// passwords; the last is the time after which account policies commonly forget a
// wrong one (15 minutes in the CIS benchmarks for Windows).
const (
	firstPause = 1 * time.Minute
	lastPause  = 15 * time.Minute
)

// state is what is known of a credential.
type state uint8

const (
	untried   state = iota // nothing; one flow has the turn, others wait in line
	accepted               // by the last proxy that judged it
	refused                // at the first use
	suspended              // refused after it was accepted
)

// credential is a proxy's account, and the breaker that guards it.
type credential struct {
	account atomic.Pointer[auth.Account]

	// standing is the lease that all flows share in the accepted state, nil in
	// every other: the whole check then is this one load.
	standing atomic.Pointer[Lease]

	mutex   sync.Mutex
	state   state
	epoch   uint64    // grows with the state; leases of an earlier one have no say
	turn    *Lease    // untried: the lease that the line waits for; nil only if the line is empty
	line    list.List // untried: of chan<- grant, each with room for one
	retry   time.Time // suspended: when the next retry is due
	retries int       // suspended: how many were refused
}

func newCredential(account *auth.Account) *credential {
	c := new(credential)
	c.account.Store(account)
	return c
}

// same reports whether both are there and say the same.
func (c *credential) same(other *credential) bool {
	return c != nil && other != nil && c.account.Load().Same(other.account.Load())
}

// replace makes it another account, of which nothing is known. What was sent before says
// nothing about it.
func (c *credential) replace(account *auth.Account) {
	if c.account.Load().Same(account) {
		return
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.account.Store(account)
	c.enter(untried)
}

// grant is the end of waiting in line.
type grant struct {
	lease *Lease
	err   error
}

// Lease is the permission to send a proxy's credential once. Whoever acquires one
// must see that it is settled; nil is a valid lease and stands for "no credential".
type Lease struct {
	credential *credential
	epoch      uint64
	shared     bool        // the standing lease of the accepted state
	settled    bool        // an exclusive one: it has had its say
	overdue    *time.Timer // of an untried credential: passes the turn after patience
}

// Acquire returns the permission to send the proxy's credential, which is to be
// asked for when the connection is up and the request is the next thing to do.
// While another flow is trying a credential of which nothing is known yet it waits
// for the answer to that, at most until ctx is done. It fails with
// ErrCredentialRefused if nothing may be sent.
//
// The lease is nil if the proxy has no credential, or does not ask for it. A Kerberos ticket
// that is missing or due is fetched here.
func (p *Proxy) Acquire(ctx context.Context) (*Lease, error) {
	if p.credential == nil || p.demand.none() {
		return nil, nil
	}
	lease, err := p.credential.acquire(ctx)
	if lease != nil && p.demand.none() {
		// The proxy said so while this flow stood in line.
		lease.settle(notJudged)
		return nil, nil
	}
	if lease != nil && p.client != nil {
		if err := p.client.Prepare(ctx); err != nil {
			lease.Settle(err)
			return nil, err
		}
	}
	return lease, err
}

// Standing returns the lease that all flows share while the credential is accepted;
// nil if the proxy has no credential or does not ask for it. ok is false when
// Acquire would have to decide or to wait, or as long as it is not known how the proxy
// authenticates. It is for a caller that must not wait, and costs three atomic loads, unless
// the method is Negotiate.
func (p *Proxy) Standing() (lease *Lease, ok bool) {
	if p.credential == nil || p.demand.none() {
		return nil, true
	}
	lease = p.credential.standing.Load()
	return lease, lease != nil && (p.client == nil || p.client.Ready())
}

// Reset forgets that the proxy refused the credential: the next flow tries it as
// if for the first time. Answers to what was sent before no longer count. A
// credential that was not refused stays as it is. A proxy that did not ask for the credential
// is offered it again, and one of HTTP asked anew how it authenticates.
func (p *Proxy) Reset() {
	if p.credential == nil {
		return
	}
	p.demand.forget()
	if p.client != nil {
		p.client.Forget()
	}
	p.credential.mutex.Lock()
	defer p.credential.mutex.Unlock()
	if state := p.credential.state; state == refused || state == suspended {
		p.credential.enter(untried)
	}
}

// Settle reports how the handshake under the lease ended: nil for a tunnel, else
// its error, perhaps wrapped. Only a tunnel and a *RefusedError that is Denied say
// something about the credential. Of an exclusive lease the first settlement
// counts and others are ignored, so that a driver may settle whatever the
// handshake has left open; any number of flows share and settle the one of an
// accepted credential.
func (l *Lease) Settle(err error) {
	answer, answered := errors.AsType[*RefusedError](err)
	switch {
	case err == nil:
		l.settle(judgedGood)
	case answered && answer.Denied, errors.Is(err, auth.ErrRefused):
		l.settle(judgedBad)
	case answered:
		l.settle(notJudged)
	default:
		l.settle(notAnswered)
	}
}

// stale reports whether the credential was refused since the lease that all share was
// taken: between that and the request lies the connect.
func (l *Lease) stale() bool {
	return l != nil && l.shared && l.credential.standing.Load() != l
}

// verdict is what the end of a lease says about the credential.
type verdict uint8

const (
	notAnswered verdict = iota // nothing: there was no answer
	notJudged                  // nothing, but the proxy answered
	judgedGood
	judgedBad
)

func (l *Lease) settle(v verdict) {
	if l == nil || l.shared && v != judgedBad {
		return
	}
	c := l.credential
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if l.overdue != nil {
		l.overdue.Stop()
	}
	if l.settled {
		return
	}
	l.settled = true
	switch {
	case l.epoch != c.epoch:
		// The question was settled by another answer.
	case v == judgedGood:
		c.enter(accepted)
	case v == judgedBad:
		c.deny()
	case c.state == untried:
		c.pass(l)
	case v == notJudged: // suspended
		// Most likely the proxy did not mind the credential, but whoever answers
		// 403 or 502 need not have looked at it: the next flow asks again. Without
		// an answer it stays at one try a pause.
		c.retry = time.Now()
	}
}

func (c *credential) acquire(ctx context.Context) (*Lease, error) {
	if lease := c.standing.Load(); lease != nil {
		return lease, nil
	}
	c.mutex.Lock()
	lease, ok, err := c.try()
	if ok || err != nil {
		c.mutex.Unlock()
		return lease, err
	}
	granted := make(chan grant, 1)
	place := c.line.PushBack((chan<- grant)(granted))
	c.mutex.Unlock()

	select {
	case grant := <-granted:
		return grant.lease, grant.err
	case <-ctx.Done():
	}
	c.mutex.Lock()
	c.line.Remove(place)
	c.mutex.Unlock()
	select {
	case grant := <-granted: // in the meantime; the next in line must not wait for it
		grant.lease.Settle(ctx.Err())
	default:
	}
	return nil, fmt.Errorf("wait until another flow has tried the credential: %w", context.Cause(ctx))
}

// try grants a lease if that can be decided now. It is called under the mutex.
func (c *credential) try() (lease *Lease, ok bool, err error) {
	switch c.state {
	case accepted:
		return c.standing.Load(), true, nil
	case refused:
		return nil, false, ErrCredentialRefused
	case suspended:
		if wait := time.Until(c.retry); wait > 0 {
			return nil, false, fmt.Errorf("%w (it was accepted earlier: one more try in %s)", ErrCredentialRefused, wait.Round(time.Second))
		}
		// The retry is spent when it is granted, so that no second one starts
		// however long the first takes.
		c.epoch++
		c.retry = time.Now().Add(c.pause())
		return &Lease{credential: c, epoch: c.epoch}, true, nil
	}
	if c.turn != nil {
		return nil, false, nil
	}
	lease = &Lease{credential: c, epoch: c.epoch}
	lease.overdue = time.AfterFunc(patience, func() {
		c.mutex.Lock()
		defer c.mutex.Unlock()
		c.pass(lease)
	})
	c.turn = lease
	return lease, true, nil
}

// pause is the time from the latest refusal, or the latest retry, to the next retry.
func (c *credential) pause() time.Duration {
	const doublings = 4 // are enough to reach lastPause
	return min(firstPause<<min(c.retries, doublings), lastPause)
}

// deny takes note of a refusal. It is called under the mutex.
func (c *credential) deny() {
	switch c.state {
	case untried:
		c.enter(refused)
	case accepted:
		c.enter(suspended)
		c.retries = 0
		c.retry = time.Now().Add(c.pause())
	case suspended:
		c.retries++
		c.retry = time.Now().Add(c.pause())
	}
}

// enter changes the state and tells the line. It is called under the mutex.
func (c *credential) enter(next state) {
	c.state = next
	c.epoch++
	c.turn = nil
	var standing *Lease
	if next == accepted {
		standing = &Lease{credential: c, epoch: c.epoch, shared: true}
	}
	c.standing.Store(standing)
	c.wake()
}

// pass gives the turn of l, if it still has it, to the next in line. It is called
// under the mutex.
func (c *credential) pass(l *Lease) {
	if c.turn == l {
		c.turn = nil
		c.wake()
	}
}

// wake lets those in line go for whom something is decided, in their order. It is
// called under the mutex.
func (c *credential) wake() {
	for first := c.line.Front(); first != nil; first = c.line.Front() {
		lease, ok, err := c.try()
		if !ok && err == nil {
			return
		}
		c.line.Remove(first).(chan<- grant) <- grant{lease, err}
	}
}
