package auth

import (
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
)

// digest is a nonce that a proxy has given out, and what of it is the same for every
// request (RFC 7616). All flows share it: each takes a nonce count of its own.
//
// It is written here, and not taken from a library, because that has neither the -sess
// algorithms nor a nonce that many requests share; what is left is three hashes.
type digest struct {
	account   *Account // for which it was made
	algorithm algorithm
	realm     string
	nonce     string
	opaque    string
	user      string // the parameter, with its name
	cnonce    string
	a1        string // H(A1) of RFC 7616 section 3.4.2
	qop       bool   // with auth; else as RFC 2069 had it
	count     atomic.Uint32
}

// algorithm is what a proxy wants to have hashed with (RFC 7616 section 6.1).
type algorithm struct {
	name     string // as the proxy writes it; empty if it does not say
	hash     func() hash.Hash
	session  bool
	strength int // 0 for one that is not known
}

func parseAlgorithm(name string) algorithm {
	a := algorithm{name: name}
	base := strings.ToUpper(name)
	base, a.session = strings.CutSuffix(base, "-SESS")
	switch base {
	case "", "MD5":
		a.hash, a.strength = md5.New, 1
	case "SHA-256":
		a.hash, a.strength = sha256.New, 2
	case "SHA-512-256":
		a.hash, a.strength = sha512.New512_256, 2
	}
	return a
}

// maxNonce bounds what a proxy makes every request carry; squid's has 64 bytes at most,
// others put a time stamp and a hash into it.
const maxNonce = 1 << 10 // bytes, of the realm, the nonce and the opaque each

// parseDigest returns what a challenge of Digest asks for, nil if that cannot be done:
// an algorithm that is not known, or a quality of protection that covers the body.
func parseDigest(c *Challenge, account *Account) *digest {
	if !c.Is("Digest") {
		return nil
	}
	d := &digest{
		account: account, algorithm: parseAlgorithm(c.Param("algorithm")),
		realm: c.Param("realm"), nonce: c.Param("nonce"), opaque: c.Param("opaque"),
	}
	qop := strings.ToLower(c.Param("qop"))
	d.qop = slices.Contains(strings.FieldsFunc(qop, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' }), "auth")
	switch {
	case d.algorithm.strength == 0, d.nonce == "", qop != "" && !d.qop, d.algorithm.session && !d.qop,
		max(len(d.realm), len(d.nonce), len(d.opaque)) > maxNonce,
		hasControl(d.realm + d.nonce + d.opaque):
		return nil
	}
	random := make([]byte, 16)
	rand.Read(random)
	d.prepare(hex.EncodeToString(random), strings.EqualFold(c.Param("userhash"), "true"), strings.EqualFold(c.Param("charset"), "UTF-8"))
	return d
}

// prepare works out what is the same for all requests.
func (d *digest) prepare(cnonce string, userhash, utf8 bool) {
	user := d.account.User
	d.cnonce = cnonce
	d.a1 = d.sum(user, d.realm, d.account.Password)
	if d.algorithm.session {
		d.a1 = d.sum(d.a1, d.nonce, d.cnonce)
	}
	ascii := !strings.ContainsFunc(user, func(r rune) bool { return r > '~' })
	switch {
	case userhash:
		d.user = "username=" + quote(d.sum(user, d.realm)) + ", userhash=true"
	case !ascii && utf8: // RFC 7616 section 3.4; RFC 8187 section 3.2.1
		d.user = "username*=UTF-8''" + strings.ReplaceAll(url.QueryEscape(user), "+", "%20") + ", userhash=false"
	default:
		d.user = "username=" + quote(user)
	}
}

// sum is the hash of the parts with colons in between, in hexadecimal.
func (d *digest) sum(parts ...string) string {
	h := d.algorithm.hash()
	h.Write([]byte(strings.Join(parts, ":")))
	return hex.EncodeToString(h.Sum(nil))
}

// maxCount is how often a nonce is used at most: the count has eight hexadecimal digits,
// and a proxy that keeps a nonce that long does not watch over its use.
const maxCount = 1 << 31

// exhausted reports whether the nonce must not be used again.
func (d *digest) exhausted() bool { return d.count.Load() >= maxCount }

// authorization is the proof for one request.
func (d *digest) authorization(method, uri string) string {
	return d.proof(method, uri, d.count.Add(1))
}

func (d *digest) proof(method, uri string, count uint32) string {
	a2 := d.sum(method, uri)
	var text strings.Builder
	fmt.Fprintf(&text, "Digest %s, realm=%s, nonce=%s, uri=%s", d.user, quote(d.realm), quote(d.nonce), quote(uri))
	if d.qop {
		nc := fmt.Sprintf("%08x", count)
		fmt.Fprintf(&text, `, response="%s", qop=auth, nc=%s, cnonce="%s"`, d.sum(d.a1, d.nonce, nc, d.cnonce, "auth", a2), nc, d.cnonce)
	} else {
		fmt.Fprintf(&text, `, response="%s"`, d.sum(d.a1, d.nonce, a2))
	}
	if d.algorithm.name != "" {
		text.WriteString(", algorithm=" + d.algorithm.name)
	}
	if d.opaque != "" {
		text.WriteString(", opaque=" + quote(d.opaque))
	}
	return text.String()
}
