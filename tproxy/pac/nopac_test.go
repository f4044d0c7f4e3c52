//go:build nopac

package pac

import (
	"errors"
	"testing"
)

// A build without PAC says so.
func TestNotBuilt(t *testing.T) {
	if _, err := Open(t.Context(), Config{Location: "testdata/direct.pac"}); !errors.Is(err, ErrNotBuilt) {
		t.Errorf("Open: %v", err)
	}
	if _, err := Discover(t.Context(), Config{}, []string{"corp.example"}); !errors.Is(err, ErrNotBuilt) {
		t.Errorf("Discover: %v", err)
	}
	if err := Evaluate(nil, nil); !errors.Is(err, ErrNotBuilt) {
		t.Errorf("Evaluate: %v", err)
	}
}
