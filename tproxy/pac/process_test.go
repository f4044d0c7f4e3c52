//go:build !nopac

package pac

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// An evaluator has nothing of the program's but the time zone: no environment,
// and no way to open a file or a socket.
func TestEvaluatorHasNothing(t *testing.T) {
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("TRANSPROXY_TEST_PASSWORD", "secret")
	s := open(t, write(t, `function FindProxyForURL(url, host) { return "PROXY zone:" + -new Date().getTimezoneOffset(); }`))
	choices, err := s.Find(t.Context(), "https", "www.example", 443)
	if err != nil || show(choices) != "http://zone:540" {
		t.Errorf("the time zone: %v, %v", choices, err)
	}
	for process := range s.pool.all {
		proc := "/proc/" + strconv.Itoa(process.command.Process.Pid)
		environment, err := os.ReadFile(proc + "/environ")
		if err != nil || string(environment) != "GOTRACEBACK=none\x00GOMAXPROCS=2\x00TZ=Asia/Tokyo\x00" {
			t.Errorf("the environment: %q, %v", environment, err)
		}
		limits, err := os.ReadFile(proc + "/limits")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(limits)) {
			for name, want := range map[string]int{"Max open files": 0, "Max core file size": 0, "Max data size": maxMemory} {
				if rest, found := strings.CutPrefix(line, name); found {
					fields := strings.Fields(rest)
					if fields[0] != strconv.Itoa(want) || fields[1] != strconv.Itoa(want) {
						t.Errorf("%s", line)
					}
				}
			}
		}
	}
}

// Close leaves no process behind.
func TestCloseEndsEvaluators(t *testing.T) {
	s := open(t, "testdata/direct.pac")
	var process *evaluatorProcess
	for process = range s.pool.all {
	}
	s.Close()
	s.Close()
	if process.command.ProcessState == nil {
		t.Error("the evaluator was not waited for")
	}
}
