package test

import (
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/transproxy-tproxy/transproxy-tproxy"

// mayImport is the import graph of docs/ARCHITECTURE.md: which packages of this
// module each production package may import. Those that change the kernel and
// those that carry traffic never know one another; they meet in the command as
// numbers, prefixes and functions.
var mayImport = map[string][]string{
	"cmd/transproxy-tproxy": {
		"tproxy", "tproxy/bypass", "tproxy/forward", "tproxy/pac", "tproxy/udp", "tproxy/upstream", "tproxy/upstream/auth", "tproxy/upstream/probe", "routing", "netfilter", "netfilter/sklookup", "netfilter/firewalld",
		"resolver", "resolver/exchange", "resolver/fakeip",
		"test/lab", "test/netns", // for the demo
	},
	"tproxy":                {"tproxy/bypass", "tproxy/forward", "tproxy/sniff", "tproxy/udp", "tproxy/upstream", "tproxy/relay"},
	"tproxy/bypass":         {},
	"tproxy/forward":        {"tproxy/relay", "tproxy/sniff", "tproxy/upstream"},
	"tproxy/pac":            {},
	"tproxy/relay":          {},
	"tproxy/sniff":          {},
	"tproxy/udp":            {"tproxy/upstream"},
	"tproxy/upstream":       {"tproxy/upstream/auth"},
	"tproxy/upstream/auth":  {},
	"tproxy/upstream/probe": {"tproxy/upstream"},
	"resolver":              {"resolver/cache", "resolver/fakeip"},
	"resolver/cache":        {},
	"resolver/exchange":     {},
	"resolver/fakeip":       {},
	"netfilter":             {},
	"netfilter/sklookup":    {},
	"netfilter/firewalld":   {},
	"routing":               {},
	"test/lab":              {"test/netns"},
	"test/netns":            {},
}

// onlyIn names the one production package that may import a library, so that
// replacing the library means changing that package.
var onlyIn = map[string]string{
	"github.com/google/nftables":          "netfilter",
	"github.com/vishvananda/netlink":      "routing",
	"github.com/miekg/dns":                "resolver",
	"golang.org/x/crypto/cryptobyte":      "tproxy/sniff",
	"golang.org/x/net/dns/dnsmessage":     "tproxy/upstream/probe",
	"golang.org/x/net/http/httpproxy":     "", // an oracle of tests only
	"github.com/cilium/ebpf":              "netfilter/sklookup",
	"github.com/godbus/dbus":              "netfilter/firewalld",
	"github.com/dop251/goja":              "tproxy/pac",
	"github.com/prometheus/client_golang": "cmd/transproxy-tproxy",
	"github.com/jcmturner/gokrb5":         "tproxy/upstream/auth",
}

// topLevel is what may stand at the top of the repository, dot files aside.
var topLevel = []string{
	"cmd", "tproxy", "routing", "netfilter", "resolver", "test", "docs", "packaging",
	"go.mod", "go.sum", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "bin",
}

func TestImportGraph(t *testing.T) {
	for dir, files := range packages(t, token.NewFileSet()) {
		allowed, known := mayImport[dir]
		if !known && dir != "test" && !strings.HasPrefix(dir, "test/") {
			t.Errorf("package %s is not in the import graph", dir)
		}
		for _, file := range files {
			for _, spec := range file.Imports {
				imported := strings.Trim(spec.Path.Value, `"`)
				if inner, ours := strings.CutPrefix(imported, module+"/"); ours && known && !slices.Contains(allowed, inner) {
					t.Errorf("%s imports %s, which the import graph does not allow", dir, inner)
				}
				for library, home := range onlyIn {
					if (imported == library || strings.HasPrefix(imported, library+"/")) && dir != home && !strings.HasPrefix(dir, "test/") {
						t.Errorf("%s imports %s, which belongs in %q alone", dir, imported, home)
					}
				}
			}
		}
	}
}

func TestEverythingExportedIsDocumented(t *testing.T) {
	positions := token.NewFileSet()
	for dir, files := range packages(t, positions) {
		described, err := doc.NewFromFiles(positions, files, path.Join(module, dir))
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		if described.Doc == "" {
			t.Errorf("package %s has no package comment", dir)
		}
		for _, function := range described.Funcs {
			undocumented(t, dir, function.Name, function.Doc)
		}
		for _, value := range slices.Concat(described.Consts, described.Vars) {
			undocumentedValue(t, dir, value)
		}
		for _, kind := range described.Types {
			undocumented(t, dir, kind.Name, kind.Doc)
			for _, function := range slices.Concat(kind.Funcs, kind.Methods) {
				undocumented(t, dir, kind.Name+"."+function.Name, function.Doc)
			}
			for _, value := range slices.Concat(kind.Consts, kind.Vars) {
				undocumentedValue(t, dir, value)
			}
		}
	}
}

func undocumented(t *testing.T, dir, name, text string) {
	t.Helper()
	if text == "" {
		t.Errorf("%s: %s has no doc comment", dir, name)
	}
}

// undocumentedValue wants a comment on the declaration, on the line of the name
// or behind it.
func undocumentedValue(t *testing.T, dir string, value *doc.Value) {
	t.Helper()
	for _, spec := range value.Decl.Specs {
		value1, ok := spec.(*ast.ValueSpec)
		if !ok || value.Doc != "" || value1.Doc != nil || value1.Comment != nil {
			continue
		}
		for _, name := range value1.Names {
			if name.IsExported() {
				t.Errorf("%s: %s has no doc comment", dir, name.Name)
			}
		}
	}
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if name := entry.Name(); !strings.HasPrefix(name, ".") && !slices.Contains(topLevel, name) {
			t.Errorf("%s stands at the top of the repository: there is a room for it in one of %v", name, topLevel)
		}
	}
}

// packages parses all non-test Go files of the repository, by package directory.
func packages(t *testing.T, positions *token.FileSet) map[string][]*ast.File {
	t.Helper()
	found := make(map[string][]*ast.File)
	err := filepath.WalkDir("..", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && name != ".." {
			return filepath.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(positions, name, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel("..", filepath.Dir(name))
		found[dir] = append(found[dir], file)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Fatal("no package was found")
	}
	return found
}
