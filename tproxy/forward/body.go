package forward

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// framing says how long a message's body is (RFC 9112 section 6.3).
type framing struct {
	kind   framingKind
	length int64 // of the sized kind, in bytes
}

type framingKind uint8

const (
	sized      framingKind = iota // by Content-Length; the zero value is an empty body
	chunked                       // by Transfer-Encoding
	untilClose                    // of responses: by the end of the connection
)

// Why the framing of a message is refused: two readers could disagree about where it
// ends (RFC 9112 section 11.2).
var (
	errBothLengths = errors.New("the message has both Content-Length and Transfer-Encoding (RFC 9112 section 6.1)")
	errManyLengths = errors.New("the message has more than one Content-Length (RFC 9110 section 8.6)")
	errLength      = errors.New("the Content-Length is not a decimal number (RFC 9110 section 8.6)")
	errCoding      = errors.New("the Transfer-Encoding is not `chunked` alone (RFC 9112 section 6.1)")
	errOldChunked  = errors.New("an HTTP/1.0 message has a Transfer-Encoding (RFC 9112 section 6.1)")
	errChunk       = errors.New("a chunk is malformed (RFC 9112 section 7.1)")
	errTrailer     = errors.New("the trailer section is malformed or longer than a head may be (RFC 9112 section 7.1.2)")
)

// requestBody is the framing of a request: without a word about it there is no body.
func requestBody(fields []field, minor byte) (framing, error) {
	length, coded, err := lengths(fields)
	switch {
	case err != nil:
		return framing{}, err
	case coded && minor == 0:
		return framing{}, errOldChunked
	case coded:
		return framing{kind: chunked}, nil
	case length >= 0:
		return framing{length: length}, nil
	}
	return framing{}, nil
}

// responseBody is the framing of a response that may have a body: without a word
// about it that ends with the connection.
func responseBody(fields []field) (framing, error) {
	length, coded, err := lengths(fields)
	switch {
	case err != nil:
		return framing{}, err
	case coded:
		return framing{kind: chunked}, nil
	case length >= 0:
		return framing{length: length}, nil
	}
	return framing{kind: untilClose}, nil
}

// lengths reads the two fields that say where a body ends; length is -1 without one.
func lengths(fields []field) (length int64, coded bool, err error) {
	length = -1
	for _, f := range fields {
		switch {
		case f.is("Content-Length"):
			if length >= 0 {
				return 0, false, errManyLengths
			}
			// More than 18 digits do not fit, and one that is signed is none.
			if len(f.value) == 0 || len(f.value) > 18 || len(bytes.Trim(f.value, "0123456789")) > 0 {
				return 0, false, errLength
			}
			length, _ = strconv.ParseInt(string(f.value), 10, 64)
		case f.is("Transfer-Encoding"):
			if coded || len(f.value) != len("chunked") || !equalFold(f.value, "chunked") {
				return 0, false, errCoding
			}
			coded = true
		}
	}
	if coded && length >= 0 {
		return 0, false, errBothLengths
	}
	return length, coded, nil
}

// transfer carries a body from one connection to the other as it comes. What is in
// from's buffer goes first, behind what waits in to. chunks says whether chunks stay
// chunks or only their data goes on. moved counts the data.
func (f framing) transfer(to *sink, from *stream, chunks bool) (moved int64, err error) {
	switch f.kind {
	case sized:
		moved, err = transferSized(to, from, f.length)
	case untilClose:
		moved, err = transferAll(to, from)
	case chunked:
		moved, err = transferChunks(to, from, chunks)
	}
	if err != nil {
		return moved, err
	}
	return moved, to.flush()
}

// spliced is the least that is worth handing to splice(2) with its pipe.
const spliced = 64 << 10 // bytes

// transferSized carries n bytes.
func transferSized(to *sink, from *stream, n int64) (moved int64, err error) {
	for moved < n {
		ready := from.buffered()
		if len(ready) == 0 {
			if n-moved >= spliced {
				sent, err := to.readFrom(from.conn, n-moved)
				moved += sent
				if err == nil && moved < n {
					err = sourceError{io.ErrUnexpectedEOF}
				}
				return moved, err
			}
			if ready, err = from.more(to); err != nil {
				return moved, err
			}
		}
		ready = ready[:min(int64(len(ready)), n-moved)]
		if err := to.write(ready); err != nil {
			return moved, err
		}
		from.skip(len(ready))
		moved += int64(len(ready))
	}
	return moved, nil
}

// transferAll carries what comes until the connection ends.
func transferAll(to *sink, from *stream) (moved int64, err error) {
	ready := from.buffered()
	if err := to.write(ready); err != nil {
		return 0, err
	}
	moved = int64(len(ready))
	from.skip(len(ready))
	const all = 1<<63 - 1
	sent, err := to.readFrom(from.conn, all)
	return moved + sent, err
}

// maxChunkLine bounds the line before a chunk, of which the extensions are not
// passed on (RFC 9112 section 7.1.1); the figure is that of net/http.
const maxChunkLine = 4 << 10 // bytes

// transferChunks carries chunks and the trailer section behind them.
func transferChunks(to *sink, from *stream, chunks bool) (moved int64, err error) {
	for {
		line, err := from.line(to, maxChunkLine)
		if err != nil {
			return moved, err
		}
		size, err := chunkSize(line)
		if err != nil {
			return moved, err
		}
		from.skip(len(line) + len("\r\n"))
		if size == 0 {
			break
		}
		if chunks {
			var header [18]byte
			if err := to.write(append(strconv.AppendInt(header[:0], size, 16), '\r', '\n')); err != nil {
				return moved, err
			}
		}
		n, err := transferSized(to, from, size)
		moved += n
		if err != nil {
			return moved, err
		}
		if line, err = from.line(to, maxChunkLine); err != nil {
			return moved, err
		}
		if len(line) > 0 {
			return moved, sourceError{errChunk}
		}
		from.skip(len("\r\n"))
		if chunks {
			if err := to.write([]byte("\r\n")); err != nil {
				return moved, err
			}
		}
	}
	return moved, transferTrailer(to, from, chunks)
}

// chunkSize reads the line before a chunk.
func chunkSize(line []byte) (int64, error) {
	digits, extension, extended := bytes.Cut(line, []byte{';'})
	if extended {
		digits = bytes.TrimRight(digits, " \t") // RFC 9112 section 7.1.1: to be taken
	}
	for _, c := range extension {
		if c < ' ' && c != '\t' || c == 0x7f {
			return 0, sourceError{errChunk}
		}
	}
	if len(digits) == 0 || len(digits) > 15 {
		return 0, sourceError{errChunk}
	}
	var size int64
	for _, c := range digits {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= lower(c) && lower(c) <= 'f':
			c = lower(c) - 'a' + 10
		default:
			return 0, sourceError{errChunk}
		}
		size = size<<4 | int64(c)
	}
	return size, nil
}

// transferTrailer carries the end of a chunked body. Fields that a trailer section
// must not have, because they say where a message ends or goes or who sent it (RFC
// 9110 section 6.5.1), are left out.
func transferTrailer(to *sink, from *stream, chunks bool) error {
	var trailer []byte
	size := 0
	for {
		line, err := from.line(to, maxChunkLine)
		if err != nil {
			return err
		}
		if size += len(line); size > maxHead {
			return sourceError{errTrailer}
		}
		if len(line) == 0 {
			from.skip(len("\r\n"))
			break
		}
		f, err := parseField(line)
		if err != nil {
			return sourceError{fmt.Errorf("%w: %w", errTrailer, err)}
		}
		if chunks && !f.framesOrRoutes() && !f.isHopByHop() {
			trailer = f.append(trailer)
		}
		from.skip(len(line) + len("\r\n"))
	}
	if !chunks {
		return nil
	}
	if err := to.write([]byte("0\r\n")); err != nil {
		return err
	}
	if err := to.write(trailer); err != nil {
		return err
	}
	return to.write([]byte("\r\n"))
}
