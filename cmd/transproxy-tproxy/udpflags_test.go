package main

import (
	"fmt"
	"testing"
)

func TestUDP(t *testing.T) {
	for value, want := range map[string]string{
		"":                                   "refused [443] dropped []",
		"443=direct":                         "refused [] dropped []",
		"443=drop,8000-8002=reject":          "refused [8000-8002] dropped [443]",
		"other=drop,123=direct":              "refused [443] dropped [1-52 54-122 124-442 444-65535]",
		"other=reject,53=drop,443=direct":    "refused [1-52 54-442 444-65535] dropped [53]",
		"1-65535=direct,123=drop,123=reject": "refused [123] dropped []",
	} {
		var s settings
		if err := setUDP(&s, value); err != nil {
			t.Errorf("%q: %v", value, err)
		}
		if got := fmt.Sprint("refused ", s.udp.refused, " dropped ", s.udp.dropped); got != want {
			t.Errorf("%q: %s and not %s", value, got, want)
		}
	}
	for _, value := range []string{"443", "443=refuse", "x=drop", "70000=drop", "=drop"} {
		if err := setUDP(new(settings), value); err == nil {
			t.Errorf("%q is taken", value)
		}
	}
}
