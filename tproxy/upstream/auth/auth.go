// Package auth proves to an HTTP proxy who the gateway is (RFC 9110 section 11.7): by
// Basic (RFC 7617), Digest (RFC 7616), NTLM version 2 ([MS-NLMP]) or Negotiate, which is
// Kerberos in SPNEGO (RFC 4559).
//
// An [Account] is who that is. A [Client] is what all flows to one proxy share: which
// method it takes, the nonce of Digest, the ticket of Kerberos. An [Exchange] is the
// conversation on one connection, a state machine that does no input or output: what
// Authorization to send with the next request, and what a 407 (Proxy Authentication
// Required) to that means. Only a proof that was refused is [ErrRefused]: a first bare
// 407, a nonce that is stale and the challenge of NTLM are steps on the way.
//
// Kerberos alone has to wait for a network. [Client.Ready] says whether it would, and
// [Client.Prepare] is where it does; no other function waits for anything.
//
// What a proxy says is hostile: it is bounded in bytes before it gets here, and no field
// of it is trusted to be where it says.
package auth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

// Method is a way to authenticate, in the order of their strength.
type Method uint8

// The methods.
const (
	Auto      Method = iota // the strongest that the proxy offers and the account can
	Basic                   // shows the password to whoever sees the request
	Digest                  // shows a hash of it that holds for one request
	NTLM                    // the same for a connection
	Negotiate               // shows a ticket
)

var methodNames = [...]string{"auto", "basic", "digest", "ntlm", "negotiate"}

// String returns the name of the method, in lower case as flags have it.
func (m Method) String() string { return methodNames[m] }

// ParseMethod reads what String returns.
func ParseMethod(text string) (Method, error) {
	for i, name := range methodNames {
		if strings.EqualFold(text, name) {
			return Method(i), nil
		}
	}
	return Auto, fmt.Errorf("%q is no way to authenticate: use %s", text, strings.Join(methodNames[:], ", "))
}

// Account is a user at a proxy and what proves it. It does not change and is safe for
// concurrent use.
type Account struct {
	// User is the name as it was given: user, DOMAIN\user or user@REALM.
	User string
	// Password is the secret; empty where Kerberos has something else.
	Password string
	// Kerberos is where tickets come from; nil without Kerberos.
	Kerberos *Kerberos

	basic string // the value of the Authorization
}

// NewAccount returns an account. What a protocol cannot send of it is for the caller to refuse,
// control characters above all: user and password go into fields of HTTP as they are.
func NewAccount(user, password string, kerberos *Kerberos) *Account {
	return &Account{
		User: user, Password: password, Kerberos: kerberos,
		basic: "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password)),
	}
}

func hasControl(text string) bool {
	return strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// Same reports whether both are there and say the same.
func (a *Account) Same(other *Account) bool {
	return a != nil && other != nil && a.User == other.User && a.Password == other.Password && a.Kerberos.same(other.Kerberos)
}

// hasPassword reports whether the methods that prove a password can be used.
func (a *Account) hasPassword() bool { return a.Password != "" || a.Kerberos == nil }

// split returns the user's name without the domain of DOMAIN\user, and that. The other
// form, user@REALM, is a name of its own to all but Kerberos.
func (a *Account) split() (user, domain string) {
	if domain, user, found := strings.Cut(a.User, `\`); found {
		return user, domain
	}
	return a.User, ""
}

// Why an exchange cannot go on.
var (
	// ErrRefused says that the proxy, or the key distribution centre, has refused a proof: the
	// user name or the password is wrong, and to try again may lock the account.
	ErrRefused = errors.New("the account is refused")
	// ErrNotReady says that a ticket is needed first: after Client.Prepare another
	// connection can go on.
	ErrNotReady = errors.New("a Kerberos ticket has to be fetched first")
	// ErrUnsupported says that the proxy offers no method that can be used.
	ErrUnsupported = errors.New("the proxy offers no way to authenticate that can be used")
)
