package pac

import (
	"bytes"
	"strings"
	"testing"
)

// FuzzReceive: what an evaluator writes is refused or read, and never takes more
// memory than its bound.
func FuzzReceive(f *testing.F) {
	var good bytes.Buffer
	if err := send(&good, message{Kind: kindDone, Text: "PROXY a:1", Varies: true}); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 1, '{'})
	f.Fuzz(func(t *testing.T, frames []byte) {
		in := bytes.NewReader(frames)
		for {
			m, err := receive(in, maxFromEvaluator)
			if err != nil {
				return
			}
			var again bytes.Buffer
			if err := send(&again, m); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// The largest script that is taken fits into a message, whatever it consists of.
func TestLargestScriptFits(t *testing.T) {
	var frame bytes.Buffer
	whole := message{Kind: kindLoad, Name: strings.Repeat("\x01", 100), Text: strings.Repeat("\x01", maxScript)}
	if err := send(&frame, whole); err != nil {
		t.Fatal(err)
	}
	got, err := receive(&frame, maxToEvaluator)
	if err != nil || got.Text != whole.Text {
		t.Errorf("%d bytes, %v", len(got.Text), err)
	}
}
