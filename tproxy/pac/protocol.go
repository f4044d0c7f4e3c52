package pac

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// The program and its evaluators talk over two pipes in frames: the length of a
// message in four bytes, big endian, then the message as JSON. It is a dialogue:
// the program asks (load, find), the evaluator answers (done); before it answers
// it may ask back (resolve, addresses), which is answered at once (answer), and
// report what the script says (alert).

// kind says what a message is about.
type kind string

const (
	kindLoad      kind = "load"      // compile and run Text, which is called Name; answered by done
	kindFind      kind = "find"      // call FindProxyForURL with URL and Host; answered by done
	kindDone      kind = "done"      // Error or Text, Null, Varies
	kindResolve   kind = "resolve"   // which addresses has Host; answered by answer
	kindAddresses kind = "addresses" // which addresses has this machine; answered by answer
	kindAnswer    kind = "answer"    // Addresses
	kindAlert     kind = "alert"     // the script called alert(Text)
)

// message is any message; which fields are used is said at each kind.
type message struct {
	Kind      kind     `json:"kind"`
	Name      string   `json:"name,omitempty"`
	Text      string   `json:"text,omitempty"`
	URL       string   `json:"url,omitempty"`
	Host      string   `json:"host,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
	Error     string   `json:"error,omitempty"`
	Varies    bool     `json:"varies,omitempty"` // another call may have another answer: time, DNS or chance decided
}

// limit bounds the time for a question, look-ups not counted.
func (m message) limit() time.Duration {
	if m.Kind == kindLoad {
		return startLimit
	}
	return runLimit
}

const (
	// maxScript bounds a script in bytes; Chromium's bound is the same 1 MiB.
	maxScript = 1 << 20

	// maxToEvaluator bounds a message to an evaluator: a script in which JSON had
	// to write every byte as \u0000.
	maxToEvaluator = 6*maxScript + 4096

	// maxFromEvaluator bounds a message of an evaluator in bytes: its longest part
	// is a result, and JSON may make six bytes of one.
	maxFromEvaluator = 6*maxResult + 4096
)

// send writes one message.
func send(out io.Writer, m message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	frame := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	_, err = out.Write(append(frame, body...))
	return err
}

// receive reads one message of at most limit bytes. The error is io.EOF when the
// other side has ended between two messages.
func receive(in io.Reader, limit uint32) (message, error) {
	var length [4]byte
	if _, err := io.ReadFull(in, length[:]); err != nil {
		return message{}, err
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > limit {
		return message{}, fmt.Errorf("a message of %d bytes: at most %d are allowed", size, limit)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(in, body); err != nil {
		return message{}, fmt.Errorf("a message broke off: %w", err)
	}
	var m message
	if err := json.Unmarshal(body, &m); err != nil {
		return message{}, fmt.Errorf("a message that is none: %w", err)
	}
	return m, nil
}
