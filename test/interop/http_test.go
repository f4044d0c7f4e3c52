//go:build interop

package interop

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/transproxy-tproxy/transproxy-tproxy/test/lab"
)

// allowUpgrade has squid pass WebSockets on.
const allowUpgrade = "http_upgrade_request_protocols websocket allow all\n"

// bigRequests has squid 5.7 take a long body that arrives fast: with its preset of 512 KB
// it breaks such a request off, of a client of its own as well.
const bigRequests = "client_request_buffer_max_size 64 MB\n"

// newHTTPWorld is a world whose origin is a real nginx.
func newHTTPWorld(t *testing.T, squidConfig string) *world {
	t.Helper()
	l, err := lab.Routed()
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w := &world{Lab: l, t: t, program: buildProgram(t), direct: &lab.Origin{Label: "direct"}}
	must(t, w.direct.Start(l.Router, nil, nil))
	t.Cleanup(w.direct.Close)
	w.squid = startSquidWith(t, l.Proxy, hosts, squidPorts, squidConfig)
	w.startNginx()
	return w
}

// bulk is how much the bulk test carries each way.
const bulk = 1 << 30

// startNginx serves on port 80 of the origin. /ws is passed to an echo of WebSocket's
// handshake, /bulk is a file of 1 GiB of which nothing is on disk, /upload takes as
// much.
func (w *world) startNginx() {
	t := w.t
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "bulk"), nil, 0o644), os.Truncate(filepath.Join(dir, "bulk"), bulk))
	config := fmt.Sprintf(`
user root root;
daemon off;
master_process off;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log;
events { worker_connections 100; }
http {
	access_log off;
	client_max_body_size 0;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen 80;
		listen [::]:80;
		default_type text/plain;
		location / { return 200 "nginx $host$uri $request_method\n"; }
		location /407 {
			add_header Proxy-Authenticate "Basic realm=nginx" always;
			return 407;
		}
		location /bulk { root %[1]s; }
		location /upload {
			proxy_request_buffering off;
			proxy_http_version 1.1;
			proxy_pass http://127.0.0.1:8080;
		}
		location /ws {
			proxy_http_version 1.1;
			proxy_set_header Upgrade $http_upgrade;
			proxy_set_header Connection upgrade;
			proxy_pass http://127.0.0.1:8080;
		}
	}
}
`, dir)
	file := filepath.Join(dir, "nginx.conf")
	must(t, os.WriteFile(file, []byte(config), 0o600))
	listener, err := w.Origin.Listen("tcp", "127.0.0.1:8080")
	must(t, err)
	server := &http.Server{Handler: http.HandlerFunc(application)}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	process := background(t, w.Origin, exec.Command("nginx", "-c", file, "-e", filepath.Join(dir, "error.log")))
	t.Cleanup(func() { process.end(syscall.SIGTERM) })
	if !within(func() bool { return listens(w.Origin, netip.AddrPortFrom(lab.Origin4, 80)) }) {
		t.Fatal("nginx does not listen")
	}
}

// application is what nginx has behind it.
func application(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") == "" {
		digest := sha256.New()
		n, _ := io.Copy(digest, r.Body)
		fmt.Fprintf(w, "%d %s\n", n, hex.EncodeToString(digest.Sum(nil)))
		return
	}
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	io.Copy(conn, buffered)
}

// curl runs it on the client, which knows the hosts by a list of its own.
func (w *world) curl(arguments ...string) (string, error) {
	w.t.Helper()
	all := []string{"-sS", "--max-time", "60"}
	for name, address := range hosts {
		all = append(all, "--resolve", fmt.Sprintf("%s:80:%s", name, address), "--resolve", fmt.Sprintf("%s:443:%s", name, address))
	}
	return run(w.t, w.Client, "curl", append(all, arguments...)...)
}

// wantCurl runs curl and wants an output.
func (w *world) wantCurl(want string, arguments ...string) {
	w.t.Helper()
	if output, err := w.curl(arguments...); err != nil || output != want {
		w.t.Errorf("curl %q: %q, %v; want %q", arguments, output, err, want)
	}
}

// TestPlainHTTP: real requests through a real proxy, which sees URLs.
func TestPlainHTTP(t *testing.T) {
	w := newHTTPWorld(t, "")
	g := w.gateway()
	// Two hosts on one connection: curl keeps it for what it believes to be one address.
	output, err := run(t, w.Client, "curl", "-sSv", "--connect-to", "::"+lab.Origin4.String()+":80",
		"http://origin.test/a", "-H", "Host: origin.test", "--next", "-sSv", "--connect-to", "::"+lab.Origin4.String()+":80", "http://origin.test/b", "-H", "Host: six.test")
	if err != nil || !strings.Contains(output, "nginx origin.test/a GET") || !strings.Contains(output, "nginx six.test/b GET") ||
		!strings.Contains(output, "Re-using existing connection") {
		t.Errorf("two hosts: %v\n%s", err, output)
	}
	w.wantCurl("nginx 203.0.113.7/c GET\n", "--http1.0", "-H", "Host:", "http://origin.test/c")
	w.wantCurl("nginx six.test/d GET\n", "http://six.test/d")
	w.wantCurl("nginx origin.test/e POST\n200", "-d", "x=y", "-w", "%{http_code}", "http://origin.test/e")
	w.wantCurl("", "-I", "-o", "/dev/null", "http://origin.test/head")
	output, err = w.curl("-v", "-H", "Expect: 100-continue", "-T", "/etc/hostname", "http://origin.test/upload")
	if err != nil || !strings.Contains(output, "HTTP/1.1 100 Continue") || !strings.Contains(output, "HTTP/1.1 200 OK") {
		t.Errorf("100-continue: %v\n%s", err, output)
	}
	for _, line := range []string{
		"GET http://origin.test/a us er", "GET http://six.test/b us er", "GET http://203.0.113.7/c us er", "GET http://six.test/d us er",
		"POST http://origin.test/e us er", "HEAD http://origin.test/head us er", "PUT http://origin.test/upload us er",
	} {
		w.squid.wantLog(t, line)
	}
	if log := w.squid.log(t); regexp.MustCompile(`CONNECT \S+:80 `).MatchString(log) || w.squid.demands(t) > 1 {
		t.Errorf("squid's log:\n%s", log)
	}
	if sources := w.direct.Sources(); len(sources) > 0 {
		t.Errorf("%v went past the proxy", sources)
	}
	g.end(syscall.SIGTERM)
}

// TestOriginThatAnswers407: a server that acts as if it were a proxy does not make the
// gateway doubt its password: it would serve nobody any more.
func TestOriginThatAnswers407(t *testing.T) {
	w := newHTTPWorld(t, "")
	g := w.gateway()
	for range 3 {
		w.wantCurl("407", "-o", "/dev/null", "-w", "%{http_code}", "http://origin.test/407")
		w.wantCurl("nginx origin.test/after GET\n", "http://origin.test/after")
	}
	g.end(syscall.SIGTERM)
}

// TestWebSocket: through a squid that passes upgrades on, and one that does not.
func TestWebSocket(t *testing.T) {
	for name, config := range map[string]string{"allowed": allowUpgrade, "not allowed": ""} {
		t.Run(name, func(t *testing.T) {
			w := newHTTPWorld(t, config)
			w.gateway()
			conn := dial(t, w, lab.Origin4, 80)
			reader := bufio.NewReader(conn)
			io.WriteString(conn, "GET /ws HTTP/1.1\r\nHost: origin.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
				"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
			response, err := http.ReadResponse(reader, nil)
			if err != nil || response.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("%+v, %v", response, err)
			}
			io.WriteString(conn, "echo")
			echo := make([]byte, 4)
			if _, err := io.ReadFull(reader, echo); err != nil || string(echo) != "echo" {
				t.Errorf("%q, %v", echo, err)
			}
			must(t, conn.Close())
			if config != "" {
				w.squid.wantLog(t, "GET http://origin.test/ws us er")
			} else {
				w.squid.wantLog(t, "CONNECT origin.test:80 us er")
			}
		})
	}
}

// TestPlainBulk carries 1 GiB each way and looks at the memory of the program.
func TestPlainBulk(t *testing.T) {
	w := newHTTPWorld(t, bigRequests)
	g := w.gateway()
	w.wantCurl("nginx origin.test/warm GET\n", "http://origin.test/warm")
	before := peak(t, g)

	digest := sha256.New()
	io.CopyN(digest, zeros{}, bulk)
	want := hex.EncodeToString(digest.Sum(nil))
	file := filepath.Join(t.TempDir(), "bulk")
	must(t, os.WriteFile(file, nil, 0o644), os.Truncate(file, bulk))
	w.wantCurl(fmt.Sprintf("%d %s\n", bulk, want), "-T", file, "-H", "Expect:", "http://origin.test/upload")

	output, err := run(t, w.Client, "sh", "-c", "curl -sS --resolve origin.test:80:203.0.113.7 http://origin.test/bulk | sha256sum")
	if err != nil || strings.Fields(output)[0] != want {
		t.Errorf("down: %q, %v; want %s", output, err, want)
	}
	// A chunked body is carried chunk by chunk.
	output, err = run(t, w.Client, "sh", "-c", "curl -sS --resolve origin.test:80:203.0.113.7 -H 'Transfer-Encoding: chunked' -H Expect: -T - http://origin.test/upload < "+file)
	if err != nil || output != fmt.Sprintf("%d %s\n", bulk, want) {
		t.Errorf("up in chunks: %q, %v", output, err)
	}
	grown := peak(t, g) - before
	t.Logf("1 GiB down, up, and up in chunks, sha256 %s: peak memory grew by %d KiB", want, grown)
	if grown > 16<<10 {
		t.Errorf("memory grew by %d KiB", grown)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// peak is the most memory that a program has had, in KiB.
func peak(t *testing.T, p *process) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.command.Process.Pid))
	must(t, err)
	found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if found == nil {
		t.Fatal("no VmHWM in its status")
	}
	size, err := strconv.Atoi(string(found[1]))
	must(t, err)
	return size
}

// TestExplicitCurl: curl with proxy settings.
func TestExplicitCurl(t *testing.T) {
	w := newHTTPWorld(t, "")
	w.gateway()
	passing := fmt.Sprintf("http://%s:3132", lab.Gateway4)
	authenticating := fmt.Sprintf("http://%s:3133", lab.Gateway4)
	w.wantCurl("407", "-o", "/dev/null", "-w", "%{http_code}", "-x", passing, "http://origin.test/")
	w.wantCurl("nginx origin.test/x GET\n", "-x", passing, "-U", squidUser+":"+squidPassword, "http://origin.test/x")
	w.wantCurl("403", "-o", "/dev/null", "-w", "%{http_code}", "-x", authenticating, "http://origin.test/")
	local, err := run(t, w.Gateway, "curl", "-sS", "-x", "http://127.0.0.1:3133", "http://origin.test/y")
	if err != nil || local != "nginx origin.test/y GET\n" {
		t.Errorf("on 3133 from loopback: %q, %v", local, err)
	}
	// CONNECT, by curl's own tunnel.
	w.wantCurl("nginx origin.test/z GET\n", "-p", "-x", passing, "-U", squidUser+":"+squidPassword, "http://origin.test/z")
	w.squid.wantLog(t, "CONNECT origin.test:80 us er")
	if output, err := w.curl("-p", "-x", passing, "http://origin.test/"); err == nil || !strings.Contains(output, "407") {
		t.Errorf("CONNECT without a credential: %q, %v", output, err)
	}
	if pac, err := w.curl("http://" + net.JoinHostPort(lab.Gateway4.String(), "3132") + "/proxy.pac"); err != nil || !strings.Contains(pac, "PROXY 192.0.2.1:3132") {
		t.Errorf("proxy.pac: %q, %v", pac, err)
	}
}
