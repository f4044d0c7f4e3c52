package fakeip

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	goodHeader = "transproxy-tproxy fake-ip 1 198.18.0.0/15 fd0f:a4e1:b0d5:c0de::/64\n"
	goodTime   = " 2026-01-31T12:00:00Z\n"
)

// goodLine returns a line of a store.
func goodLine(name string, last int) string {
	return fmt.Sprintf("%s 198.18.0.%d fd0f:a4e1:b0d5:c0de::%x%s", name, last, last, goodTime)
}

// stored returns a configuration with a store that has the text.
func stored(t *testing.T, text string) Config {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	if err := os.WriteFile(path, []byte(text), storeMode); err != nil {
		t.Fatal(err)
	}
	return Config{IPv4: ipv4, IPv6: ipv6, Store: path, StoreFailed: func(err error) { t.Error(err) }}
}

// reopen closes a pool and opens it once more.
func reopen(t *testing.T, p *Pool, config Config) *Pool {
	t.Helper()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, config)
}

// contentsOf returns what a file holds.
func contentsOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// wantNotes checks that there is a note for each text, and that it has it.
func wantNotes(t *testing.T, p *Pool, texts ...string) {
	t.Helper()
	if !slices.EqualFunc(p.Notes(), texts, strings.Contains) {
		t.Errorf("notes %q, want %q", p.Notes(), texts)
	}
}

func TestRestartKeepsAddressesAndOrderOfUse(t *testing.T) {
	config := Config{IPv4: ipv4, IPv6: ipv6, Max: 4, Store: filepath.Join(t.TempDir(), "store")}
	p := open(t, config)
	addresses := make(map[string]netip.Addr)
	for _, name := range []string{"a.test", "b.test", "c.test", "d.test", "e.test"} { // e in place of a
		addresses[name] = lookup(t, p, name)
	}
	p.tend()
	wantName(t, p, addresses["b.test"], "b.test") // from here on only Close can tell
	lookup(t, p, "d.test")

	again := reopen(t, p, config)
	wantNotes(t, again)
	wantSame(t, again, p)
	for _, name := range []string{"b.test", "c.test", "d.test", "e.test"} {
		at := again.table.byName[name]
		if got, _ := again.ranges.addresses(again.table.places[at].offset); got != addresses[name] {
			t.Errorf("%s has %s, had %s", name, got, addresses[name])
		}
	}
	for _, oldest := range []string{"c.test", "e.test", "b.test", "d.test"} {
		if got := lookup(t, again, "new-"+oldest); got != addresses[oldest] {
			t.Errorf("a new name has %s, want that of %s, the oldest", got, oldest)
		}
	}
}

func TestStoreIsReadableAndForItsOwnerOnly(t *testing.T) {
	config := stored(t, goodHeader)
	if err := os.Chmod(config.Store, 0o644); err != nil {
		t.Fatal(err)
	}
	p := open(t, config)
	lookup(t, p, "a.test")
	lookup(t, p, "b.test")
	text := contentsOf(t, config.Store)
	for i, prefix := range []string{
		goodHeader, "a.test 198.18.0.2 fd0f:a4e1:b0d5:c0de::2 20", "b.test 198.18.0.3 fd0f:a4e1:b0d5:c0de::3 20", "",
	} {
		if line := strings.SplitAfter(text, "\n")[i]; !strings.HasPrefix(line, prefix) || len(line) > maxLine {
			t.Errorf("line %d is %q", i, line)
		}
	}
	info, err := os.Stat(config.Store)
	if err != nil || info.Mode().Perm() != storeMode {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(config.Store)); err != nil || len(left) != 1 {
		t.Errorf("the directory has %v, %v", left, err)
	}
}

func TestUsesAreAppendedOnceEach(t *testing.T) {
	p := open(t, stored(t, goodHeader+goodLine("a.test", 2)+goodLine("b.test", 3)+goodLine("c.test", 4)))
	lookup(t, p, "b.test")
	lookup(t, p, "a.test")
	lookup(t, p, "b.test")
	p.tend()
	p.tend()
	var names []string
	for line := range strings.Lines(contentsOf(t, p.store.path)) {
		name, _, _ := strings.Cut(line, " ")
		names = append(names, name)
	}
	if want := []string{"transproxy-tproxy", "a.test", "b.test", "c.test", "a.test", "b.test"}; !slices.Equal(names, want) {
		t.Errorf("the store has %v, want %v", names, want)
	}
}

func TestLastLineForANameOrAnAddressHolds(t *testing.T) {
	p := open(t, stored(t, goodHeader+
		goodLine("a.test", 2)+goodLine("b.test", 2)+ // the address was reused
		goodLine("c.test", 5)+goodLine("c.test", 7)+ // the name came back
		goodLine("d.test", 9)+goodLine("e.test", 4)+goodLine("d.test", 4)))
	wantNotes(t, p)
	want := []entry{{"b.test", 0}, {"c.test", 5}, {"d.test", 2}}
	if got := p.table.order(); !slices.Equal(got, want) {
		t.Errorf("holds %v, want %v", got, want)
	}
	wantWhole(t, p)
	for i, want := range []byte{3, 4 + 1, 6} { // the free ones between
		if got := lookup(t, p, fmt.Sprintf("new%d.test", i)); got != netip.AddrFrom4([4]byte{198, 18, 0, want}) {
			t.Errorf("a new name has %s", got)
		}
	}
}

func TestStoreWithTooManyNamesKeepsTheNewest(t *testing.T) {
	config := stored(t, goodHeader+goodLine("a.test", 2)+goodLine("b.test", 3)+goodLine("c.test", 4)+
		goodLine("d.test", 5)+goodLine("a.test", 2))
	config.Max = 2
	p := open(t, config)
	wantNotes(t, p, "no more than 2")
	if got, want := p.table.order(), []entry{{"d.test", 3}, {"a.test", 0}}; !slices.Equal(got, want) {
		t.Errorf("holds %v, want %v", got, want)
	}
	wantWhole(t, p)
	if got := lookup(t, p, "e.test").String(); got != "198.18.0.5" {
		t.Errorf("a new name has %s, want that of d.test", got)
	}
}

func TestDamagedLinesAreDropped(t *testing.T) {
	good := goodLine("a.test", 2)
	for name, bad := range map[string]string{
		"cut by a full disk":   goodLine("b.test", 3)[:30] + "\n",
		"a name too short":     "b.te\n",
		"time cut":             strings.TrimSuffix(goodLine("b.test", 3), "Z\n") + "\n",
		"no line":              "\n",
		"zeros":                strings.Repeat("\x00", 4096) + "\n",
		"two lines in one":     strings.TrimSuffix(goodLine("b.test", 3), "\n") + goodLine("c.test", 4),
		"part and whole":       goodLine("b.test", 3)[:20] + goodLine("c.test", 4),
		"odd name":             goodLine("B.test", 3),
		"address for a name":   goodLine("10.0.0.1", 3),
		"numbers differ":       "b.test 198.18.0.3 fd0f:a4e1:b0d5:c0de::4" + goodTime,
		"another prefix":       "b.test 198.20.0.3 fd0f:a4e1:b0d5:c0de::3" + goodTime,
		"families exchanged":   "b.test fd0f:a4e1:b0d5:c0de::3 198.18.0.3" + goodTime,
		"one family":           "b.test 198.18.0.3" + goodTime,
		"not given out":        goodLine("b.test", 1),
		"zone":                 "b.test 198.18.0.3 fd0f:a4e1:b0d5:c0de::3%eth0" + goodTime,
		"carriage return":      strings.ReplaceAll(goodLine("b.test", 3), "\n", "\r\n"),
		"long":                 strings.Repeat("b", 3*maxLine) + goodTime,
		"long with a good end": strings.Repeat("b", maxLine) + " " + goodLine("b.test", 3),
		"no such time":         "b.test 198.18.0.3 fd0f:a4e1:b0d5:c0de::3 2026-02-31T12:00:00Z\n",
	} {
		t.Run(name, func(t *testing.T) {
			config := stored(t, goodHeader+bad+good+strings.TrimSuffix(goodLine("z.test", 9), "\n"))
			p := open(t, config)
			wantNotes(t, p, "2 damaged lines")
			if got := p.table.order(); !slices.Equal(got, []entry{{"a.test", 0}}) {
				t.Errorf("holds %v", got)
			}
			wantNotes(t, reopen(t, p, config))
		})
	}
}

func TestDamagedFirstLineLosesNoOther(t *testing.T) {
	for name, first := range map[string]string{
		"zeros": strings.Repeat("\x00", len(goodHeader)-1) + "\n",
		"empty": "\n",
	} {
		t.Run(name, func(t *testing.T) {
			p := open(t, stored(t, first+goodLine("a.test", 2)))
			wantNotes(t, p, "first line")
			if got := p.table.order(); !slices.Equal(got, []entry{{"a.test", 0}}) {
				t.Errorf("holds %v", got)
			}
		})
	}
	t.Run("cut", func(t *testing.T) {
		wantNotes(t, open(t, stored(t, goodHeader[:40])), "first line")
	})
	t.Run("no byte", func(t *testing.T) {
		wantNotes(t, open(t, stored(t, "")))
	})
}

func TestStoreForOtherPrefixesStartsAnew(t *testing.T) {
	for _, first := range []string{
		"transproxy-tproxy fake-ip 1 198.18.0.0/15\n",
		"transproxy-tproxy fake-ip 1 198.18.0.0/16 fd0f:a4e1:b0d5:c0de::/64\n",
		"transproxy-tproxy fake-ip 2 something\n",
	} {
		config := stored(t, first+goodLine("a.test", 3))
		p := open(t, config)
		wantNotes(t, p, strings.TrimSuffix(first, "\n"))
		if got := lookup(t, p, "b.test").String(); got != "198.18.0.2" {
			t.Errorf("the first name has %s", got)
		}
		wantNotes(t, reopen(t, p, config))
	}
}

func TestFileThatIsNoStoreIsLeftAsItIs(t *testing.T) {
	for _, text := range []string{"root:x:0:0:root:/root:/bin/bash\n", "no end of line", strings.Repeat("x", 4096), "\x7fELF"} {
		config := stored(t, text)
		wantRefused(t, config, "no fake-IP store")
		if got := contentsOf(t, config.Store); got != text {
			t.Errorf("the file is %q now", got)
		}
	}
	wantRefused(t, Config{IPv4: ipv4, Store: t.TempDir()}, "not a regular file")
	wantRefused(t, Config{IPv4: ipv4, Store: os.DevNull}, "not a regular file")
}

// wantRefused checks that a store cannot be opened, and that the error has the
// text and names the flag once, as it does the file.
func wantRefused(t *testing.T, config Config, text string) {
	t.Helper()
	p, err := Open(config)
	if err == nil {
		p.Close()
		t.Fatalf("%s opened", config.Store)
	}
	for _, text := range []string{text, "--fake-ip-store", config.Store} {
		if strings.Count(err.Error(), text) != 1 {
			t.Errorf("the error is: %v", err)
		}
	}
}

func TestStoreThatCannotBeWrittenIsAnErrorOfOpen(t *testing.T) {
	directory := t.TempDir()
	wantRefused(t, Config{IPv4: ipv4, Store: filepath.Join(directory, "missing", "names")}, "no such file or directory")
	// Not even root makes files there.
	wantRefused(t, Config{IPv4: ipv4, Store: "/proc/self/names"}, "no such file or directory")

	// The file can be written, but nothing can be put in its place.
	config := stored(t, goodHeader)
	if err := os.MkdirAll(config.Store+nextSuffix+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, config, "directory not empty")

	if os.Geteuid() == 0 {
		return // permissions are not for root
	}
	if err := os.Chmod(directory, 0o500); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, Config{IPv4: ipv4, Store: filepath.Join(directory, "names")}, "permission denied")
}

func TestStoreIsOfOnePool(t *testing.T) {
	config := stored(t, goodHeader)
	config.Max = 10
	p := open(t, config)
	wantRefused(t, config, "another process uses it")
	overgrow(t, p) // the lock is on the new file as well
	wantRefused(t, config, "another process uses it")
	reopen(t, p, config)
}

func TestLinkToAStoreStaysALink(t *testing.T) {
	config := stored(t, goodHeader+goodLine("a.test", 2))
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(config.Store, link); err != nil {
		t.Fatal(err)
	}
	target := config.Store
	config.Store = link
	p := open(t, config)
	lookup(t, p, "b.test")
	if got := strings.Count(contentsOf(t, target), "\n"); got != 3 {
		t.Errorf("the file has %d lines", got)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode().Type() != os.ModeSymlink {
		t.Errorf("the link is %v, %v", info, err)
	}
}

// overgrow assigns names, in a pool of few, until the store has been written anew.
func overgrow(t *testing.T, p *Pool) {
	t.Helper()
	p.assigning.Lock()
	file := p.store.file
	p.assigning.Unlock()
	deadline := time.Now().Add(time.Minute)
	for i := 0; time.Now().Before(deadline); i++ {
		lookup(t, p, fmt.Sprintf("grow%d.test", i%10_000))
		p.assigning.Lock()
		now := p.store.file
		p.assigning.Unlock()
		if now != file {
			return
		}
	}
	t.Fatal("the store was not written anew")
}

// TestNamesAssignedDuringARewriteAreInTheNewStore looks at what a kill right after
// the rewrite would leave.
func TestNamesAssignedDuringARewriteAreInTheNewStore(t *testing.T) {
	config := stored(t, goodHeader)
	config.Max = 10
	p := open(t, config)
	for range 5 {
		overgrow(t, p)
		p.assigning.Lock() // the pool may be about to append uses
		text := contentsOf(t, config.Store)
		size, lines := p.store.size, p.store.lines
		p.assigning.Unlock()
		left := newTable(config.Max)
		found, err := p.ranges.read(strings.NewReader(text), func(e entry) { left.restore(e) })
		if err != nil || found != (contents{}) {
			t.Fatalf("the store has %+v, %v", found, err)
		}
		if got, want := left.order(), p.table.order(); !slices.Equal(got, want) {
			t.Fatalf("the store has %v\nwant %v", got, want)
		}
		if size != int64(len(text)) || lines != strings.Count(text, "\n")-1 {
			t.Errorf("counted %d bytes and %d lines in %q", size, lines, text)
		}
	}
}

func TestStoreStaysBounded(t *testing.T) {
	config := stored(t, goodHeader)
	config.Max = 10
	p := open(t, config)
	overgrow(t, p)
	again := reopen(t, p, config)
	wantNotes(t, again)
	wantSame(t, again, p)
	if got := strings.Count(contentsOf(t, config.Store), "\n"); got != 11 {
		t.Errorf("the store has %d lines after the start, want 11", got)
	}
}
