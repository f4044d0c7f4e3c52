package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/upstream/auth"
)

func TestCredentialsFile(t *testing.T) {
	const text = "# made by hand\nuser = D\\us er \npassword = a=b # c\n\n[proxy.test]\nuser=other\npassword=\n[Proxy.test:8080]\nccache = FILE:/tmp/krb5cc_0\n"
	secrets, err := parseCredentials(text)
	if err != nil {
		t.Fatal(err)
	}
	for proxy, want := range map[string]secret{
		"":                {user: `D\us er`, password: "a=b # c"},
		"proxy.test":      {user: "other"},
		"proxy.test:8080": {ccache: "FILE:/tmp/krb5cc_0"},
	} {
		if secrets[proxy] != want {
			t.Errorf("%q: %+v, want %+v", proxy, secrets[proxy], want)
		}
	}
	for text, says := range map[string]string{
		"user = u\nS3cret\n":        "line 2",
		"user = u\npasswort=S3cret": "line 2",
		"password = S3cret":         "no user for all proxies",
		"[h]\nkeytab = /S3cret":     "no user for h",
		"user = u\n[h]\nS3cret=1\n": "line 3",
	} {
		if _, err := parseCredentials(text); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "S3cret") {
			t.Errorf("%q: %v, want %q", text, err, says)
		}
	}
}

// TestAccounts: the file goes before the URL, the entry of a proxy before that of all, and
// one account is one credential.
func TestAccounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(path, []byte("user = all\npassword = p\n[c.test]\nuser = c\n[[::1]:8080]\nuser = six\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	proxies, err := upstream.ParseList("http://u:p@a.test,socks5://b.test,c.test,[::1]:8080,direct://")
	if err != nil {
		t.Fatal(err)
	}
	s := &settings{proxies: proxies, auth: authSettings{credentials: path}}
	if err := s.resolve(); err != nil {
		t.Fatal(err)
	}
	if err := s.logIn(); err != nil {
		t.Fatal(err)
	}
	var users []string
	for _, proxy := range proxies[:4] {
		users = append(users, proxy.Account().User)
	}
	if got := strings.Join(users, " "); got != "all all c six" || proxies[4].Account() != nil {
		t.Errorf("users %s", got)
	}
	share(proxies)
	if !proxies[0].Account().Same(proxies[1].Account()) {
		t.Error("one account is two")
	}
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Dir(path))
	s.auth.credentials = ""
	if got := s.credentialsFile(); got != "" {
		t.Errorf("took %s", got)
	}
	if err := os.Rename(path, filepath.Join(filepath.Dir(path), "upstream-credentials")); err != nil {
		t.Fatal(err)
	}
	if got := s.credentialsFile(); filepath.Base(got) != "upstream-credentials" {
		t.Errorf("took %q", got)
	}
	if err := os.WriteFile(path, []byte("user = a:b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.auth.credentials = path
	if err := s.logIn(); err == nil || strings.Contains(err.Error(), "a:b") {
		t.Errorf("a user that cannot be sent: %v", err)
	}
}

// TestKerberosAccounts: who has one.
func TestKerberosAccounts(t *testing.T) {
	for _, test := range []struct {
		of     secret
		method auth.Method
		want   bool
		fails  bool
	}{
		{secret{user: "u", password: "p"}, auth.Auto, false, false},
		{secret{user: "u@r.test", password: "p"}, auth.Auto, true, false},
		{secret{user: "u", keytab: "/k"}, auth.Auto, false, true}, // no realm
		{secret{user: "u@R", keytab: "/k"}, auth.Auto, true, false},
		{secret{user: `r.test\u`, password: "p"}, auth.Negotiate, true, false},
		{secret{user: "u", password: "p"}, auth.Negotiate, false, true},
		{secret{user: "u@R", password: "p"}, auth.Digest, false, false},
		{secret{ccache: "KEYRING:x"}, auth.Auto, false, true},
		{secret{ccache: "/tmp/x"}, auth.Auto, true, false},
	} {
		s := &settings{auth: authSettings{method: test.method, krb5Conf: filepath.Join(t.TempDir(), "none")}}
		kerberos, err := s.kerberos(test.of)
		if (kerberos != nil) != test.want || (err != nil) != test.fails {
			t.Errorf("%+v by %s: %t, %v", test.of, test.method, kerberos != nil, err)
		}
	}
}
