package auth

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func newClient(account *Account, pinned Method) *Client {
	var holder atomic.Pointer[Account]
	holder.Store(account)
	return NewClient(&holder, pinned, "Proxy.test")
}

// TestDigestExamples are those of RFC 7616 section 3.9.1.
func TestDigestExamples(t *testing.T) {
	for _, test := range []struct{ algorithm, response string }{
		{"MD5", "8ca523f5e9506fed4657c9700eebdbec"},
		{"SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"},
	} {
		challenges := AppendChallenges(nil, []byte(`Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm=`+test.algorithm+
			`, nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"`))
		d := parseDigest(&challenges[0], NewAccount("Mufasa", "Circle of Life", nil))
		if d == nil {
			t.Fatal("not understood")
		}
		d.prepare("f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ", false, false)
		if proof := d.proof("GET", "/dir/index.html", 1); !strings.Contains(proof, `response="`+test.response+`"`) || !strings.Contains(proof, "nc=00000001") {
			t.Errorf("%s: %s", test.algorithm, proof)
		}
	}
}

// TestDigestUserhash is the example of RFC 7616 section 3.9.2, whose algorithm and user are of
// the rare kinds. Its response is that of SHA-512/256 as errata 4897 has it.
func TestDigestUserhash(t *testing.T) {
	challenges := AppendChallenges(nil, []byte(`Digest realm="api@example.org", qop="auth", algorithm=SHA-512-256, charset=UTF-8, userhash=true,`+
		` nonce="5TsQWLVdgBdmrQ0XsxbDODV+57QdFR34I9HAbC/RVvkK", opaque="HRPCssKJSGjCrkzDg8OhwpzCiGPChXYjwrI2QmXDnsOS"`))
	d := parseDigest(&challenges[0], NewAccount("J\u00e4s\u00f8n Doe", "Secret, or not?", nil))
	if d == nil || !strings.Contains(d.user, "userhash=true") {
		t.Fatal("not understood")
	}
	d.prepare("NTg6RKcb9boFIAS3KrFK9BGeh+iDa/sm6jUMp2wds69v", true, true)
	const user, response = "793263caabb707a56211940d90411ea4a575adeccb7e360aeb624ed06ece9b0b", "3798d4131c277846293534c3edc11bd8a5e4cdcbff78b05db9d95eeb1cec68a5"
	if proof := d.proof("GET", "/doe.json", 1); !strings.Contains(proof, user) || !strings.Contains(proof, response) {
		t.Error(proof)
	}
}

// TestDigestCounts: many at once never use a count twice.
func TestDigestCounts(t *testing.T) {
	client := newClient(NewAccount("u", "p", nil), Auto)
	first := client.Exchange(nil)
	first.Authorization("CONNECT", "a:1")
	if err := first.Challenged(AppendChallenges(nil, []byte(`Digest realm=r, nonce=n, qop=auth, algorithm=MD5-sess`))); err != nil {
		t.Fatal(err)
	}
	var flows sync.WaitGroup
	var seen sync.Map
	for range 16 {
		flows.Go(func() {
			for range 100 {
				e := client.Exchange(nil)
				proof := AppendChallenges(nil, []byte(e.Authorization("CONNECT", "a:1")))
				if _, twice := seen.LoadOrStore(proof[0].Param("nc"), true); twice {
					t.Error("a count was used twice")
				}
			}
		})
	}
	flows.Wait()
}

// The values of [MS-NLMP] section 4.2, which all its examples share.
var (
	ntlmAccount = NewAccount(`Domain\User`, "Password", nil)
	ntlmServer  = [8]byte{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}
	ntlmClient  = [8]byte{0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa}
)

// ntlmMessage is the second message of section 4.2.4.3.
const ntlmMessage = "4e544c4d53535000020000000c000c003800000033828ae20123456789abcdef00000000000000002400240044000000060070170000000f53006500720076006500720002000c0044006f006d00610069006e0001000c0053006500720076006500720000000000"

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	data, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestNTLMVectors(t *testing.T) {
	key := ntlmKey("User", "Domain", "Password")
	if got := hex.EncodeToString(key); got != "0c868a403bfd7a93a3001ef22ef02e3f" { // 4.2.4.1.1
		t.Errorf("NTOWFv2 %s", got)
	}
	challenge, err := parseNTLM(unhex(t, ntlmMessage))
	if err != nil {
		t.Fatal(err)
	}
	if challenge.server != ntlmServer || hex.EncodeToString(challenge.info) != "02000c0044006f006d00610069006e0001000c00530065007200760065007200" {
		t.Fatalf("read %x, %x", challenge.server, challenge.info)
	}
	response, session := ntlmProof(key, ntlmServer, ntlmClient, make([]byte, 8), append(challenge.info, 0, 0, 0, 0))
	if got := hex.EncodeToString(response[:16]); got != "68cd0ab851e51c96aabc927bebef6a1c" { // 4.2.4.2.2
		t.Errorf("NTProofStr %s", got)
	}
	if got := hex.EncodeToString(session); got != "8de40ccadbc14a82f15cb0ad0de95ca3" { // 4.2.4.1.2
		t.Errorf("SessionBaseKey %s", got)
	}
	message := challenge.answer(ntlmAccount, "HTTP/proxy.test", nil, ntlmRandom{challenge: ntlmClient})
	lm := unhex(t, "86c35097ac9cec102554764a57cccc19aaaaaaaaaaaaaaaa") // 4.2.4.2.1
	if !bytes.Contains(message, lm) || message[8] != 3 {
		t.Errorf("the third message is %x", message)
	}
}

// TestNTLMIntegrity: with the server's time there are a code, a target and a binding, and
// no proof by LM.
func TestNTLMIntegrity(t *testing.T) {
	info := appendAttribute(unhex(t, "02000c0044006f006d00610069006e00"), avTime, make([]byte, 8))
	info = append(appendAttribute(info, avFlags, []byte{4, 0, 0, 0}), 0, 0, 0, 0)
	message := unhex(t, ntlmMessage)[:56]
	copy(message[40:], []byte{byte(len(info)), 0, byte(len(info)), 0, 56, 0, 0, 0})
	challenge, err := parseNTLM(append(message, info...))
	if err != nil {
		t.Fatal(err)
	}
	binding := Binding(&x509.Certificate{Raw: []byte("certificate"), SignatureAlgorithm: x509.SHA256WithRSA})
	answer := challenge.answer(ntlmAccount, "HTTP/proxy.test", binding, ntlmRandom{challenge: ntlmClient})
	attributes := challenge.attributes("HTTP/proxy.test", binding)
	for name, want := range map[string][]byte{
		"flags":   {avFlags, 0, 4, 0, 6, 0, 0, 0},
		"binding": append([]byte{avBinding, 0, 16, 0}, binding...),
		"target":  utf16LE("HTTP/proxy.test"),
	} {
		if !bytes.Contains(attributes, want) || !bytes.Contains(answer, want) {
			t.Errorf("no %s in %x", name, attributes)
		}
	}
	_, session := ntlmProof(ntlmKey("User", "Domain", "Password"), ntlmServer, ntlmClient, make([]byte, 8), attributes)
	code := append([]byte(nil), answer[72:88]...)
	clear(answer[72:88])
	if !bytes.Equal(code, hmacMD5(session, ntlmNegotiate(), challenge.message, answer)) || bytes.Equal(code, make([]byte, 16)) {
		t.Errorf("code %x", code)
	}
	if !bytes.Equal(answer[88:112], make([]byte, 24)) {
		t.Errorf("LM %x", answer[88:112])
	}
}

func TestChallenges(t *testing.T) {
	for _, test := range []struct{ value, want string }{
		{`Basic realm="a, b"`, "Basic[realm=a, b]"},
		{`Negotiate, NTLM TlRMTVNTUAAC==,Basic`, "Negotiate NTLM(TlRMTVNTUAAC==) Basic"},
		{`Digest realm="\"x\\", nonce = n , qop="auth", Basic realm=y`, `Digest[realm="x\ nonce=n qop=auth] Basic[realm=y]`},
		{`Negotiate YII=`, "Negotiate(YII=)"},
		{`a=b, ,=, "x", c`, "c"},
		{`Basic realm="open`, "Basic"},
		{`Basic realm="x"y, Digest`, "Basic Digest"},
	} {
		var got []string
		for _, c := range AppendChallenges(nil, []byte(test.value)) {
			text := c.Scheme
			if c.Token != "" {
				text += "(" + c.Token + ")"
			}
			var params []string
			for _, p := range c.Params {
				params = append(params, p.Name+"="+p.Value)
			}
			if params != nil {
				text += "[" + strings.Join(params, " ") + "]"
			}
			got = append(got, text)
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: %q, want %q", test.value, got, test.want)
		}
	}
}

// TestSPNEGOReply reads answers made by hand: accepted, rejected, and others.
func TestSPNEGOReply(t *testing.T) {
	for token, want := range map[string]replyState{
		"a1073005a0030a0100": 0, "a1073005a0030a0102": replyRejected, "": replyUnknown, "a1": replyUnknown, "60023000": replyUnknown, "a1023000": replyUnknown,
	} {
		if got := parseReply(unhex(t, token)); got != want {
			t.Errorf("%s: %d, want %d", token, got, want)
		}
	}
	if err := refusedToken("oQcwBaADCgEB"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "state 1") {
		t.Error(err)
	}
}

func FuzzChallenges(f *testing.F) {
	for _, seed := range []string{`Digest realm="a", nonce="n", qop="auth,auth-int", algorithm=MD5-sess, Basic`, `NTLM TlRM==`, `,,="\`} {
		f.Add([]byte(seed))
	}
	account := NewAccount("u", "p", nil)
	f.Fuzz(func(t *testing.T, value []byte) {
		challenges := AppendChallenges(nil, value)
		if len(challenges) > maxChallenges {
			t.Fatal("not bounded")
		}
		for i := range challenges {
			c := &challenges[i]
			if c.Scheme == "" || len(c.Params) > maxParams || !bytes.Contains(value, []byte(c.Scheme)) || !bytes.Contains(value, []byte(c.Token)) {
				t.Fatalf("%+v", c)
			}
			if d := parseDigest(c, account); d != nil {
				if proof := d.authorization("CONNECT", "a:1"); strings.ContainsAny(proof, "\r\n") || len(AppendChallenges(nil, []byte(proof))) != 1 {
					t.Fatalf("%q", proof)
				}
			}
		}
		client := newClient(account, Auto)
		e := client.Exchange(nil)
		for range 10 {
			e.Authorization("CONNECT", "a:1")
			if err := e.Challenged(challenges); err != nil {
				return
			}
		}
		t.Fatal("it goes on for ever")
	})
}

func FuzzNTLM(f *testing.F) {
	f.Add(unhex(f, ntlmMessage))
	f.Fuzz(func(t *testing.T, message []byte) {
		challenge, err := parseNTLM(message)
		if err != nil {
			return
		}
		if answer := challenge.authenticate(ntlmAccount, "HTTP/p", nil); answer[8] != 3 {
			t.Fatalf("%x", answer)
		}
	})
}

func FuzzSPNEGO(f *testing.F) {
	f.Add(unhex(f, "a1073005a0030a0100"))
	f.Fuzz(func(t *testing.T, token []byte) {
		parseReply(token)
		if err := refusedToken(base64.StdEncoding.EncodeToString(token)); !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
	})
}
