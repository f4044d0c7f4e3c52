package auth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

// Exchange is the authentication on one connection to a proxy: it begins anew with each.
// It does no input or output and is not safe for concurrent use. The zero value is one that
// authenticates nothing.
type Exchange struct {
	client  *Client
	account *Account // at its start: what is proven does not change on the way
	binding []byte

	sent   sent
	method Method // of what was sent
	bound  bool   // the connection is authenticated: further requests need nothing
	alone  bool   // keeps its nonce to itself
	stale  bool   // a stale nonce was answered already, since the last success
	rounds uint8  // 407s since the last success

	digest *digest        // of this connection's own challenge
	ntlm   *ntlmChallenge // to be answered with the next request
}

// sent is what the latest request had in it.
type sent uint8

const (
	sentNothing  sent = iota
	sentGreeting      // the first message of NTLM, which proves nothing
	sentProof
)

// maxRounds bounds the 407s between two successes: the bare one, NTLM's second message
// or a stale nonce, and one to spare for a proxy that changes its mind.
const maxRounds = 3

// Errors of a proxy that does not keep to its own scheme.
var (
	errRounds = errors.New("the proxy asks for authentication over and over")
	errStale  = errors.New("the proxy calls each nonce of Digest stale that it has just given out")
	errSilent = errors.New("the proxy offers NTLM and does not answer its first message with a challenge")
)

// Exchange starts one, on a connection that binding belongs to (see Binding); nil for one
// without TLS.
func (c *Client) Exchange(binding []byte) Exchange {
	return Exchange{client: c, account: c.account.Load(), binding: binding}
}

// Active reports whether the exchange authenticates at all.
func (e *Exchange) Active() bool { return e.client != nil }

// Alone has the next request go without a nonce of Digest that was used before, and keeps
// the one that it is given from others. The first proof with that can only be accepted or
// refused.
func (e *Exchange) Alone() { e.alone, e.digest = true, nil }

// Share undoes Alone: the nonce is that of the next connection as well.
func (e *Exchange) Share() {
	e.alone = false
	if e.client != nil && e.digest != nil {
		e.client.nonce.Store(e.digest)
	}
}

// Bound reports whether the method authenticates the connection, so that the same one must
// be kept on which the proxy has answered.
func (e *Exchange) Bound() bool { return e.method == NTLM || e.method == Negotiate }

// Method returns the one of the latest request; Auto if that had nothing to authenticate it.
func (e *Exchange) Method() Method { return e.method }

// ForRequest reports whether the next proof will be one for a certain method and target.
func (e *Exchange) ForRequest() bool { return e.client != nil && e.client.Method() == Digest }

// Proven reports whether the latest request was sent with a proof, or on a connection that
// is authenticated.
func (e *Exchange) Proven() bool { return e.bound || e.sent == sentProof }

// Pending reports whether the answer to a question of the proxy's is due, which only this
// connection can bring.
func (e *Exchange) Pending() bool { return e.ntlm != nil }

// Decisive reports whether the next request carries a proof, or needs none, that the proxy
// can only take or refuse: one that it may answer with a further question is not to carry
// a body that cannot be sent again.
func (e *Exchange) Decisive() bool {
	switch {
	case e.client == nil || e.bound:
		return true
	}
	switch e.client.Method() {
	case Basic:
		return true
	case Digest:
		return e.digest != nil && e.alone && e.digest.count.Load() == 0
	case NTLM:
		return e.ntlm != nil
	case Negotiate:
		return e.account.Kerberos != nil && e.account.Kerberos.holds(e.client.service)
	}
	return false
}

// Authorization returns the value of the Proxy-Authorization field for the next request,
// whose method and target it is for; empty for none.
func (e *Exchange) Authorization(method, target string) string {
	if e.client == nil || e.bound {
		return ""
	}
	e.sent, e.method = sentProof, e.client.Method()
	switch e.method {
	case Basic:
		return e.account.basic
	case Digest:
		d := e.digest
		if d == nil && !e.alone {
			d = e.client.shared()
		}
		if d != nil && d.account == e.account && !d.exhausted() {
			e.digest = d
			return d.authorization(method, target)
		}
	case NTLM:
		if e.ntlm != nil {
			return "NTLM " + base64.StdEncoding.EncodeToString(e.ntlm.authenticate(e.account, e.client.service, e.binding))
		}
		e.sent = sentGreeting
		return "NTLM " + base64.StdEncoding.EncodeToString(ntlmNegotiate())
	case Negotiate:
		if e.account.Kerberos != nil {
			if token := e.account.Kerberos.token(e.client.service, e.binding); token != nil {
				return "Negotiate " + base64.StdEncoding.EncodeToString(token)
			}
		}
	}
	e.sent, e.method = sentNothing, Auto
	return ""
}

// Accepted takes note that the latest request was let through.
func (e *Exchange) Accepted() {
	e.bound = e.bound || e.sent == sentProof && e.Bound()
	e.stale, e.rounds, e.ntlm = false, 0, nil
}

// Challenged takes the challenges of a 407 to the latest request. Without an error that is
// to be sent again, on the same connection where the method is Bound; else the error wraps
// ErrRefused, ErrNotReady or ErrUnsupported, or says what the proxy does wrong.
func (e *Exchange) Challenged(challenges []Challenge) error {
	if e.client == nil {
		return ErrUnsupported
	}
	if e.rounds++; e.rounds > maxRounds {
		return errRounds
	}
	e.bound = false
	if done, err := e.answered(challenges); done || err != nil {
		return err
	}
	o := e.client.choose(challenges, e.account)
	switch {
	case o.method == Auto && o.failure != nil:
		return o.failure
	case o.method == Auto:
		return ErrUnsupported
	}
	e.client.method.Store(uint32(o.method))
	e.ntlm, e.digest = nil, nil
	switch o.method {
	case Digest:
		e.take(o.digest)
	case Negotiate:
		if !e.account.Kerberos.holds(e.client.service) {
			return ErrNotReady
		}
	}
	return nil
}

// answered deals with the challenges as the answer to what was sent. It is not done if
// they are a new beginning.
func (e *Exchange) answered(challenges []Challenge) (done bool, err error) {
	switch {
	case e.sent == sentNothing || !Offers(challenges, e.method.String()):
		return false, nil // the methods' names are the schemes'
	case e.method == Digest:
		return e.answeredDigest(challenges)
	case e.method == NTLM && e.sent == sentGreeting:
		for i := range challenges {
			if c := &challenges[i]; c.Is("NTLM") && c.Token != "" {
				return true, e.takeNTLM(c.Token)
			}
		}
		return false, errSilent
	case e.method == Negotiate:
		e.account.Kerberos.drop(e.client.service)
		for i := range challenges {
			if c := &challenges[i]; c.Is("Negotiate") && c.Token != "" {
				return false, refusedToken(c.Token)
			}
		}
	}
	return false, ErrRefused
}

// answeredDigest tells a nonce that is stale from a password that is wrong.
func (e *Exchange) answeredDigest(challenges []Challenge) (done bool, err error) {
	used := e.digest
	fresh := e.client.choose(onlyDigest(challenges), e.account).digest
	for i := range challenges {
		if c := &challenges[i]; !c.Is("Digest") || !strings.EqualFold(c.Param("stale"), "true") {
			continue
		}
		switch {
		case fresh == nil:
			return false, nil
		case e.stale:
			return false, errStale
		}
		e.stale = true
		e.client.nonce.CompareAndSwap(used, nil)
		e.take(fresh)
		return true, nil
	}
	e.client.nonce.CompareAndSwap(used, nil)
	return false, ErrRefused
}

// take makes a nonce this connection's, and that of all if they have none.
func (e *Exchange) take(d *digest) {
	e.digest = d
	if e.alone {
		return
	}
	if old := e.client.nonce.Load(); old == nil || old.account != d.account || old.exhausted() {
		e.client.nonce.CompareAndSwap(old, d)
	}
}

func (e *Exchange) takeNTLM(token string) error {
	message, err := base64.StdEncoding.DecodeString(token)
	if err != nil {
		return fmt.Errorf("%w: %w", errNTLM, err)
	}
	e.ntlm, err = parseNTLM(message)
	return err
}

func onlyDigest(challenges []Challenge) (digests []Challenge) {
	for i := range challenges {
		if challenges[i].Is("Digest") {
			digests = append(digests, challenges[i])
		}
	}
	return digests
}
