//go:build !nopac

package pac

import (
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// corpus is what each script of testdata is to answer, or, behind "error", a part
// of the line that it is to fail with.
var corpus = []struct{ script, scheme, host, port, want string }{
	{"direct", "https", "www.example", "443", "direct"},
	{"single", "https", "www.example", "443", "http://proxy.corp.example:8080"},
	{"corporate", "https", "intranet", "443", "direct"},
	{"corporate", "https", "WWW.Corp.Example", "443", "direct"},
	{"corporate", "http", "www.example.org", "80", "direct"},
	{"corporate", "https", "www.example.com", "443", "http://secure1.corp.example:3128 http://secure2.corp.example:3128"},
	{"corporate", "http", "www.example.com", "80", "http://web.corp.example:8080 direct"},
	{"nets", "https", "10.20.30.40", "443", "direct"},
	{"nets", "https", "172.32.0.1", "443", "http://203.0.113.1:3128"},
	{"nets", "https", "inside.example", "443", "direct"},
	{"nets", "https", "outside.example", "443", "http://203.0.113.1:3128"},
	{"nets", "https", "none.example", "443", "http://203.0.113.1:3128"},
	{"nets", "https", "2001:db8::1", "443", "http://203.0.113.1:3128"},
	{"resolved", "https", "inside.example", "443", "direct"},
	{"resolved", "https", "outside.example", "443", "http://p.example:29005"},
	{"resolved", "https", "six.example", "443", "http://nowhere.example:1"},
	{"shell-list", "https", "a.intern.example", "443", "direct"},
	{"shell-list", "https", "wiki", "443", "direct"},
	{"shell-list", "https", "ab.short.example", "443", "http://p.example:81"},
	{"shell-list", "https", "x.a1b2c.example", "443", "direct"},
	{"shell-list", "https", "xintern-example", "443", "http://p.example:81"},
	{"hash", "https", "www.example", "443", "http://a.example:8080 http://b.example:8080 http://c.example:8080"},
	{"hash", "https", "mail.example", "443", "http://c.example:8080 http://a.example:8080 http://b.example:8080"},
	{"times", "https", "week.example", "443", "http://always:1"},
	{"times", "https", "gmt.example", "443", "http://gmt:1"},
	{"times", "https", "day.example", "443", "http://day:1"},
	{"times", "https", "year.example", "443", "http://year:1"},
	{"times", "https", "past.example", "443", "direct"},
	{"times", "https", "wrong.example", "443", "direct"},
	{"nested", "https", "www.two.example", "443", "socks5://socks.example:1080"},
	{"nested", "https", "nottwo.example", "443", "direct"},
	{"modern", "https", "b.example", "443", "direct"},
	{"modern", "https", "printer.lan", "443", "direct"},
	{"modern", "https", "www.example", "443", "https://tls.example:443"},
	{"modern", "http", "www.example", "80", "http://plain.example:3128"},
	{"assigned", "https", "www.example", "443", "http://closure.example:8"},
	{"comments", "https", "www.example", "443", "http://right:3"},
	{"crlf", "https", "a.example", "443", "direct"},
	{"crlf", "https", "b.example", "443", "http://crlf.example:8080"},
	{"bom", "https", "www.example", "443", "http://bom.example:8080"},
	{"latin1", "https", "www.example", "443", "http://latin.example:8080"},
	{"utf8", "https", "www.example", "443", "http://utf8.example:8080"},
	{"ex", "https", "prefixed.example", "443", "direct"},
	{"ex", "https", "two.example", "443", "direct"},
	{"ex", "https", "none.example", "443", "http://3.example:1"},
	{"functions", "https", "www.example", "443", "http://right:19"},
	{"results", "https", "null.example", "443", "direct"},
	{"results", "https", "nothing.example", "443", "direct"},
	{"results", "https", "empty.example", "443", "direct"},
	{"results", "https", "number.example", "443", "error returned int64 and not a string"},
	{"results", "https", "object.example", "443", "error and not a string"},
	{"results", "https", "list.example", "443", "error and not a string"},
	{"results", "https", "stringobject.example", "443", "error and not a string"},
	{"results", "https", "garbage.example", "443", "http://good:1 socks4a://four:1080 http://lower:80 socks5://s:1080 https://[2001:db8::5]:443"},
	{"results", "https", "onlygarbage.example", "443", `error returned "PROXI typo:8080"`},
	{"results", "https", "many.example", "443", strings.TrimSpace(strings.Repeat("http://p:1 ", maxChoices))},
	{"results", "https", "long.example", "443", "error returned 999999 bytes"},
	{"results", "https", "credentials.example", "443", "error write \"PROXY host:port\""},
	{"url", "https", "www.example", "443", "http://https.www.example.x:11"},
	{"url", "https", "www.example.", "8443", "http://https.www.example.8443.x:11"},
	{"url", "http", "www.example", "80", "http://http.www.example.x:11"},
	{"url", "http", "2001:db8::1", "8080", "http://http.2001.db8.1.8080.x:11"},
	{"url", "https", "evil/../x", "443", `error "evil/../x" is neither a name nor an address`},
	{"url", "https", "user@www.example", "443", "error neither a name nor an address"},
	{"url", "https", ".", "443", "error not a host"},
	{"url", "ftp", "www.example", "21", "error scheme"},
	{"switch", "https", "git.example", "22", "socks5://ssh.example:1080"},
	{"switch", "https", "git.example", "8443", "https://tls.example:443"},
	{"switch", "https", "198.51.100.1", "443", "http://byaddress.example:1"},
	{"table", "https", "host49999.example", "443", "http://p5.example:3128"},
	{"table", "https", "host50000.example", "443", "direct"},
	{"random", "https", "www.example", "443", "http://lot.example:1"},
	{"date", "https", "www.example", "443", "http://now.example:1"},
	{"lookups", "https", "www.example", "443", "http://found:16"},
	{"slow-dns", "https", "www.example", "443", "http://inside:1"},
	{"dead-dns", "https", "www.example", "443", "http://unresolved:1"},
	{"frozen", "https", "www.example", "443", "http://still:1"},
	{"throws", "https", "www.example", "443", "error throws.pac:6:11: the script threw Error: no way to www.example"},
	{"throws", "https", "null.example", "443", "error throws.pac:2:45: the script threw TypeError"},
	{"throws", "https", "undefined.example", "443", "error throws.pac:3:59: the script threw ReferenceError: noSuchFunction is not defined"},
	{"throws", "https", "multi.example", "443", "error the script threw one ERROR two"},
	{"throws", "https", "long.example", "443", "error the script threw yyyyyyyy"},
	{"endless", "https", "fine.example", "443", "direct"},
	{"endless", "https", "www.example", "443", "error is there a loop"},
	{"endless-catch", "https", "www.example", "443", "error is there a loop"},
	{"regexp", "https", "www.example", "443", "error is there a loop"},
	{"regexp-backref", "https", "www.example", "443", "error is there a loop"},
	{"recursion", "https", "www.example", "443", "error recursion.pac:1:"},
	{"recursion-native", "https", "www.example", "443", "error is there a recursion without an end?"},
	{"recursion-data", "https", "www.example", "443", "error"},
	{"bomb-repeat", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-double", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-push", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-array", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-buffer", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-join", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-replace", "https", "www.example", "443", "error took more than 128 MiB"},
	{"bomb-leak", "https", "www.example", "443", "http://kept:1"},
	{"bomb-load", "", "", "", "error bomb-load.pac: the script took more than 128 MiB"},
	{"endless-load", "", "", "", "error endless-load.pac:"},
	{"syntax", "", "", "", "error syntax.pac:6:1: "},
	{"syntax-quote", "", "", "", "error syntax-quote.pac:2:12: "},
	{"html", "", "", "", "error html.pac:1:1: Unexpected token <: is this a PAC script?"},
	{"empty", "", "", "", "error empty.pac: there is no function FindProxyForURL"},
	{"misnamed", "", "", "", "error there is no function FindProxyForURL"},
	{"notfunction", "", "", "", "error there is no function FindProxyForURL"},
	{"throws-load", "", "", "", "error throws-load.pac:1:16: the script threw ReferenceError: undefinedSettings is not defined"},
}

// longest is how long any script may take, failed or not: its own time, that of
// names, and the second evaluator that is started where the first died.
const longest = lookupLimit + 2*(runLimit+killGrace)

func TestCorpus(t *testing.T) {
	asked := make(map[string]bool)
	scripts := make(map[string]*Script)
	// Where the evaluator had to be built, the compiler was a child too.
	var built unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &built); err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, entry := range corpus {
		asked[entry.script+".pac"] = true
		t.Run(entry.script+"/"+entry.host, func(t *testing.T) {
			start := time.Now()
			var err error
			s := scripts[entry.script]
			if s == nil {
				s, err = Open(t.Context(), configure("testdata/"+entry.script+".pac", new(resolver)))
				if err == nil {
					scripts[entry.script] = s
				}
			}
			var choices []Choice
			if err == nil && entry.host != "" {
				choices, err = s.Find(t.Context(), entry.scheme, entry.host, number(t, entry.port))
			}
			part, wantError := strings.CutPrefix(entry.want, "error")
			switch {
			case wantError && err == nil:
				t.Errorf("got %s, want an error", show(choices))
			case wantError && (!strings.Contains(err.Error(), strings.TrimSpace(part)) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 700):
				t.Errorf("got the error\n%v\nwant a line with\n%s", err, part)
			case !wantError && err != nil:
				t.Error(err)
			case !wantError && show(choices) != entry.want:
				t.Errorf("got  %s\nwant %s", show(choices), entry.want)
			}
			if took := time.Since(start); took > longest {
				t.Errorf("it took %v, more than %v", took, longest)
			} else if took > runLimit/2 {
				t.Logf("%v: %v", took.Round(time.Millisecond), err)
			}
		})
		if next := scripts[entry.script]; next != nil && len(scripts) > 1 {
			for name, s := range scripts {
				if name != entry.script {
					s.Close()
					delete(scripts, name)
				}
			}
		}
	}
	for _, s := range scripts {
		s.Close()
	}
	runtime.ReadMemStats(&after)

	// The largest of all evaluators that have ended, pages of the program's file
	// included; and this side, which only passed messages on.
	var children unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &children); err != nil {
		t.Fatal(err)
	}
	t.Logf("evaluators: at most %d MiB resident; this process: %d MiB more of heap", children.Maxrss>>10, (int64(after.HeapSys)-int64(before.HeapSys))>>20)
	if children.Maxrss<<10 > max(built.Maxrss<<10, maxMemory+32<<20) {
		t.Errorf("an evaluator had %d MiB of memory", children.Maxrss>>10)
	}
	if after.HeapSys > before.HeapSys+64<<20 {
		t.Errorf("the heap of this process has grown by %d MiB", (after.HeapSys-before.HeapSys)>>20)
	}

	files, err := filepath.Glob("testdata/*.pac")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !asked[filepath.Base(file)] {
			t.Errorf("%s: nothing is asked of it", file)
		}
	}
	if len(files) < 30 {
		t.Errorf("the corpus has %d files", len(files))
	}
}

func TestSyntaxNestedTooDeeplyForTheParser(t *testing.T) {
	const depth = 300_000
	script := "function FindProxyForURL(url, host) { return " + strings.Repeat("(", depth) + "1" + strings.Repeat(")", depth) + "; }"
	s, err := Open(t.Context(), configure(write(t, script), new(resolver)))
	if err == nil {
		s.Close()
		t.Fatal("it was loaded")
	}
	t.Log(err)
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than a line: %v", err)
	}
}

func TestLocationsThatAreWrong(t *testing.T) {
	for location, want := range map[string]string{
		"":                                  "has no location",
		"testdata":                          "not a file",
		"testdata/no-such.pac":              "no such file",
		"ftp://script.example/p.pac":        "from http:// or https://",
		"http:///p.pac":                     "from http:// or https://",
		"http://u:secret@script.example:1/": "connection refused",
		"http://none.example/p.pac":         "no such name",
		"http://\x00/":                      "cannot be read",
	} {
		_, err := Open(t.Context(), configure(location, new(resolver)))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %v, want a line with %q", location, err, want)
		}
	}
	large := write(t, strings.Repeat("/", maxScript+1))
	if _, err := Open(t.Context(), configure(large, new(resolver))); err == nil || !strings.Contains(err.Error(), "more than 1024 KiB") {
		t.Errorf("a large script: %v", err)
	}
}

func number(t *testing.T, text string) uint16 {
	t.Helper()
	var n uint16
	for _, digit := range text {
		n = n*10 + uint16(digit-'0')
	}
	return n
}
