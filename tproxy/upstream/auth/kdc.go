package auth

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jcmturner/gokrb5/v8/credentials"
	"github.com/jcmturner/gokrb5/v8/crypto"
	"github.com/jcmturner/gokrb5/v8/iana/errorcode"
	"github.com/jcmturner/gokrb5/v8/iana/keyusage"
	"github.com/jcmturner/gokrb5/v8/iana/nametype"
	"github.com/jcmturner/gokrb5/v8/iana/patype"
	"github.com/jcmturner/gokrb5/v8/keytab"
	"github.com/jcmturner/gokrb5/v8/messages"
	"github.com/jcmturner/gokrb5/v8/types"
)

// loadCCache returns the ticket-granting ticket of a credential cache.
func loadCCache(path string) (*ticket, error) {
	text, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("ccache: %w", err)
	}
	var cache credentials.CCache
	if err := cache.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("ccache %s: %w", path, err)
	}
	realm := cache.GetClientRealm()
	entry, found := cache.GetEntry(types.PrincipalName{NameType: nametype.KRB_NT_SRV_INST, NameString: []string{"krbtgt", realm}})
	if !found {
		return nil, fmt.Errorf("ccache %s: it has no ticket-granting ticket of %s: run kinit", path, realm)
	}
	t := &ticket{client: cache.GetClientPrincipalName(), realm: realm, key: entry.Key, start: entry.AuthTime, end: entry.EndTime}
	if err := t.Ticket.Unmarshal(entry.Ticket); err != nil {
		return nil, fmt.Errorf("ccache %s: %w", path, err)
	}
	if !t.holds(time.Now()) {
		return nil, fmt.Errorf("ccache %s: the ticket has expired at %s: run kinit", path, t.end.Format(time.RFC3339))
	}
	return t, nil
}

// login gets the ticket-granting ticket (RFC 4120 section 3.1), with at most one proof of
// the account's secret.
func (k *Kerberos) login(ctx context.Context) (*ticket, error) {
	client := types.NewPrincipalName(nametype.KRB_NT_PRINCIPAL, k.user)
	secret := credentials.New(k.user, k.realm)
	request, err := messages.NewASReqForTGT(k.realm, k.conf, client)
	if err != nil {
		return nil, err
	}
	var keys *keytab.Keytab
	if k.source.Keytab != "" {
		if keys, err = loadKeytab(k.source.Keytab); err != nil {
			return nil, err
		}
		secret.WithKeytab(keys)
		request.ReqBody.EType = slices.DeleteFunc(slices.Clone(request.ReqBody.EType), func(kind int32) bool {
			_, _, err := keys.GetEncryptionKey(client, k.realm, 0, kind)
			return err != nil
		})
		if len(request.ReqBody.EType) == 0 {
			return nil, fmt.Errorf("keytab %s: it has no key of %s@%s that can be used: look at it with klist -ke", k.source.Keytab, k.user, k.realm)
		}
	} else {
		secret.WithPassword(k.source.Password)
	}
	reply, err := k.exchange(ctx, k.realm, request.Marshal)
	if demand, ok := errors.AsType[messages.KRBError](err); ok && demand.ErrorCode == errorcode.KDC_ERR_PREAUTH_REQUIRED {
		if err := k.preauthenticate(&request, &demand, client, keys); err != nil {
			return nil, err
		}
		reply, err = k.exchange(ctx, k.realm, request.Marshal)
	}
	if err != nil {
		return nil, k.diagnose(err)
	}
	var answer messages.ASRep
	if err := answer.Unmarshal(reply); err != nil {
		return nil, fmt.Errorf("log in to %s: %w", k.realm, err)
	}
	if ok, err := answer.Verify(k.conf, secret, request); !ok {
		return nil, fmt.Errorf("log in to %s: %w", k.realm, err)
	}
	part := answer.DecryptedEncPart
	return &ticket{Ticket: answer.Ticket, client: client, realm: k.realm, key: part.Key, start: part.AuthTime, end: part.EndTime}, nil
}

func loadKeytab(path string) (*keytab.Keytab, error) {
	text, err := readFile(path)
	if err != nil {
		return nil, fmt.Errorf("keytab: %w", err)
	}
	keys := keytab.New()
	if err := keys.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("keytab %s: %w", path, err)
	}
	return keys, nil
}

// preauthenticate adds the proof that the centre wants: the time, encrypted with a key of
// the account (RFC 4120 section 5.2.7.2).
func (k *Kerberos) preauthenticate(request *messages.ASReq, demand *messages.KRBError, client types.PrincipalName, keys *keytab.Keytab) error {
	var hints types.PADataSequence
	if err := hints.Unmarshal(demand.EData); err != nil {
		return fmt.Errorf("log in to %s: %w", k.realm, err)
	}
	for _, kind := range offeredKinds(hints) {
		if !slices.Contains(request.ReqBody.EType, kind) {
			continue
		}
		var key types.EncryptionKey
		var version int
		var err error
		if keys != nil {
			key, version, err = keys.GetEncryptionKey(client, k.realm, 0, kind)
		} else {
			key, _, err = crypto.GetKeyFromPassword(k.source.Password, client, k.realm, kind, hints)
		}
		if err != nil {
			return fmt.Errorf("log in to %s: %w", k.realm, err)
		}
		now, err := types.GetPAEncTSEncAsnMarshalled()
		if err != nil {
			return err
		}
		proof, err := crypto.GetEncryptedData(now, key, keyusage.AS_REQ_PA_ENC_TIMESTAMP, version)
		if err != nil {
			return err
		}
		value, err := proof.Marshal()
		if err != nil {
			return err
		}
		request.PAData = append(request.PAData, types.PAData{PADataType: patype.PA_ENC_TIMESTAMP, PADataValue: value})
		return nil
	}
	return fmt.Errorf("log in to %s: it takes none of the kinds of encryption that krb5.conf allows", k.realm)
}

// offeredKinds are the kinds of encryption that a centre has keys of for the account.
func offeredKinds(hints types.PADataSequence) (kinds []int32) {
	for _, hint := range hints {
		if hint.PADataType != patype.PA_ETYPE_INFO2 {
			continue
		}
		info, err := hint.GetETypeInfo2()
		if err != nil {
			continue
		}
		for _, entry := range info {
			kinds = append(kinds, entry.EType)
		}
	}
	return kinds
}

// maxReferrals bounds the realms on the way to a service's; the library has the same.
const maxReferrals = 5

// grant gets the ticket of a service (RFC 4120 section 3.3), from realm to realm as the
// centres refer to one another (RFC 6806 section 8).
func (k *Kerberos) grant(ctx context.Context, granting *ticket, service string) (*ticket, error) {
	name := types.NewPrincipalName(nametype.KRB_NT_SRV_HST, service)
	conf := *k.conf
	conf.LibDefaults.Canonicalize = true // allows referrals
	by, realm := granting, granting.realm
	for range maxReferrals {
		request, err := messages.NewTGSReq(by.client, realm, &conf, by.Ticket, by.key, name, false)
		if err != nil {
			return nil, err
		}
		reply, err := k.exchange(ctx, realm, request.Marshal)
		if err != nil {
			return nil, fmt.Errorf("get a ticket for %s: %w", service, k.diagnoseService(err, service))
		}
		var answer messages.TGSRep
		if err := answer.Unmarshal(reply); err != nil {
			return nil, fmt.Errorf("get a ticket for %s: %w", service, err)
		}
		if err := answer.DecryptEncPart(by.key); err != nil {
			return nil, fmt.Errorf("get a ticket for %s: %w", service, err)
		}
		if answer.DecryptedEncPart.Nonce != request.ReqBody.Nonce || !answer.CName.Equal(by.client) {
			return nil, fmt.Errorf("get a ticket for %s: the answer is one to another question", service)
		}
		part := answer.DecryptedEncPart
		next := &ticket{Ticket: answer.Ticket, client: by.client, realm: by.realm, key: part.Key, start: time.Now(), end: part.EndTime}
		names := answer.Ticket.SName.NameString
		if len(names) != 2 || names[0] != "krbtgt" {
			return next, nil
		}
		by, realm = next, names[1]
	}
	return nil, fmt.Errorf("get a ticket for %s: more than %d realms on the way", service, maxReferrals)
}

// diagnose says what a refused log-in means.
func (k *Kerberos) diagnose(err error) error {
	answer, ok := errors.AsType[messages.KRBError](err)
	if !ok {
		return fmt.Errorf("log in to %s: %w", k.realm, err)
	}
	reason := ""
	switch answer.ErrorCode {
	case errorcode.KDC_ERR_C_PRINCIPAL_UNKNOWN:
		reason = "the account is not known"
	case errorcode.KDC_ERR_CLIENT_REVOKED:
		reason = "the account is locked"
	case errorcode.KDC_ERR_KEY_EXPIRED:
		reason = "the password has expired"
	case errorcode.KDC_ERR_PREAUTH_FAILED:
		reason = "the password is wrong"
	case errorcode.KRB_AP_ERR_SKEW:
		return fmt.Errorf("log in to %s: this host's clock is wrong: set it", k.realm)
	default:
		return fmt.Errorf("log in to %s: the key distribution centre answered %s", k.realm, errorcode.Lookup(answer.ErrorCode))
	}
	return fmt.Errorf("the key distribution centre of %s: %s: correct it in --upstream-credentials: %w", k.realm, reason, ErrRefused)
}

// diagnoseService says what a refused ticket means.
func (k *Kerberos) diagnoseService(err error, service string) error {
	answer, ok := errors.AsType[messages.KRBError](err)
	switch {
	case !ok:
		return err
	case answer.ErrorCode == errorcode.KDC_ERR_S_PRINCIPAL_UNKNOWN:
		return fmt.Errorf("the key distribution centre does not know the service: give the proxy by the name that it has there (not by address or alias), or have %s added", service)
	}
	return fmt.Errorf("the key distribution centre answered %s", errorcode.Lookup(answer.ErrorCode))
}

const (
	// kdcTime is how long one centre may take to connect and answer, of several.
	kdcTime = 5 * time.Second
	// maxKDCReply bounds an answer; a ticket of somebody in many groups has 64 KiB at most.
	maxKDCReply = 128 << 10 // bytes
	// kdcPort is that of RFC 4120 section 7.2.3.2.
	kdcPort = "88"
	// maxKDCs bounds how many are tried.
	maxKDCs = 4
)

// exchange asks the centres of a realm, one after the other, by TCP, which each must have
// (RFC 4120 section 7.2.2). An error of the protocol is a messages.KRBError.
func (k *Kerberos) exchange(ctx context.Context, realm string, marshal func() ([]byte, error)) ([]byte, error) {
	request, err := marshal()
	if err != nil {
		return nil, err
	}
	centres, err := k.centres(ctx, realm)
	if err != nil {
		return nil, err
	}
	var failure error
	for _, centre := range centres[:min(len(centres), maxKDCs)] {
		reply, err := k.ask(ctx, centre, request)
		if err == nil {
			var refused messages.KRBError
			if refused.Unmarshal(reply) == nil {
				return nil, refused
			}
			return reply, nil
		}
		if failure == nil {
			failure = fmt.Errorf("key distribution centre %s: %w", centre, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failure
}

// centres are the addresses of a realm's key distribution centres: those in krb5.conf,
// else what the DNS says (RFC 4120 section 7.2.3.2).
func (k *Kerberos) centres(ctx context.Context, realm string) (centres []string, err error) {
	for _, known := range k.conf.Realms {
		if !strings.EqualFold(known.Realm, realm) {
			continue
		}
		for _, centre := range known.KDC {
			if _, _, err := net.SplitHostPort(centre); err != nil {
				centre = net.JoinHostPort(strings.Trim(centre, "[]"), kdcPort)
			}
			centres = append(centres, centre)
		}
	}
	if len(centres) > 0 {
		return centres, nil
	}
	ctx, cancel := context.WithTimeout(ctx, kdcTime)
	defer cancel()
	_, records, err := k.resolver().LookupSRV(ctx, "kerberos", "tcp", realm)
	for _, record := range records {
		centres = append(centres, net.JoinHostPort(record.Target, strconv.Itoa(int(record.Port))))
	}
	if len(centres) == 0 {
		return nil, fmt.Errorf("no key distribution centre of %s: name it in krb5.conf (--krb5-conf), or have the DNS say _kerberos._tcp.%[1]s: %w", realm, err)
	}
	return centres, nil
}

// ask sends a request to one centre.
func (k *Kerberos) ask(ctx context.Context, centre string, request []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, kdcTime)
	defer cancel()
	conn, err := k.dialer().DialContext(ctx, "tcp", centre)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// A deadline in the past interrupts it.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	framed := append(binary.BigEndian.AppendUint32(nil, uint32(len(request))), request...)
	if _, err := conn.Write(framed); err != nil {
		return nil, err
	}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length == 0 || length > maxKDCReply {
		return nil, fmt.Errorf("an answer of %d bytes: is this a key distribution centre?", length)
	}
	reply := make([]byte, length)
	_, err = io.ReadFull(conn, reply)
	return reply, err
}
