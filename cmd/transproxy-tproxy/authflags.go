package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

// authSettings is what is asked for about telling the proxy who the gateway is.
type authSettings struct {
	method      auth.Method
	credentials string // file; empty for none
	krb5Conf    string
	exposed     bool // a password stands on the command line
}

// authOptions are the flags about it.
func authOptions() []option {
	return []option{
		{
			groupUpstream, "upstream-auth", "METHOD", "auto", "how the proxy is told who the gateway is: basic, digest, ntlm, negotiate (Kerberos),\n" +
				"or auto, the strongest of what it offers",
			func(s *settings, v string) (err error) { s.auth.method, err = auth.ParseMethod(v); return err },
		},
		{
			groupUpstream, "upstream-credentials", "FILE", "", "lines of user = NAME, password = SECRET, keytab = FILE, ccache = FILE; after a line\n" +
				"[HOST] or [HOST:PORT] for that proxy alone; read again when it changes\n" +
				"(default: upstream-credentials in $CREDENTIALS_DIRECTORY, if that is there)",
			func(s *settings, v string) error { s.auth.credentials = v; return nil },
		},
		{
			groupUpstream, "krb5-conf", "FILE", "/etc/krb5.conf", "where the realms' key distribution centres are; without it the DNS says so",
			func(s *settings, v string) error { s.auth.krb5Conf = v; return nil },
		},
	}
}

// secret is what the credentials file says for a proxy.
type secret struct{ user, password, keytab, ccache string }

// maxCredentials bounds the file; a line of each kind has some tens of bytes.
const maxCredentials = 64 << 10 // bytes

// readCredentials reads a credentials file: what it says by the host, or host:port, of a
// proxy; of all others by "". Its errors quote no values.
func readCredentials(path string) (map[string]secret, error) {
	info, err := os.Stat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Size() > maxCredentials) {
		err = fmt.Errorf("%s: not a file of at most %d bytes", path, maxCredentials)
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, err
	}
	secrets, err := parseCredentials(string(text))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return secrets, nil
}

func parseCredentials(text string) (map[string]secret, error) {
	secrets, proxy := make(map[string]secret), ""
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]") {
			proxy = strings.ToLower(line[1 : len(line)-1])
			continue
		}
		name, value, found := strings.Cut(line, "=")
		of, value := secrets[proxy], strings.TrimSpace(value)
		switch name = strings.TrimSpace(name); {
		case !found:
			return nil, fmt.Errorf("line %d is neither NAME = VALUE nor [HOST]", i+1)
		case name == "user":
			of.user = value
		case name == "password":
			of.password = value
		case name == "keytab":
			of.keytab = value
		case name == "ccache":
			of.ccache = value
		default:
			return nil, fmt.Errorf("line %d: what stands before the = is not user, password, keytab or ccache", i+1)
		}
		secrets[proxy] = of
	}
	for proxy, of := range secrets {
		if of.user == "" && of.ccache == "" {
			if proxy == "" {
				proxy = "all proxies"
			}
			return nil, fmt.Errorf("no user for %s: add a line user = NAME", proxy)
		}
	}
	return secrets, nil
}

// credentialsFile is the one that is asked for, or that systemd brings; empty for none.
func (s *settings) credentialsFile() string {
	if directory := os.Getenv("CREDENTIALS_DIRECTORY"); s.auth.credentials == "" && directory != "" {
		path := filepath.Join(directory, "upstream-credentials")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return s.auth.credentials
}

// logIn tells all proxies by whom and how they are used.
func (s *settings) logIn() error {
	return errors.Join(s.logInAll(s.configured(), true), s.logInAll(s.script.named(), s.script.trusted()))
}

// logInAll tells some of them. The account for all proxies is for these if general is set.
func (s *settings) logInAll(proxies []*upstream.Proxy, general bool) error {
	var secrets map[string]secret
	if path := s.credentialsFile(); path != "" {
		var err error
		if secrets, err = readCredentials(path); err != nil {
			return fmt.Errorf("--upstream-credentials: %w", err)
		}
	}
	for _, proxy := range proxies {
		of, found := secrets[net.JoinHostPort(proxy.Host(), strconv.Itoa(int(proxy.Port())))]
		if !found {
			of, found = secrets[proxy.Host()]
		}
		if !found && general {
			of, found = secrets[""]
		}
		if account := proxy.Account(); !found && account != nil {
			of, found = secret{user: account.User, password: account.Password}, true
		}
		if err := s.logInTo(proxy, of, found); err != nil {
			return err
		}
	}
	return nil
}

// logInTo tells a proxy, if there is anything to tell.
func (s *settings) logInTo(proxy *upstream.Proxy, of secret, found bool) error {
	if proxy.Direct() {
		return nil
	}
	var account *auth.Account
	if found {
		kerberos, err := s.kerberos(of)
		if err != nil {
			return err
		}
		account = auth.NewAccount(of.user, of.password, kerberos)
	}
	if err := proxy.Login(account, s.auth.method); err != nil {
		return fmt.Errorf("the credentials for %s: %w", proxy, err)
	}
	return nil
}

// kerberos is where the tickets of an account come from; nil for an account that has none.
func (s *settings) kerberos(of secret) (*auth.Kerberos, error) {
	files := of.keytab != "" || of.ccache != ""
	if s.auth.method != auth.Auto && s.auth.method != auth.Negotiate || !files && s.auth.method == auth.Auto && !strings.Contains(of.user, "@") {
		return nil, nil
	}
	kerberos, err := auth.NewKerberos(auth.KerberosConfig{
		User: of.user, Password: of.password, Keytab: of.keytab, CCache: of.ccache,
		Conf: s.auth.krb5Conf, Control: markSockets(s.bypassMark()),
	})
	if err != nil && !files && s.auth.method == auth.Auto {
		return nil, nil // the other methods do without
	}
	return kerberos, err
}

// share makes one account of those that are the same, so that only one proxy at a time tries it.
func share(proxies []*upstream.Proxy) {
	for i, proxy := range proxies {
		for _, other := range proxies[:i] {
			proxy.Join(other)
		}
	}
}

// exposes reports whether a password stands in the arguments.
func exposes(arguments []string) bool {
	return slices.ContainsFunc(arguments, func(argument string) bool {
		start, end, found := password(argument)
		return found && start < end
	})
}

// warnOfSecrets tells of secrets that others can read.
func (g *gateway) warnOfSecrets() {
	if g.settings.auth.exposed {
		g.log.Warn().Msg("the proxy's password stands on the command line: ps shows it until this program has started, and shells keep it: give it in --upstream-credentials FILE or $https_proxy")
	}
	path := g.settings.credentialsFile()
	if info, err := os.Stat(path); path != "" && err == nil && info.Mode().Perm()&0o007 != 0 {
		g.log.Warn().Str("file", path).Msgf("everybody on this host can read or change the credentials (mode %04o): chmod 600 %s", info.Mode().Perm(), path)
	}
}

// credentialsInterval is how often the file is looked at: as fast as somebody who has
// changed it looks for the effect.
const credentialsInterval = 2 * time.Second

// watchCredentials reads the file again when it has changed.
func (g *gateway) watchCredentials(ctx context.Context) error {
	path := g.settings.credentialsFile()
	last := stateOf(path)
	ticker := time.NewTicker(credentialsInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now := stateOf(path)
		if now == last {
			continue
		}
		last = now
		switch err := g.settings.logIn(); {
		case errors.Is(err, os.ErrNotExist): // it is being replaced
		case err != nil:
			g.log.Error().Err(err).Msg("the credentials stay as they were")
		default:
			g.log.Info().Str("file", path).Msg("the credentials are read again")
		}
	}
}

// fileState is what changes when a file is written or replaced.
type fileState struct {
	written time.Time
	size    int64
	there   bool
}

func stateOf(path string) fileState {
	info, err := os.Stat(path)
	if err != nil {
		return fileState{}
	}
	return fileState{info.ModTime(), info.Size(), true}
}
