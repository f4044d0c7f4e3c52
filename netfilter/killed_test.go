package netfilter

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// instanceVariable, in the environment of this test program, makes it an instance that holds its table until it is killed.
const instanceVariable = "NETFILTER_TEST_INSTANCE"

func runInstance(mode string) {
	h, err := Open(testConfig().Table)
	if err == nil {
		c := testConfig()
		c.FailClosed = mode == "closed"
		err = h.Apply(c)
	}
	if err == nil {
		fmt.Println("applied")
		err = h.Watch(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestKilled(t *testing.T) {
	for _, test := range []struct {
		mode string
		left []string
	}{
		{"open", nil},
		{"closed", []string{"transproxy_guard"}},
	} {
		t.Run(test.mode, func(t *testing.T) {
			ns := newNS(t)
			command := exec.Command("/proc/self/exe")
			command.Env = append(os.Environ(), instanceVariable+"="+test.mode)
			command.Stderr = os.Stderr
			output, err := command.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := ns.Start(command); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(output).ReadString('\n'); err != nil {
				t.Fatalf("the instance said %q: %v", line, err)
			}
			if err := ns.Do(func() error {
				wantTables(t, append([]string{"transproxy"}, test.left...)...)
				_, err := Open("transproxy")
				wantInUse(t, err)
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if err := command.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = command.Wait() // killed
			if err := ns.Do(func() error {
				eventually(t, func() bool { return slices.Equal(tables(t), test.left) })

				// An instance that fails to start leaves the guard; one that starts takes it over.
				if err := mustOpen(t).Close(); err != nil {
					return err
				}
				wantTables(t, test.left...)
				h := mustOpen(t)
				wantTables(t, append([]string{"transproxy"}, test.left...)...)
				mustApply(t, h, testConfig())
				wantTables(t, "transproxy")
				return h.Close()
			}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCleanUp(t *testing.T) {
	within(t, func() {
		kill(t, mustOpen(t), true)
		wantTables(t, "transproxy_guard")
		for range 2 {
			if err := CleanUp("transproxy"); err != nil {
				t.Fatal(err)
			}
			wantTables(t)
		}
	})
}

// kill leaves what an instance leaves that is killed.
func kill(t *testing.T, h *Handle, failClosed bool) {
	t.Helper()
	c := testConfig()
	c.FailClosed = failClosed
	mustApply(t, h, c)
	die(t, h)
}

// die does to the handle what the end of its process does.
func die(t *testing.T, h *Handle) {
	t.Helper()
	if err := h.kernel.close(); err != nil {
		t.Fatal(err)
	}
	h.kernel = nil
	h.unlock()
}
