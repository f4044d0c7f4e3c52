package pac

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// loadLimit bounds the whole of getting a script over the network. Hosts that
	// start together with their network wait for it.
	loadLimit = 15 * time.Second

	// connectLimit bounds one attempt to connect.
	connectLimit = 5 * time.Second

	// maxRedirects bounds the redirects that are followed; one or two occur.
	maxRedirects = 5
)

// source is where the script comes from.
type source struct {
	name   string // for messages: without a password
	file   string // the file's name, or empty
	url    string
	client *http.Client
	state  os.FileInfo // the file's when it was last read or looked at
}

func newSource(config Config) (*source, error) {
	location := config.Location
	if path, found := strings.CutPrefix(location, "file://"); found {
		location = path
	}
	if !strings.Contains(location, "://") {
		if location == "" {
			return nil, errors.New("the PAC script has no location: name a file or an http:// or https:// URL")
		}
		return &source{name: location, file: location}, nil
	}
	parsed, err := url.Parse(location)
	if err != nil {
		return nil, errors.New("the PAC script's URL cannot be read: write http://host/proxy.pac")
	}
	if err := fetchable(parsed); err != nil {
		return nil, err
	}
	parsed.Fragment = ""
	dialer := fetchDialer{config}
	return &source{
		name: parsed.Redacted(),
		url:  parsed.String(),
		client: &http.Client{
			CheckRedirect: checkRedirect,
			Timeout:       loadLimit,
			Transport: &http.Transport{
				Proxy:                  nil, // the script says which one: it cannot itself come through one
				DialContext:            dialer.dial,
				DisableKeepAlives:      true, // once an hour
				MaxResponseHeaderBytes: 64 << 10,
			},
		},
	}, nil
}

// fetchable tells whether a script can be had from a URL.
func fetchable(u *url.URL) error {
	if (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		return fmt.Errorf("%s: a PAC script comes from a file or from http:// or https://", u.Redacted())
	}
	return nil
}

// checkRedirect bounds redirects. One from https to http would give up the
// protection that was asked for.
func checkRedirect(request *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	if via[0].URL.Scheme == "https" && request.URL.Scheme != "https" {
		return fmt.Errorf("redirected from https to %s", request.URL.Redacted())
	}
	return fetchable(request.URL)
}

// load gets the script's text.
func (s *source) load(ctx context.Context) (string, error) {
	raw, latin, err := s.read(ctx)
	if err != nil {
		return "", fmt.Errorf("read the PAC script: %w", err)
	}
	if len(raw) > maxScript {
		return "", fmt.Errorf("read the PAC script: %s: more than %d KiB", s.name, maxScript>>10)
	}
	return decode(raw, latin), nil
}

// read returns the bytes, at most one more than maxScript, and whether the server
// calls them Latin-1.
func (s *source) read(ctx context.Context) (raw []byte, latin bool, err error) {
	if s.file != "" {
		file, err := os.Open(s.file)
		if err != nil {
			return nil, false, err
		}
		defer file.Close()
		// A pipe or a device could keep the program for ever.
		info, err := file.Stat()
		if err != nil {
			return nil, false, err
		}
		if !info.Mode().IsRegular() {
			return nil, false, fmt.Errorf("%s: not a file", s.file)
		}
		s.state = info
		raw, err = io.ReadAll(io.LimitReader(file, maxScript+1))
		return raw, false, err
	}

	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, false, err
	}
	// The type of a PAC script, and what servers that do not know it say instead.
	request.Header.Set("Accept", "application/x-ns-proxy-autoconfig, */*;q=0.8")
	response, err := s.client.Do(request)
	if err != nil {
		return nil, false, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, false, fmt.Errorf("%s: the server answers %s", s.name, response.Status)
	}
	raw, err = io.ReadAll(io.LimitReader(response.Body, maxScript+1))
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", s.name, err)
	}
	latin = strings.Contains(strings.ToLower(response.Header.Get("Content-Type")), "iso-8859-1")
	return raw, latin, nil
}

// changed tells, once for each change, whether the file is another one than was
// read. A file that is away has not changed: it is being replaced.
func (s *source) changed() bool {
	info, err := os.Stat(s.file)
	if err != nil {
		return false
	}
	same := s.state != nil && os.SameFile(info, s.state) && info.Size() == s.state.Size() && info.ModTime().Equal(s.state.ModTime())
	s.state = info
	return !same
}

// decode makes text of a script's bytes: UTF-8, with or without a byte order mark;
// Latin-1 when the server says so or when they are no UTF-8. In the latter case
// only comments matter, as a rule.
func decode(raw []byte, latin bool) string {
	text := strings.TrimPrefix(string(raw), "\ufeff")
	if len(text) < len(raw) || !latin && utf8.Valid(raw) {
		return strings.ToValidUTF8(text, "\ufffd")
	}
	runes := make([]rune, len(raw))
	for i, b := range raw {
		runes[i] = rune(b)
	}
	return string(runes)
}

// fetchDialer connects to the server of a script: past this program's own capture,
// and by the resolver that it was given.
type fetchDialer struct{ config Config }

func (d fetchDialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	if literal, err := netip.ParseAddr(host); err == nil {
		all = []netip.Addr{literal}
	} else if all, err = d.config.Resolve(ctx, host); err != nil {
		return nil, err
	}
	err = fmt.Errorf("look up %s: no address", host)
	dialer := net.Dialer{Control: d.config.Control, Timeout: connectLimit}
	for _, candidate := range all[:min(len(all), maxAddresses)] {
		var connection net.Conn
		if connection, err = dialer.DialContext(ctx, network, net.JoinHostPort(candidate.String(), port)); err == nil {
			return connection, nil
		}
	}
	return nil, err
}
