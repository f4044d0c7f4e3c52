package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jcmturner/gokrb5/v8/iana/nametype"
	"github.com/jcmturner/gokrb5/v8/messages"
	"github.com/jcmturner/gokrb5/v8/types"
)

// Tickets of a real key distribution centre are those of test/interop.

func testTicket(end time.Time) *ticket {
	t := &ticket{
		client: types.NewPrincipalName(nametype.KRB_NT_PRINCIPAL, "gateway"), realm: "COMPANY.TEST",
		key: types.EncryptionKey{KeyType: 18, KeyValue: bytes.Repeat([]byte{7}, 32)}, start: time.Now(), end: end,
	}
	t.Ticket = messages.Ticket{
		TktVNO: 5, Realm: t.realm, SName: types.NewPrincipalName(nametype.KRB_NT_SRV_HST, "HTTP/proxy.test"),
		EncPart: types.EncryptedData{EType: 18, Cipher: []byte("sealed")},
	}
	return t
}

// TestKerberosProof reads back what a service would: the binding, and never the same time twice.
func TestKerberosProof(t *testing.T) {
	k := &Kerberos{tickets: map[string]*ticket{"HTTP/proxy.test": testTicket(time.Now().Add(time.Hour))}}
	binding := bytes.Repeat([]byte{9}, 16)
	var latest time.Time
	for range 100 {
		token := k.token("HTTP/proxy.test", binding)
		start := bytes.Index(token, append(append([]byte(nil), oidKerberos...), 1, 0))
		// The first is the one in the list of mechanisms, which no token identifier follows.
		if !bytes.HasPrefix(token, []byte{0x60}) || start < 0 {
			t.Fatalf("token %x", token)
		}
		var request messages.APReq
		if err := request.Unmarshal(token[start+len(oidKerberos)+2:]); err != nil {
			t.Fatal(err)
		}
		if err := request.DecryptAuthenticator(k.tickets["HTTP/proxy.test"].key); err != nil {
			t.Fatal(err)
		}
		a := request.Authenticator
		if !bytes.Equal(a.Cksum.Checksum[4:20], binding) || a.CRealm != "COMPANY.TEST" {
			t.Fatalf("%+v", a)
		}
		at := a.CTime.Add(time.Duration(a.Cusec) * time.Microsecond)
		if !at.After(latest) {
			t.Fatalf("%s follows %s", at, latest)
		}
		latest = at
	}
	if k.token("HTTP/other.test", nil) != nil {
		t.Error("a token without a ticket")
	}
}

// TestTicketTimes: a ticket is renewed when a tenth of its time is left, and used for longer
// where that fails.
func TestTicketTimes(t *testing.T) {
	now := time.Now()
	whole := &ticket{start: now, end: now.Add(10 * time.Hour)}
	for after, want := range map[time.Duration][2]bool{
		0: {true, true}, 8 * time.Hour: {true, true}, 9*time.Hour + time.Minute: {true, false},
		10*time.Hour - 30*time.Second: {false, false}, 11 * time.Hour: {false, false},
	} {
		if at := now.Add(after); whole.holds(at) != want[0] || whole.fresh(at) != want[1] {
			t.Errorf("after %s: holds %t, fresh %t", after, whole.holds(at), whole.fresh(at))
		}
	}
	var none *ticket
	if none.holds(now) || none.fresh(now) {
		t.Error("nothing is a ticket")
	}
}

// TestHostileKDC: whatever it answers is an error in bounded time and memory, which all flows
// that wait share.
func TestHostileKDC(t *testing.T) {
	for name, answer := range map[string]string{
		"nothing": "", "endless": "\xff\xff\xff\xff", "empty": "\x00\x00\x00\x00", "cut": "\x00\x00\x00\x09abc",
		"garbage": "\x00\x00\x00\x04abcd", "bare sequence": "\x00\x00\x00\x04\x6b\x02\x30\x00", "bare error": "\x00\x00\x00\x04\x7e\x02\x30\x00",
	} {
		t.Run(name, func(t *testing.T) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			asked := 0
			var serving sync.WaitGroup
			serving.Go(func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					asked++
					conn.Read(make([]byte, 4096))
					io.WriteString(conn, answer)
					conn.Close()
				}
			})
			conf := filepath.Join(t.TempDir(), "krb5.conf")
			text := fmt.Sprintf("[realms]\n\tR.TEST = {\n\t\tkdc = %s\n\t}\n", listener.Addr())
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			k, err := NewKerberos(KerberosConfig{User: "u@r.test", Password: "p", Conf: conf})
			if err != nil {
				t.Fatal(err)
			}
			var flows sync.WaitGroup
			for range 20 {
				flows.Go(func() {
					if err := k.prepare(t.Context(), "HTTP/proxy.test"); err == nil || errors.Is(err, ErrRefused) {
						t.Errorf("error %v", err)
					}
				})
			}
			flows.Wait()
			listener.Close()
			serving.Wait()
			if asked != 1 {
				t.Errorf("asked %d times", asked)
			}
		})
	}
}

// TestWaitingForATicketEnds with the flow that waits, and says nothing about the centre.
func TestWaitingForATicketEnds(t *testing.T) {
	k, err := NewKerberos(KerberosConfig{User: "u@R.TEST", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	k.busy <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.prepare(ctx, "HTTP/p"); !errors.Is(err, context.Canceled) || k.failure() != nil {
		t.Errorf("%v, %v", err, k.failure())
	}
}
