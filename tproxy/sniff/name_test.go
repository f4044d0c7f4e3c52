package sniff

import (
	"strings"
	"testing"
)

func TestValidName(t *testing.T) {
	label := strings.Repeat("a", maxLabel)
	longest := strings.Repeat(label+".", 3) + label[:maxName-3*(maxLabel+1)]
	for _, test := range []struct{ name, want string }{ // want is empty for names that are refused
		{"example.org", "example.org"},
		{"Example.ORG", "example.org"},
		{"example.org.", "example.org"},
		{"intranet", "intranet"},
		{"_dmarc.example.org", "_dmarc.example.org"},
		{"r4---sn-4g5e6nez.example.org", "r4---sn-4g5e6nez.example.org"},
		{"-a-.example.org", "-a-.example.org"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example"},
		{"1.example", "1.example"},
		{"10.0.0.1.example", "10.0.0.1.example"},
		{"example.1a", "example.1a"},
		{"example.0xg", "example.0xg"},
		{"x0", "x0"},
		{"notlocalhost", "notlocalhost"},
		{"localhost.example", "localhost.example"},
		{label + ".example", label + ".example"},
		{longest, longest},
		{longest + ".", longest},

		{"", ""},
		{".", ""},
		{"..", ""},
		{"example..org", ""},
		{".example.org", ""},
		{"example.org..", ""},
		{label + "a.example", ""},
		{longest + "a", ""},
		{"10.0.0.1", ""},
		{"10.0.0.1.", ""},
		{"127.1", ""},
		{"2130706433", ""},
		{"0x7f000001", ""},
		{"0X7F.1", ""},
		{"127.0x1", ""},
		{"example.0x", ""},
		{"example.0XaF", ""},
		{"example.1", ""},
		{"0177.0.0.01", ""},
		{"::1", ""},
		{"[::1]", ""},
		{"fe80::1%lo", ""},
		{"localhost", ""},
		{"LOCALHOST.", ""},
		{"a.LocalHost", ""},
		{"example.org:443", ""},
		{"user@example.org", ""},
		{"example.org/", ""},
		{"*.example.org", ""},
		{"example org", ""},
		{"example.org\r\nX: y", ""},
		{"example.org\x00", ""},
		{"bücher.example", ""},
		{"example.\u212a", ""}, // the Kelvin sign, whose lower case is a k
		{"\xff.example", ""},
	} {
		if got, ok := ValidName(test.name); got != test.want || ok != (test.want != "") {
			t.Errorf("ValidName(%q) = %q, %v, want %q", test.name, got, ok, test.want)
		}
	}
}

func TestValidNameAllocates(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { _, _ = ValidName("www.example.org.") }); n != 0 {
		t.Errorf("%v allocations for a name in lower case", n)
	}
}
