package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
	"github.com/transproxy-tproxy/transproxy-tproxy/test/netns"
)

// What the demo's proxy demands, and how that is written in a URL.
const (
	demoUser     = "us er"
	demoPassword = "p@ss:w/o%rd"
	demoUserInfo = "us%20er:p%40ss%3Aw%2Fo%25rd"
)

// Names of the demo's origin, over IPv4 and over IPv6.
const (
	demoName  = "www.example.org"
	demoName6 = "six.example.org"
)

// demoLimit bounds each step of the demo, all of which take milliseconds.
const demoLimit = 3 * time.Second

// stage is the demo's network with its servers.
type stage struct {
	lab     *lab.Lab
	proxy   *lab.ConnectProxy
	origin  *lab.Origin
	past    *lab.Origin // what is reached past the proxy
	client  *http.Client
	program *program
}

func newStage() (*stage, error) {
	l, err := lab.Routed()
	if err != nil {
		return nil, err
	}
	names := map[string]netip.Addr{demoName: lab.Origin4, demoName6: lab.Origin6}
	s := &stage{
		lab:    l,
		proxy:  &lab.ConnectProxy{User: demoUser, Password: demoPassword, Hosts: names},
		origin: &lab.Origin{Label: "the origin's"},
		past:   &lab.Origin{Label: "past the proxy:"},
	}
	err = errors.Join(
		s.origin.Start(l.Origin, []string{demoName, demoName6}, nil),
		s.past.Start(l.Router, nil, nil),
		s.proxy.Start(l.Proxy, lab.ProxyPort))
	if err != nil {
		s.close()
		return nil, err
	}
	s.client = lab.HTTPClient(l.Client, names, s.origin.Roots())
	s.client.Timeout = demoLimit
	return s, nil
}

func (s *stage) close() {
	if s.program != nil {
		s.program.stop(unix.SIGKILL)
	}
	s.proxy.Close()
	s.origin.Close()
	s.past.Close()
	s.lab.Close()
}

// start runs the gateway, as a user would.
func (s *stage) start() (err error) {
	s.program, err = startProgram(s.lab.Gateway,
		"--upstream", fmt.Sprintf("http://%s@%s:%d", demoUserInfo, lab.Proxy4, lab.ProxyPort),
		"--tcp-proxy-dports", fmt.Sprintf("22,%d", lab.PortDigest))
	return err
}

// check is one line of the demo's table.
type check struct {
	name string
	run  func() (seen string, err error)
}

func (s *stage) checks() []check {
	return []check{
		{"without the gateway, a client's flow goes past the proxy", func() (string, error) {
			return s.get("http://"+demoName+"/", "past the proxy:")
		}},
		{"the gateway starts", func() (string, error) { return "ready", s.start() }},
		{"https, IPv4", func() (string, error) { return s.get("https://"+demoName+"/", "the origin's") }},
		{"https, IPv6", func() (string, error) { return s.get("https://"+demoName6+"/", "the origin's") }},
		{"http, IPv4", func() (string, error) { return s.get("http://"+demoName+"/", "the origin's") }},
		{"http, IPv6", func() (string, error) { return s.get("http://"+demoName6+"/", "the origin's") }},
		{"ssh, IPv4: the server speaks first", func() (string, error) { return s.banner(lab.Origin4) }},
		{"ssh, IPv6: the server speaks first", func() (string, error) { return s.banner(lab.Origin6) }},
		{"64 MiB up, then half-close, then the answer", s.upload},
		{"the proxy was given names", s.names},
		{"nothing went past the proxy", s.nothingPast},
		{"the password is not in the process list", s.hidden},
		{"the gateway stops and leaves the client's flows alone", s.stopped},
	}
}

// get fetches a URL and wants the answer of a certain server.
func (s *stage) get(url, server string) (string, error) {
	response, err := s.client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<10))
	text := strings.TrimSpace(string(body))
	if err == nil && !strings.HasPrefix(text, server) {
		err = fmt.Errorf("another server answered: %s", text)
	}
	return text, err
}

func (s *stage) dial(address netip.Addr, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), demoLimit)
	defer cancel()
	conn, err := s.lab.Client.Dial(ctx, "tcp", netip.AddrPortFrom(address, port).String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), conn.SetDeadline(time.Now().Add(demoLimit))
}

func (s *stage) banner(address netip.Addr) (string, error) {
	conn, err := s.dial(address, 22)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	banner := make([]byte, len(lab.Banner))
	_, err = io.ReadFull(conn, banner)
	return strings.TrimSpace(string(banner)), err
}

func (s *stage) upload() (string, error) {
	const size = 64 << 20
	conn, err := s.dial(lab.Origin4, lab.PortDigest)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	digest := sha256.New()
	if _, err := io.Copy(io.MultiWriter(conn, digest), io.LimitReader(lab.Noise(), size)); err != nil {
		return "", err
	}
	if err := conn.CloseWrite(); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	got, want := strings.TrimSpace(string(answer)), hex.EncodeToString(digest.Sum(nil))
	if err == nil && got != want {
		err = fmt.Errorf("sha256 %q and not %s", got, want)
	}
	return "the same sha256 on both sides", err
}

// asked is what the proxy was asked for: tunnels and plain requests.
func (s *stage) asked() []string {
	var all []string
	for _, target := range s.proxy.Targets() {
		all = append(all, "CONNECT "+target)
	}
	return append(all, s.proxy.Requests()...)
}

func (s *stage) names() (string, error) {
	seen := strings.Join(s.asked(), " ")
	for _, name := range []string{"CONNECT " + demoName + ":443", "GET http://" + demoName6 + "/"} {
		if !strings.Contains(seen, name) {
			return "", fmt.Errorf("no %s", name)
		}
	}
	return "CONNECT " + demoName + ":443, and so on", nil
}

func (s *stage) nothingPast() (string, error) {
	if n := len(s.past.Sources()) - 1; n != 0 { // the first check's
		return "", fmt.Errorf("%d connections", n)
	}
	return "0 connections", nil
}

func (s *stage) hidden() (string, error) {
	listing, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", s.program.command.Process.Pid))
	if err != nil {
		return "", err
	}
	text := strings.ReplaceAll(string(listing), "\x00", " ")
	if strings.Contains(text, demoUserInfo) {
		return "", errors.New("it is")
	}
	_, shown, _ := strings.Cut(text, "--upstream ")
	shown, _, _ = strings.Cut(shown, " ")
	return shown, nil
}

func (s *stage) stopped() (string, error) {
	if err := s.program.stop(unix.SIGTERM); err != nil {
		return "", err
	}
	return s.get("http://"+demoName+"/", "past the proxy:")
}

// program is this very program, run as a gateway.
type program struct {
	command *exec.Cmd
	output  *transcript
	ended   chan error
}

// startProgram runs it in a namespace and waits until it is ready.
func startProgram(ns *netns.NS, arguments ...string) (*program, error) {
	p := &program{
		command: exec.Command("/proc/self/exe", append([]string{"run", "--log-format", "json"}, arguments...)...),
		output:  new(transcript),
		ended:   make(chan error, 1),
	}
	p.command.Env = []string{} // the user's settings are not the demo's
	p.command.Stdout, p.command.Stderr = p.output, p.output
	if err := ns.Start(p.command); err != nil {
		return nil, err
	}
	go func() { p.ended <- p.command.Wait() }()
	for end := time.Now().Add(demoLimit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if strings.Contains(p.output.String(), `"message":"ready"`) {
			return p, nil
		}
	}
	p.stop(unix.SIGKILL)
	return p, fmt.Errorf("the gateway did not start: %s", p.output)
}

// stop ends the program by a signal, if it still runs.
func (p *program) stop(signal os.Signal) error {
	p.command.Process.Signal(signal)
	err := <-p.ended
	p.ended <- err
	return err
}

// accessLines are the access log's lines, shortened.
func (p *program) accessLines() []string {
	var lines []string
	for line := range strings.Lines(p.output.String()) {
		var flow struct {
			Message, Client, Destination, Name, Way, End string
			Method, URL                                  string
			Status                                       int
			Sent, Received                               int64
		}
		if json.Unmarshal([]byte(line), &flow) != nil {
			continue
		}
		switch flow.Message {
		case "flow":
			lines = append(lines, fmt.Sprintf("%s → %s %s %s, %d B up, %d B down, %s",
				flow.Client, flow.Destination, flow.Name, flow.Way, flow.Sent, flow.Received, flow.End))
		case "request":
			lines = append(lines, fmt.Sprintf("%s → %s %s %s: %d %s, %d B up, %d B down, %s",
				flow.Client, flow.Destination, flow.Method, flow.URL, flow.Status, flow.Way, flow.Sent, flow.Received, flow.End))
		}
	}
	return lines
}

// transcript collects what a program prints.
type transcript struct {
	mutex sync.Mutex
	bytes bytes.Buffer
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return t.bytes.Write(p)
}

func (t *transcript) String() string {
	t.mutex.Lock()
	defer t.mutex.Unlock()
	return t.bytes.String()
}
