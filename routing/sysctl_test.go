package routing

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeParameters is a tree like /proc/sys. What the kernel changes by itself a test has to.
func fakeParameters(t *testing.T, settings ...Setting) string {
	t.Helper()
	root := t.TempDir()
	for _, s := range settings {
		path := filepath.Join(root, s.Key)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(s.Value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func wantParameter(t *testing.T, root, key, want string) {
	t.Helper()
	value, err := os.ReadFile(filepath.Join(root, key))
	if got := strings.TrimSpace(string(value)); err != nil || got != want {
		t.Errorf("%s is %q, %v; want %q", key, got, err, want)
	}
}

// TestParametersComeBack: through a kill between Set and Restore, with what the kernel
// changed on its own, and without an interface that has gone.
func TestParametersComeBack(t *testing.T) {
	const fellow, gone = "net/ipv4/conf/eth0/forwarding", "net/ipv4/conf/gone/forwarding"
	root := fakeParameters(t, Setting{forward4, "0"}, Setting{fellow, "1"}, Setting{gone, "0"},
		Setting{"net/ipv4/conf/all/accept_redirects", "0"}, Setting{"net/ipv4/conf/all/send_redirects", "1"})
	file := filepath.Join(t.TempDir(), "run", "state.json")
	p, err := openParameters(root, file)
	if err != nil {
		t.Fatal(err)
	}
	wanted := []Setting{{forward4, "1"}, {"net/ipv4/conf/all/send_redirects", "0"}, {"net/ipv4/conf/never/send_redirects", "0"}}
	for range 2 { // again after a change of the network
		if err := p.Set(wanted); err != nil {
			t.Fatal(err)
		}
	}
	wantParameter(t, root, forward4, "1")
	os.WriteFile(filepath.Join(root, fellow), []byte("0"), 0o644)
	os.WriteFile(filepath.Join(root, "net/ipv4/conf/all/accept_redirects"), []byte("1"), 0o644)
	os.RemoveAll(filepath.Join(root, "net/ipv4/conf/gone"))

	if p, err = openParameters(root, file); err != nil {
		t.Fatal(err)
	}
	if err := p.Restore(); err != nil {
		t.Fatal(err)
	}
	wantParameter(t, root, forward4, "0")
	wantParameter(t, root, fellow, "1")
	wantParameter(t, root, "net/ipv4/conf/all/accept_redirects", "0")
	wantParameter(t, root, "net/ipv4/conf/all/send_redirects", "1")
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file is still there: %v", err)
	}
}

// TestParametersThatAreRight leave no trace.
func TestParametersThatAreRight(t *testing.T) {
	root := fakeParameters(t, Setting{forward4, "1"})
	file := filepath.Join(t.TempDir(), "state.json")
	p, err := openParameters(root, file)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Set([]Setting{{forward4, "1"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("there is a file: %v", err)
	}
}

// TestParametersFile: what somebody else wrote there is not done.
func TestParametersFile(t *testing.T) {
	for _, text := range []string{"{", `[{"Key":"kernel/core_pattern","Value":"x"}]`, `[{"Key":"net/../kernel/x","Value":"x"}]`, `[{"Key":"/etc/passwd","Value":"x"}]`} {
		file := filepath.Join(t.TempDir(), "state.json")
		os.WriteFile(file, []byte(text), 0o600)
		if _, err := openParameters(t.TempDir(), file); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestSettingText(t *testing.T) {
	for key, want := range map[string]string{
		"net/ipv4/ip_forward":                   "net.ipv4.ip_forward=1",
		"net/ipv4/conf/eth0.100/send_redirects": "net.ipv4.conf.eth0/100.send_redirects=1",
	} {
		if got := (Setting{key, "1"}).String(); got != want {
			t.Errorf("%s: %s and not %s", key, got, want)
		}
	}
}
