package fakeip

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"
)

const (
	// magic starts every store; after it come the version and the prefixes.
	magic   = "transproxy-tproxy fake-ip "
	version = "1"

	// maxLine bounds a line: a name, two addresses, a time and what separates
	// them make 332 bytes at most.
	maxLine = 512 // bytes

	// timeLayout is RFC 3339 in UTC: always 20 bytes, so that no part of a line is
	// a line.
	timeLayout = "2006-01-02T15:04:05Z"
)

// errNoStore says that a file is something else.
var errNoStore = errors.New("the file is no fake-IP store and is left as it is: choose another, or remove it")

// header returns the first line of a store, without its end.
func (r *ranges) header() string {
	line := magic + version
	for _, prefix := range []netip.Prefix{r.ipv4, r.ipv6} {
		if prefix.IsValid() {
			line += " " + prefix.String()
		}
	}
	return line
}

// appendLine appends the line of an entry that is written at a time.
func (r *ranges) appendLine(to []byte, e entry, at time.Time) []byte {
	to = append(to, e.name...)
	ipv4, ipv6 := r.addresses(e.offset)
	for _, address := range []netip.Addr{ipv4, ipv6} {
		if address.IsValid() {
			to = append(to, ' ')
			to = address.AppendTo(to)
		}
	}
	to = append(to, ' ')
	to = at.UTC().AppendFormat(to, timeLayout)
	return append(to, '\n')
}

// parseLine returns the entry of a line, without its end, if it is one that
// appendLine writes.
func (r *ranges) parseLine(line []byte) (e entry, ok bool) {
	name, rest, _ := strings.Cut(string(line), " ")
	if !valid(name) {
		return entry{}, false
	}
	first := true
	for _, prefix := range []netip.Prefix{r.ipv4, r.ipv6} {
		if !prefix.IsValid() {
			continue
		}
		var text string
		text, rest, _ = strings.Cut(rest, " ")
		address, err := netip.ParseAddr(text)
		if err != nil || !prefix.Contains(address) {
			return entry{}, false
		}
		offset, ok := r.offset(address)
		if !ok || !first && offset != e.offset {
			return entry{}, false
		}
		e.offset, first = offset, false
	}
	if _, err := time.Parse(timeLayout, rest); err != nil || len(rest) != len(timeLayout) {
		return entry{}, false
	}
	e.name = name
	return e, true
}

// contents is what read made of a store, beside its entries.
type contents struct {
	other   string // the first line, where it is of other prefixes or another version; nothing else was read
	header  bool   // whether the first line is damaged
	damaged int    // lines dropped for damage, the first not counted
}

// read gives the entries of a store to restore, in their order. It takes what is
// good and counts the rest. errNoStore tells of a text that never was a store.
func (r *ranges) read(from io.Reader, restore func(entry)) (contents, error) {
	reader := bufio.NewReaderSize(from, maxLine)
	var c contents
	first, whole, err := nextLine(reader)
	if errors.Is(err, io.EOF) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	switch text := string(first); {
	case whole && text == r.header():
	case whole && strings.HasPrefix(text, magic):
		c.other = strings.ToValidUTF8(text, "?")
		return c, nil
	case bytes.IndexByte(first, 0) >= 0 || strings.HasPrefix(text, magic) || strings.HasPrefix(magic, text):
		// Zeros are what a power failure leaves.
		c.header = true
	default:
		return c, errNoStore
	}
	for {
		line, whole, err := nextLine(reader)
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return c, err
		}
		if e, ok := r.parseLine(line); ok && whole {
			restore(e)
		} else {
			c.damaged++
		}
	}
}

// nextLine returns a line without its end, which is valid until the next call.
// Not whole is one that is longer than maxLine, of which it returns the start,
// or that the end of the file cuts. The error is io.EOF after the last.
func nextLine(reader *bufio.Reader) (line []byte, whole bool, err error) {
	line, err = reader.ReadSlice('\n')
	switch {
	case err == nil:
		return line[:len(line)-1], true, nil
	case errors.Is(err, bufio.ErrBufferFull):
		line = bytes.Clone(line)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = reader.ReadSlice('\n')
		}
	case len(line) == 0:
		return nil, false, err
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, false, err
	}
	return line, false, nil
}

// notes says in sentences what was dropped.
func (c *contents) notes() (notes []string) {
	if c.other != "" {
		notes = append(notes, fmt.Sprintf("fake-IP store starts anew: it was written for %q", c.other))
	}
	if c.header {
		notes = append(notes, "fake-IP store: its first line is damaged")
	}
	if c.damaged > 0 {
		notes = append(notes, fmt.Sprintf("fake-IP store: %d damaged lines dropped", c.damaged))
	}
	return notes
}
