//go:build docker

package docker

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// baseImage is an image from scratch: the client and a static busybox.
const baseImage = "transproxy-test"

// containerNetworks are what the engine takes its networks from.
var containerNetworks = []string{"172.30.0.0/24", "172.31.0.0/16", "2001:db8:d6::/64"}

// engine is a Docker engine of its own on the Docker host of a world.
type engine struct {
	world     *world
	directory string // see the script engine
}

// startEngine starts an engine, which ends with the test.
func startEngine(t *testing.T, w *world) *engine {
	t.Helper()
	e := &engine{world: w, directory: t.TempDir()}
	e.setResolvers(t, hostServer)
	cgroup := fmt.Sprintf("transproxy-test-%d", os.Getpid())
	command := exec.Command("sh", "engine", e.directory, "--log-level", "warn",
		"--bip", "172.30.0.1/24", "--default-address-pool", "base=172.31.0.0/16,size=24", "--cgroup-parent", "/"+cgroup)
	// No proxy setting of the machine that runs the test, and none of its authorities.
	command.Env = []string{"PATH=" + os.Getenv("PATH")}
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	t.Cleanup(func() { removeCgroups(t, cgroup) }) // when the engine has ended
	p := background(t, w.Gateway, command)
	if !within(20*time.Second, func() bool { return e.ping(t) || p.hasEnded() }) || p.hasEnded() {
		t.Fatal("the engine does not start")
	}
	t.Cleanup(func() {
		p.command.Process.Signal(syscall.SIGTERM)
		within(10*time.Second, p.hasEnded) // or it is killed
	})
	return e
}

// skipWithoutEngine names what is missing.
func skipWithoutEngine(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 || !initialUserNamespace() {
		t.Skip("a Docker engine needs root in the initial user namespace")
	}
	for _, name := range []string{"dockerd", "docker", "docker-compose", "busybox", "iptables-save", "nft", "ip"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("no Docker engine can run here: %s is not installed (test/docker/install does it)", name)
		}
	}
}

// setResolvers writes the Docker host's /etc/resolv.conf; containers made from then on
// go by it. The file stays the same: it is mounted.
func (e *engine) setResolvers(t *testing.T, servers ...string) {
	t.Helper()
	var text strings.Builder
	for _, server := range servers {
		fmt.Fprintf(&text, "nameserver %s\n", server)
	}
	must(t, os.WriteFile(filepath.Join(e.directory, "resolv.conf"), []byte(text.String()), 0o644))
}

func (e *engine) ping(t *testing.T) bool {
	_, err := e.run(t, "docker", "version", "--format", "{{.Server.Version}}")
	return err == nil
}

// command is docker or docker-compose, to run on the engine.
func (e *engine) command(ctx context.Context, name string, arguments ...string) *exec.Cmd {
	command := exec.CommandContext(ctx, name, arguments...)
	command.Dir = e.directory
	// DOCKER_CONFIG: the user's configuration may name proxies for containers.
	command.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + e.directory, "DOCKER_CONFIG=" + e.directory,
		"DOCKER_HOST=unix://" + filepath.Join(e.directory, "docker.sock"),
	}
	command.WaitDelay = time.Second
	return command
}

// run runs a command on the engine, within a minute, and returns what it printed.
func (e *engine) run(t *testing.T, name string, arguments ...string) (string, error) {
	ctx, cancel := timeout(t)
	defer cancel()
	output, err := e.command(ctx, name, arguments...).CombinedOutput()
	return string(output), err
}

// timeout bounds a command, those of the test's clean-up included.
func timeout(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
}

// docker runs docker and wants success.
func (e *engine) docker(t *testing.T, arguments ...string) string {
	t.Helper()
	output, err := e.run(t, "docker", arguments...)
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(arguments, " "), err, output)
	}
	return strings.TrimSpace(output)
}

// buildBase makes the base image.
func (e *engine) buildBase(t *testing.T) {
	t.Helper()
	directory := t.TempDir()
	root := filepath.Join(directory, "root")
	e.world.writeRoot(t, root)
	busybox, err := exec.LookPath("busybox")
	must(t, err, copyFile(filepath.Join(root, "bin/busybox"), busybox))
	for _, name := range []string{"sh", "env", "cat", "nslookup"} {
		must(t, os.Symlink("busybox", filepath.Join(root, "bin", name)))
	}
	e.build(t, classicBuilder, directory, baseImage, "FROM scratch\nCOPY root /\nENV PATH=/bin\n")
}

// The two builders of an engine, as the environment of docker names them.
const (
	classicBuilder = "DOCKER_BUILDKIT=0"
	buildKit       = "DOCKER_BUILDKIT=1"
)

// build builds an image from what is in a directory, with no cache of an earlier build.
func (e *engine) build(t *testing.T, builder, directory, image, dockerfile string) (output string) {
	t.Helper()
	ctx, cancel := timeout(t)
	defer cancel()
	must(t, os.WriteFile(filepath.Join(directory, "Dockerfile"), []byte(dockerfile), 0o644))
	command := e.command(ctx, e.commandLine(t, builder), "build", "--no-cache", "--force-rm", "--tag", image, directory)
	command.Env = append(command.Env, builder)
	text, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("docker build: %v\n%s", err, text)
	}
	return string(text)
}

// commandLine is a docker that can use the builder: one with BuildKit built in, or that
// has the plug-in buildx.
func (e *engine) commandLine(t *testing.T, builder string) string {
	t.Helper()
	ctx, cancel := timeout(t)
	defer cancel()
	for _, directory := range filepath.SplitList(os.Getenv("PATH")) {
		name := filepath.Join(directory, "docker")
		command := e.command(ctx, name, "build", "--help")
		command.Env = append(command.Env, builder)
		if command.Run() == nil {
			return name
		}
	}
	t.Skipf("no docker here can use the builder %s: install docker-buildx", builder)
	return ""
}

// once is a container that is made for the one call, with options for docker run.
func (e *engine) once(t *testing.T, options ...string) container {
	return func(arguments ...string) (string, error) {
		all := append([]string{"run", "--rm"}, options...)
		all = append(all, baseImage, "client")
		return e.run(t, "docker", append(all, arguments...)...)
	}
}

// serving starts a container that serves, with options for docker run; it is removed at
// the end of the test.
func (e *engine) serving(t *testing.T, name string, options ...string) container {
	t.Helper()
	all := append([]string{"run", "--detach", "--name", name}, options...)
	e.docker(t, append(all, baseImage, "client", "serve", name)...)
	t.Cleanup(func() { e.docker(t, "rm", "--force", name) })
	if !within(10*time.Second, func() bool { return strings.Contains(e.docker(t, "logs", name), "ready") }) {
		t.Fatalf("container %s does not serve", name)
	}
	return e.inside(t, name)
}

// inside is a running container.
func (e *engine) inside(t *testing.T, name string) container {
	return func(arguments ...string) (string, error) {
		return e.run(t, "docker", append([]string{"exec", name, "client"}, arguments...)...)
	}
}

// address is a container's on a network.
func (e *engine) address(t *testing.T, name, network string) string {
	t.Helper()
	return e.docker(t, "inspect", "--format", fmt.Sprintf("{{(index .NetworkSettings.Networks %q).IPAddress}}", network), name)
}

// network makes a network, which is removed at the end of the test.
func (e *engine) network(t *testing.T, name string, options ...string) {
	t.Helper()
	e.docker(t, append(append([]string{"network", "create"}, options...), name)...)
	t.Cleanup(func() { e.docker(t, "network", "rm", name) })
}

// removeCgroups removes the control groups of an engine that has ended, which leaves
// them to its successor.
func removeCgroups(t *testing.T, name string) {
	parents, err := filepath.Glob("/sys/fs/cgroup/*/" + name) // version 1: one hierarchy a controller
	must(t, err)
	for _, parent := range append(parents, "/sys/fs/cgroup/"+name) {
		var groups []string
		filepath.WalkDir(parent, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		for i := len(groups) - 1; i >= 0; i-- { // the inner ones first
			if err := syscall.Rmdir(groups[i]); err != nil {
				t.Errorf("remove the control group %s: %v", groups[i], err)
			}
		}
	}
}
