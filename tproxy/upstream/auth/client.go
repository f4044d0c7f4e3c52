package auth

import (
	"context"
	"strings"
	"sync/atomic"
)

// Client is what all exchanges with one proxy share. It is safe for concurrent use.
type Client struct {
	account *atomic.Pointer[Account]
	pinned  Method
	service string // HTTP/host

	method atomic.Uint32 // the Method that the proxy takes; Auto as long as that is not known
	nonce  atomic.Pointer[digest]
}

// NewClient returns the client for a proxy, whose host is a name or an address. The
// account may be replaced at any time. A pinned method is the only one that is used, and
// is used without being asked for.
func NewClient(account *atomic.Pointer[Account], pinned Method, host string) *Client {
	c := &Client{account: account, pinned: pinned, service: "HTTP/" + strings.ToLower(host)}
	c.method.Store(uint32(pinned))
	return c
}

// Method returns the one in use; Auto as long as it is not known.
func (c *Client) Method() Method { return Method(c.method.Load()) }

// Pinned returns the method that was given to NewClient.
func (c *Client) Pinned() Method { return c.pinned }

// Forget forgets what the proxy has offered.
func (c *Client) Forget() {
	c.method.Store(uint32(c.pinned))
	c.nonce.Store(nil)
}

// Ready reports whether an exchange can start without Prepare: the method is known, and
// its ticket, if it has one, is there and not due. It costs one atomic load where that is
// neither Kerberos nor unknown.
func (c *Client) Ready() bool {
	switch c.Method() {
	case Auto:
		return false
	case Negotiate:
		kerberos := c.account.Load().Kerberos
		return kerberos != nil && kerberos.ready(c.service)
	}
	return true
}

// Prepare fetches the ticket of Kerberos if there is none or it is due. It waits for the
// network, at most until ctx is done. Where it fails and the method is not pinned the
// next exchange asks the proxy what else it takes. ErrRefused says that it was the
// account which the key distribution centre does not accept.
func (c *Client) Prepare(ctx context.Context) error {
	if c.Method() != Negotiate {
		return nil
	}
	kerberos := c.account.Load().Kerberos
	if kerberos == nil {
		return errNoKerberos
	}
	err := kerberos.prepare(ctx, c.service)
	if err != nil && c.pinned == Auto && ctx.Err() == nil && !isRefused(err) {
		c.method.Store(uint32(Auto)) // which looks at kerberos.failure
		return nil
	}
	return err
}

// shared returns the nonce that requests are sent with before the proxy asks for it; nil
// for none.
func (c *Client) shared() *digest {
	if d := c.nonce.Load(); d != nil && d.account == c.account.Load() && !d.exhausted() {
		return d
	}
	return nil
}

// offer is what can be done of what a proxy offers.
type offer struct {
	method    Method // Auto for nothing
	challenge *Challenge
	digest    *digest
	failure   error // why Negotiate cannot be used, though it is offered
}

// choose returns the strongest of the challenges that the account can answer.
func (c *Client) choose(challenges []Challenge, account *Account) offer {
	var best offer
	take := func(o offer) {
		if o.method > best.method && (c.pinned == Auto || c.pinned == o.method) {
			o.failure, best = best.failure, o
		}
	}
	for i := range challenges {
		challenge := &challenges[i]
		switch {
		case challenge.Is("Negotiate") && account.Kerberos != nil:
			if err := account.Kerberos.failure(); err != nil && c.pinned == Auto {
				best.failure = err
			} else {
				take(offer{method: Negotiate, challenge: challenge})
			}
		case !account.hasPassword():
		case challenge.Is("NTLM"):
			take(offer{method: NTLM, challenge: challenge})
		case challenge.Is("Basic") && !strings.Contains(account.User, ":"): // RFC 7617 section 2
			take(offer{method: Basic, challenge: challenge})
		case challenge.Is("Digest"):
			d := parseDigest(challenge, account)
			switch {
			case d == nil:
			case best.digest == nil:
				take(offer{method: Digest, challenge: challenge, digest: d})
			case best.method == Digest && d.algorithm.strength > best.digest.algorithm.strength:
				best.challenge, best.digest = challenge, d
			}
		}
	}
	return best
}

// Offers reports whether a scheme is among the challenges.
func Offers(challenges []Challenge, scheme string) bool {
	for i := range challenges {
		if challenges[i].Is(scheme) {
			return true
		}
	}
	return false
}
