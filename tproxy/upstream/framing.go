package upstream

import (
	"bytes"
	"errors"
	"strconv"
)

// maxReplyBody bounds the body of a 407 that is read so that its connection can be used
// again; squid's page has 4 KiB. A longer one costs a new connection.
const maxReplyBody = 64 << 10 // bytes

// errUnframed says that the end of a body cannot be found, or that nothing may follow it.
var errUnframed = errors.New("the connection is of no more use")

// replyFraming finds the end of a 407's body (RFC 9112 section 6.3). What is in the least
// doubtful ends with the connection: a wrong end would have the body read as an answer.
type replyFraming struct {
	minor   byte // of the version: HTTP/1.minor
	keep    bool // keep-alive was said
	close   bool
	chunked bool
	length  int // -1 for none
	lengths int // fields that say it

	stage framingStage
	size  int // of the chunk, or what is left of it or of the body
	line  int // bytes of the line so far
	total int // bytes of all
}

// framingStage is where in a body reading is.
type framingStage uint8

const (
	inData framingStage = iota
	inSize
	inExtension
	afterChunk
	inTrailer
)

// readField takes note of a header field.
func (f *replyFraming) readField(name, value []byte) {
	value = bytes.Trim(value, " \t")
	switch {
	case bytes.EqualFold(name, []byte("Content-Length")):
		f.lengths++
		length, err := strconv.ParseUint(string(value), 10, 31)
		f.length = int(length)
		f.close = f.close || err != nil || f.lengths > 1
	case bytes.EqualFold(name, []byte("Transfer-Encoding")):
		f.close = f.close || f.chunked || !bytes.EqualFold(value, []byte("chunked"))
		f.chunked = true
	case bytes.EqualFold(name, []byte("Connection")), bytes.EqualFold(name, []byte("Proxy-Connection")):
		for option := range bytes.SplitSeq(value, []byte{','}) {
			option = bytes.Trim(option, " \t")
			f.close = f.close || bytes.EqualFold(option, []byte("close"))
			f.keep = f.keep || bytes.EqualFold(option, []byte("keep-alive"))
		}
	}
}

// begin ends the head.
func (f *replyFraming) begin() error {
	framed := f.chunked != (f.lengths > 0)
	if f.close || !framed || f.minor == 0 && (!f.keep || f.chunked) || f.length > maxReplyBody {
		return errUnframed
	}
	if f.chunked {
		f.stage = inSize
	} else {
		f.size = f.length
	}
	return nil
}

// empty reports whether there is no body.
func (f *replyFraming) empty() bool { return !f.chunked && f.size == 0 }

// skip reads on in the body. rest is what is behind its end.
func (f *replyFraming) skip(in []byte) (rest []byte, done bool, err error) {
	for len(in) > 0 {
		if f.stage == inData {
			n := min(f.size, len(in))
			in, f.size = in[n:], f.size-n
			if f.total += n; f.total > maxReplyBody {
				return nil, false, errUnframed
			}
			if f.size > 0 {
				break
			}
			if !f.chunked {
				return in, true, nil
			}
			f.stage = afterChunk
			continue
		}
		c := in[0]
		in = in[1:]
		if f.total++; f.total > maxReplyBody {
			return nil, false, errUnframed
		}
		if done, err = f.read(c); done || err != nil {
			return in, done, err
		}
	}
	return nil, false, nil
}

// read takes a byte of what is between the data of chunks (RFC 9112 section 7.1).
func (f *replyFraming) read(c byte) (done bool, err error) {
	switch f.stage {
	case inSize:
		digit := bytes.IndexByte([]byte("0123456789abcdef"), c|0x20)
		if isDigit(c) {
			digit = int(c - '0')
		}
		switch {
		case digit >= 0 && isAlphanumeric(c):
			f.line++
			if f.size = f.size<<4 | digit; f.size > maxReplyBody {
				return false, errUnframed
			}
			return false, nil
		case f.line == 0:
			return false, errUnframed
		}
		f.stage = inExtension
		return f.read(c)
	case inExtension:
		if c == '\n' {
			f.line, f.stage = 0, inData
			if f.size == 0 {
				f.stage = inTrailer
			}
		}
	case afterChunk:
		switch c {
		case '\n':
			f.stage, f.line, f.size = inSize, 0, 0
		case '\r':
		default:
			return false, errUnframed
		}
	case inTrailer:
		switch c {
		case '\n':
			if f.line == 0 {
				return true, nil
			}
			f.line = 0
		case '\r':
		default:
			f.line++
		}
	}
	return false, nil
}
