//go:build cgo && !nopac

package pac

import (
	"fmt"
	"os"
	"os/exec"
)

// evaluatorFile returns an evaluator as the program has it, without cgo and the
// race detector: C's threads and the detector's shadows do not fit into maxMemory.
func evaluatorFile(dir string) (string, error) {
	file := dir + "/evaluator.test"
	build := exec.Command("go", "test", "-c", "-o", file, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the evaluator: %w: %s", err, said)
	}
	return file, nil
}
