//go:build nopac

package pac

import "io"

// built says whether this build can evaluate scripts.
const built = false

// Evaluate returns ErrNotBuilt: the build tag nopac has left the evaluator out.
func Evaluate(io.Reader, io.Writer) error { return ErrNotBuilt }
