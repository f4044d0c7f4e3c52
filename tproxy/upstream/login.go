package upstream

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// ErrReconnect says that the proxy wants to be authenticated to, or in another way, and
// that this takes another connection: it closes this one, or a ticket has to be fetched
// first. What it said is remembered, so that a second try goes on from there; the tries of
// a flow are to be bounded all the same.
var ErrReconnect = errors.New("the proxy asks for authentication, which takes another connection")

// MaxReconnects is how often a flow should follow ErrReconnect: once for a bare 407, and
// once for a nonce that was stale or a ticket that had to be fetched.
const MaxReconnects = 2

// Login has the proxy told who the gateway is by an account, in place of the one in its URL
// (nil for that), and by a method, for which Auto is the strongest that the proxy offers.
// The error says which part of the account the proxy's protocol cannot send. The method, and
// whether there is an account, are for the time before the first use. An account that is not
// the same as the one before is tried as if for the first time.
func (p *Proxy) Login(account *auth.Account, method auth.Method) error {
	if account != nil {
		if err := p.protocol.checkCredential(account.User, account.Password); err != nil {
			return err
		}
		if p.credential == nil {
			p.credential = newCredential(account)
		}
		p.credential.replace(account)
	}
	if p.credential != nil && p.PlainHTTP() && (p.client == nil || p.client.Pinned() != method) {
		p.client = auth.NewClient(&p.credential.account, method, p.host)
	}
	return nil
}

// Account returns the one that the proxy is told; nil for none. It is not to be shown.
func (p *Proxy) Account() *auth.Account {
	if p.credential == nil {
		return nil
	}
	return p.credential.account.Load()
}

// login starts the authentication on a connection, to which binding ties it; nil for none.
func (p *Proxy) login(lease *Lease, binding []byte) auth.Exchange {
	if lease == nil || p.client == nil {
		return auth.Exchange{}
	}
	return p.client.Exchange(binding)
}

// binding says which TLS connection one is; nil for one without TLS.
func binding(conn net.Conn) []byte {
	if s, ok := conn.(*secure); ok {
		if shown := s.ConnectionState().PeerCertificates; len(shown) > 0 {
			return auth.Binding(shown[0])
		}
	}
	return nil
}

// challenged deals with a 407. Without an error the request is to be sent again, as the
// exchange says; else the error is ErrReconnect or the refusal, which it completes.
func (p *Proxy) challenged(lease *Lease, login *auth.Exchange, refused *RefusedError, challenges []auth.Challenge) error {
	for i := range challenges {
		scheme := challenges[i].Scheme
		known := func(other string) bool { return strings.EqualFold(other, scheme) }
		if len(refused.Schemes) < maxSchemes && !slices.ContainsFunc(refused.Schemes, known) {
			refused.Schemes = append(refused.Schemes, scheme)
		}
	}
	if lease == nil {
		if p.credential != nil && p.demand.none() {
			// It did not ask before. The next try takes its turn.
			p.demand.confirm()
			return ErrReconnect
		}
		refused.advice = p.adviceOnChallenge(refused.Schemes)
		return refused
	}
	p.demand.confirm()
	err := login.Challenged(challenges)
	switch {
	case err == nil && !refused.Denied:
		return nil
	case err == nil: // by Basic, which is not offered any more
		refused.advice = "it does not take Basic any more: the next try is by what it offers"
	case errors.Is(err, auth.ErrNotReady):
		return ErrReconnect
	case errors.Is(err, auth.ErrRefused):
		refused.Denied = true
		refused.advice = fmt.Sprintf("it refuses the user name or the password, sent by %s: correct them in %s", schemeName(login.Method()), accountUsage)
		if login.Method() == auth.Negotiate {
			refused.advice = "it refuses the Kerberos ticket: see its log; its keytab may be older than the key, or the clocks differ"
		}
	case errors.Is(err, auth.ErrUnsupported):
		refused.advice = p.adviceOnChallenge(refused.Schemes)
	default:
		refused.advice = "authentication cannot go on: " + err.Error()
	}
	return refused
}

// maxSchemes bounds the schemes that are told; 13 are registered with IANA, of
// which a proxy offers up to four.
const maxSchemes = 8

// accountUsage is where an account is given.
const accountUsage = "http://user:password@host:port (special characters percent-encoded) or --upstream-credentials"

// schemeName is a method as proxies write it.
func schemeName(m auth.Method) string {
	return map[auth.Method]string{auth.Basic: "Basic", auth.Digest: "Digest", auth.NTLM: "NTLM", auth.Negotiate: "Negotiate"}[m]
}

// adviceOnChallenge says what to do about challenges that are not answered.
func (p *Proxy) adviceOnChallenge(schemes []string) string {
	offers := func(name string) bool {
		return slices.ContainsFunc(schemes, func(scheme string) bool { return strings.EqualFold(scheme, name) })
	}
	all := strings.Join(schemes, ", ")
	known := offers("Basic") || offers("Digest") || offers("NTLM")
	switch {
	case len(schemes) == 0 && p.client != nil:
		return "it says no way to authenticate: is another proxy in between?"
	case p.client == nil && (known || len(schemes) == 0):
		return "it wants a user name and a password: give them as " + accountUsage
	case !known && offers("Negotiate"):
		return "it wants a Kerberos ticket (Negotiate): give user@REALM with a password, a keytab or a ccache in --upstream-credentials"
	case p.client == nil, !known:
		return fmt.Sprintf("it wants to authenticate by %s, of which none is supported: have Basic, Digest, NTLM or Negotiate enabled there", all)
	case p.client.Pinned() != auth.Auto:
		return fmt.Sprintf("it wants to authenticate by %s, and --upstream-auth %s allows no other: leave that out, or have %[2]s enabled there", all, p.client.Pinned())
	}
	return fmt.Sprintf("it wants to authenticate by %s, for none of which the account has what it takes: see --upstream-credentials", all)
}

// Requests is the authentication of requests in absolute form on one connection to a proxy.
// The zero value is ready. It is not safe for concurrent use.
type Requests struct {
	proxy *Proxy
	lease *Lease
	login auth.Exchange
}

// Begin starts a request on the connection under a lease, nil for none.
func (r *Requests) Begin(p *Proxy, lease *Lease, conn Conn) {
	r.proxy, r.lease = p, lease
	switch {
	case lease == nil:
		r.login = auth.Exchange{}
	case !r.login.Active():
		r.login = p.login(lease, binding(conn))
	}
}

// Authorization returns the value of the Proxy-Authorization field for a request, by its
// method and its target as it stands in the request line; empty for none.
func (r *Requests) Authorization(method string, target []byte) string {
	if !r.login.ForRequest() {
		target = nil // not to have it copied
	}
	return r.login.Authorization(method, string(target))
}

// Decisive reports whether the proxy can do nothing to the next request but take it or refuse
// it for good. One that it may answer with a question must not have a body that cannot be
// sent again: a request without one has to go ahead.
func (r *Requests) Decisive() bool { return r.lease == nil || r.login.Decisive() }

// Alone keeps what the proxy says on this connection from other connections, which makes
// the next request after a 407 decisive.
func (r *Requests) Alone() { r.login.Alone() }

// Judge takes the status of the proxy's final answer and the values of its Proxy-Authenticate
// fields. again says that it is the proxy's own 407 (Proxy Authentication Required) and that
// the request is to be sent once more, on this connection; where that cannot be, on another
// (ErrReconnect). Any other error is what is wrong with a 407. It settles the lease.
//
// The answer is the origin's if the proxy let the request through, which an error does not
// show. A 407 without a challenge is one that an origin sent: a proxy's has one (RFC 9110
// section 11.7.1), and squid takes that of an origin out.
func (r *Requests) Judge(status int, reason []byte, values [][]byte) (again bool, err error) {
	refused := &RefusedError{Code: status, Reason: sanitize(reason)}
	switch {
	case status == http.StatusProxyAuthRequired && len(values) > 0:
		var challenges []auth.Challenge
		for _, value := range values {
			challenges = auth.AppendChallenges(challenges, value)
		}
		if err := r.proxy.challenged(r.lease, &r.login, refused, challenges); err != nil {
			r.lease.Settle(err)
			return false, err
		}
		return true, nil
	case status < 400 || status == http.StatusNotFound:
		r.accepted(nil)
	default:
		r.accepted(refused)
	}
	return false, nil
}

// accepted settles the lease of a request that was answered.
func (r *Requests) accepted(err error) {
	r.login.Accepted()
	if r.lease != nil && !r.login.Proven() {
		if err == nil {
			r.proxy.demand.doubt()
		}
		r.lease.settle(notJudged)
		return
	}
	r.lease.Settle(err)
}

// Bound reports whether the method authenticates the connection and not the request.
func (r *Requests) Bound() bool { return r.login.Bound() }

// Pending reports whether the answer to a question of the proxy's is due, which only this
// connection can bring.
func (r *Requests) Pending() bool { return r.login.Pending() }

// ForRequest reports whether the next proof will be one for a certain request.
func (r *Requests) ForRequest() bool { return r.login.ForRequest() }

// Share undoes Alone for what the proxy has said since, because the connection ends.
func (r *Requests) Share() { r.login.Share() }
