package sniff

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// extension is one of a ClientHello.
type extension struct {
	kind uint16
	data []byte
}

// nameEntry is one entry of a server_name extension.
type nameEntry struct {
	kind uint8
	name string
}

// names makes a server_name extension.
func names(entries ...nameEntry) extension {
	var b cryptobyte.Builder
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		for _, entry := range entries {
			b.AddUint8(entry.kind)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(entry.name)) })
		}
	})
	return extension{extensionServerName, b.BytesOrPanic()}
}

// padding makes a padding extension (RFC 7685).
func padding(length int) extension {
	return extension{21, make([]byte, length)}
}

// hello makes the handshake message of a ClientHello.
func hello(extensions ...extension) []byte {
	var b cryptobyte.Builder
	b.AddUint8(messageClientHello)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(tls.VersionTLS12)
		b.AddBytes(make([]byte, randomLength))
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(make([]byte, 32)) })
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint16(tls.TLS_AES_128_GCM_SHA256) })
		b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddUint8(0) })
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			for _, extension := range extensions {
				b.AddUint16(extension.kind)
				b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(extension.data) })
			}
		})
	})
	return b.BytesOrPanic()
}

// records cuts a message into records of at most size bytes.
func records(message []byte, size int) []byte {
	var flight []byte
	for fragment := range slices.Chunk(message, size) {
		flight = append(flight, record(recordHandshake, fragment)...)
	}
	return flight
}

func record(kind byte, fragment []byte) []byte {
	return append([]byte{kind, recordMajor, 1, byte(len(fragment) >> 8), byte(len(fragment))}, fragment...)
}

// captured is a connection that holds what was written to it and ends what is read.
type captured struct {
	net.Conn
	in, out bytes.Buffer
}

func (c *captured) Read(b []byte) (int, error)       { return c.in.Read(b) }
func (c *captured) Write(b []byte) (int, error)      { return c.out.Write(b) }
func (c *captured) Close() error                     { return nil }
func (c *captured) SetDeadline(time.Time) error      { return nil }
func (c *captured) SetWriteDeadline(time.Time) error { return nil }
func (c *captured) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *captured) LocalAddr() net.Addr              { return &net.TCPAddr{} }

// realHello is the first flight of a client of crypto/tls.
func realHello(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	conn := new(captured)
	if err := tls.Client(conn, config).Handshake(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return conn.out.Bytes()
}

// echConfig makes an ECHConfigList (draft-ietf-tls-esni, section 4).
func echConfig(t testing.TB, publicName string) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var b cryptobyte.Builder
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
		b.AddUint16(0xfe0d) // version
		b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
			b.AddUint8(1)       // config_id
			b.AddUint16(0x0020) // DHKEM(X25519, HKDF-SHA256)
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(key.PublicKey().Bytes()) })
			b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) {
				b.AddUint16(1) // HKDF-SHA256
				b.AddUint16(1) // AES-128-GCM
			})
			b.AddUint8(0) // maximum_name_length
			b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(publicName)) })
			b.AddUint16(0) // extensions
		})
	})
	return b.BytesOrPanic()
}

func TestTLSOfRealClients(t *testing.T) {
	ech := &tls.Config{ServerName: "secret.example", EncryptedClientHelloConfigList: echConfig(t, "public.example")}
	for _, test := range []struct {
		name   string
		config *tls.Config
		want   result
	}{
		{"post-quantum", &tls.Config{ServerName: "www.example.org"}, result{"www.example.org", Found}},
		{"TLS 1.2", &tls.Config{ServerName: "www.example.org", MaxVersion: tls.VersionTLS12}, result{"www.example.org", Found}},
		{"encrypted hello", ech, result{"public.example", Found}},
		{"no name", &tls.Config{InsecureSkipVerify: true}, result{"", Absent}},
	} {
		flight := realHello(t, test.config)
		if test.name == "post-quantum" && len(flight) < 1500 {
			t.Errorf("the post-quantum hello has only %d bytes", len(flight))
		}
		for _, size := range []int{MaxFlight, 1000, 100, 5, 4, 3, 2, 1} {
			if got := cut[TLS](t, records(flight[recordHeader:], size)); got != test.want {
				t.Errorf("%s in records of %d bytes: %v, want %v", test.name, size, got, test.want)
			}
		}
	}
}

func TestTLS(t *testing.T) {
	var (
		message = hello(names(nameEntry{0, "www.example.org"}))
		good    = records(message, MaxFlight)
		found   = result{"www.example.org", Found}
		absent  = result{"", Absent}
		more    = result{"", More}
	)
	named := func(name string) []byte { return records(hello(names(nameEntry{0, name})), MaxFlight) }
	for _, test := range []struct {
		name   string
		flight []byte
		want   result
	}{
		{"hello", good, found},
		{"upper case, trailing dot", named("WWW.Example.ORG."), found},
		{"last extension of many", records(hello(padding(1200), padding(3000), names(nameEntry{0, "www.example.org"})), MaxFlight), found},
		{"other kinds of name first", records(hello(names(nameEntry{7, "x"}, nameEntry{0, "www.example.org"})), MaxFlight), found},
		{"more behind the hello", append(slices.Clone(good), "anything"...), found},
		{"more behind the hello in its record", record(recordHandshake, append(slices.Clone(message), 1, 2, 3)), found},
		{"longest that fits", records(hello(padding(MaxFlight-recordHeader-len(message)-4), names(nameEntry{0, "www.example.org"})), MaxFlight), found},

		{"nothing", nil, more},
		{"cut short", good[:len(good)-1], more},
		{"second record missing", records(message, len(message)-1)[:recordHeader+len(message)-1], more},

		{"HTTP", []byte("GET / HTTP/1.1\r\n"), absent},
		{"SSLv2", []byte{0x80, 0x2e, 1, 3, 1}, absent},
		{"first byte", []byte{0}, absent},
		{"version", []byte{recordHandshake, 2}, absent},
		{"empty record", []byte{recordHandshake, 3, 1, 0, 0}, absent},
		{"empty record in the middle", slices.Concat(record(recordHandshake, message[:9]), record(recordHandshake, nil), record(recordHandshake, message[9:])), absent},
		{"record that cannot fit", []byte{recordHandshake, 3, 1, 0x40, 0}, absent},
		{"alert first", append(record(21, []byte{1, 0}), good...), absent},
		{"alert in the middle", slices.Concat(record(recordHandshake, message[:9]), record(21, []byte{1, 0})), absent},
		{"ServerHello", []byte{recordHandshake, 3, 3, 0, 100, 2}, absent},
		{"message that cannot fit", record(recordHandshake, []byte{messageClientHello, 0, 0x3f, 0xf8}), absent},
		{"message that cannot fit in records", records([]byte{messageClientHello, 0xff, 0xff, 0xff}, 1), absent},
		{"no extensions", records(hello(), MaxFlight), absent},
		{"other extensions only", records(hello(padding(9)), MaxFlight), absent},
		{"other kinds of name only", records(hello(names(nameEntry{7, "www.example.org"})), MaxFlight), absent},
		{"empty list", records(hello(names()), MaxFlight), absent},
		{"empty name", named(""), absent},
		{"address", named("192.0.2.1"), absent},
		{"IPv6 address", named("2001:db8::1"), absent},
		{"line break", named("www.example.org\r\nX: y"), absent},
		{"localhost", named("localhost"), absent},
		{"endless name", named(string(make([]byte, 6000))), absent},
		{"list longer than the extension", records(hello(extension{0, []byte{0, 9, 0, 0, 1, 'a'}}), MaxFlight), absent},
		{"name longer than the list", records(hello(extension{0, []byte{0, 4, 0, 0, 9, 'a'}}), MaxFlight), absent},
		{"extension longer than the hello", records(append([]byte{1, 0, 0, 45}, append(make([]byte, 38), 1, 0, 0, 4, 0, 0, 0)...), MaxFlight), absent},
		{"hello of nothing", record(recordHandshake, []byte{messageClientHello, 0, 0, 0}), absent},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := cut[TLS](t, test.flight); got != test.want {
				t.Errorf("%v, want %v", got, test.want)
			}
		})
	}
	for i := range message {
		truncated := slices.Clone(message[:i])
		if i >= handshakeHeader {
			truncated[2], truncated[3] = byte((i-handshakeHeader)>>8), byte(i-handshakeHeader)
			if got := cut[TLS](t, records(truncated, MaxFlight)); got.verdict != Absent {
				t.Errorf("a hello that ends after %d bytes: %v", i, got)
			}
		}
	}
}

func TestTLSTooLong(t *testing.T) {
	flight := records(hello(padding(MaxFlight), names(nameEntry{0, "www.example.org"})), MaxFlight-recordHeader)
	if got := cut[TLS](t, flight); got != (result{"", Absent}) {
		t.Errorf("a hello of more than MaxFlight: %v", got)
	}
}

func TestTLSAllocates(t *testing.T) {
	flight := records(hello(padding(1500), names(nameEntry{0, "www.example.org"})), MaxFlight)
	if n := testing.AllocsPerRun(100, func() { new(TLS).Next(flight) }); n > 1 {
		t.Errorf("%v allocations for one record, want that of the name", n)
	}
	cut := records(flight[recordHeader:], 1)
	if n := testing.AllocsPerRun(100, func() { feed(new(TLS), cut, singly(cut)) }); n > 3 {
		t.Errorf("%v allocations for records of one byte, want those of the sniffer, the message and the name", n)
	}
}

func TestTLSLinear(t *testing.T) {
	name := names(nameEntry{0, "www.example.org"})
	linear(t, func() sniffer { return new(TLS) }, func(n int) []byte {
		return records(hello(padding(n/6-len(hello(name))-4), name), 1)
	})
}

// accepted asks crypto/tls for the server name of a flight.
func accepted(flight []byte) (name string, ok bool) {
	conn := new(captured)
	conn.in.Write(flight)
	stop := errors.New("seen")
	config := &tls.Config{GetConfigForClient: func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		name, ok = info.ServerName, true
		return nil, stop
	}}
	_ = tls.Server(conn, config).Handshake()
	return name, ok
}

// skipped reports whether crypto/tls may see another hello than this package, or
// one where this package sees none: it passes over warning alerts, takes records
// of any version below 0x1000, and reads hellos up to 64 KiB.
func skipped(flight []byte) bool {
	for rest := flight; len(rest) >= recordHeader; {
		if rest[0] != recordHandshake || rest[1] != recordMajor {
			return true
		}
		rest = rest[min(len(rest), recordHeader+recordLength(rest)):]
	}
	return len(flight) > MaxFlight
}

func FuzzTLS(f *testing.F) {
	// Without a post-quantum key share: long seeds keep the fuzzer busy minimizing.
	curves := []tls.CurveID{tls.X25519}
	for _, config := range []*tls.Config{
		{ServerName: "www.example.org", CurvePreferences: curves},
		{ServerName: "www.example.org", MaxVersion: tls.VersionTLS12},
		{InsecureSkipVerify: true, CurvePreferences: curves},
	} {
		flight := realHello(f, config)
		f.Add(flight, uint16(0))
		f.Add(flight, uint16(1))
		f.Add(flight, uint16(100))
	}
	f.Add(records(hello(names(nameEntry{0, "www.example.org"})), MaxFlight), uint16(3))
	f.Add(records(hello(names(nameEntry{7, "x"}, nameEntry{0, "WWW.example.org"})), MaxFlight), uint16(0))
	f.Add(record(recordHandshake, nil), uint16(0))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint16(0))
	// size, if not 0, has the fragment of the first record cut into smaller records.
	f.Fuzz(func(t *testing.T, flight []byte, size uint16) {
		if size > 0 && len(flight) > recordHeader {
			flight = records(flight[recordHeader:], int(size))
		}
		got := cut[TLS](t, flight)
		name, ok := accepted(flight)
		if !ok || skipped(flight) {
			return
		}
		want := result{"", Absent}
		if canonical, valid := ValidName(name); valid {
			want = result{canonical, Found}
		}
		if got != want {
			t.Errorf("%v, but crypto/tls sees the name %q\n%x", got, name, flight)
		}
	})
}

func BenchmarkTLS(b *testing.B) {
	flight := realHello(b, &tls.Config{ServerName: "www.example.org"})
	for _, size := range []int{MaxFlight, 1000} {
		flight := records(flight[recordHeader:], size)
		b.Run(fmt.Sprintf("records=%d", (len(flight)+size)/(size+recordHeader)), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var s TLS
				if _, verdict := s.Next(flight); verdict != Found {
					b.Fatal(verdict)
				}
			}
		})
	}
}
