package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/rs/zerolog/diode"
	"golang.org/x/term"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
)

const (
	// logQueue is how many lines may wait for a slow reader of a log; older ones
	// are given up for newer ones. At 10,000 flows a second it is half a second.
	logQueue = 4096
	// logClose bounds the wait for what is still queued when a log is closed.
	logClose = time.Second
)

// sink is where the lines of a log go. It never makes the program wait: flows are
// carried on event loops, which a reader that has stopped reading must not hold up.
type sink struct {
	queue diode.Writer
	file  *os.File
}

// newSink makes a sink of a file: for people on a terminal, JSON else. lost is
// told how many lines were given up.
func newSink(format string, file *os.File, lost func(lines int)) *sink {
	var out io.Writer = file
	terminal := term.IsTerminal(int(file.Fd()))
	if format == "console" || format == "auto" && terminal {
		out = zerolog.ConsoleWriter{Out: file, NoColor: !terminal || os.Getenv("NO_COLOR") != "", TimeFormat: time.RFC3339}
	}
	return &sink{
		// The queue closes what it writes to, if it can: a standard stream stays open.
		queue: diode.NewWriter(lossyWriter{out, lost}, logQueue, 0, lost),
		file:  file,
	}
}

// lossyWriter counts the lines that cannot be written, as when the reader of a pipe
// has gone or a disk is full, and hides that its writer can be closed.
type lossyWriter struct {
	io.Writer
	lost func(lines int)
}

func (w lossyWriter) Write(line []byte) (int, error) {
	n, err := w.Writer.Write(line)
	if err != nil {
		w.lost(1)
	}
	return n, err
}

func (s *sink) Write(line []byte) (int, error) { return s.queue.Write(line) }

// close writes what is queued, as far as that is possible soon, and closes the
// file unless it is a standard stream.
func (s *sink) close() {
	done := make(chan struct{})
	go func() {
		s.queue.Close()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(logClose):
	}
	if s.file != os.Stdout && s.file != os.Stderr {
		s.file.Close()
	}
}

// newLogger makes the program's log on standard error. The caller closes the sink.
func newLogger(s *settings) (zerolog.Logger, *sink) {
	out := newSink(s.logFormat, os.Stderr, func(int) {}) // where would one say so?
	return zerolog.New(out).Level(s.level).With().Timestamp().Logger(), out
}

// accessLog writes one line a flow. It is safe for concurrent use; whoever opens
// it closes it.
type accessLog struct {
	settings *settings
	log      zerolog.Logger // tells of lines that were lost

	mutex  sync.RWMutex
	sink   *sink // nil for off
	logger zerolog.Logger
}

func openAccessLog(s *settings, log zerolog.Logger) (*accessLog, error) {
	// Every line may be lost; a word about it now and then is enough.
	seldom := log.Sample(&zerolog.BurstSampler{Burst: 1, Period: 10 * time.Second})
	l := &accessLog{settings: s, log: seldom}
	return l, l.reopen()
}

// reopen opens the file anew, so that a rotated log continues in a fresh file. On
// failure the old one stays in use.
func (l *accessLog) reopen() error {
	file := os.Stdout
	switch l.settings.accessLog {
	case "off":
		return nil
	case "-":
	default:
		var err error
		// Addresses and names of clients are nobody else's business.
		file, err = os.OpenFile(l.settings.accessLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
		if err != nil {
			return fmt.Errorf("--access-log: %w: name a file that can be written, - or off", err)
		}
	}
	fresh := newSink(l.settings.logFormat, file, func(int) {
		l.log.Warn().Msg("lines of the access log are lost: its reader is too slow or gone, or its disk full")
	})
	logger := zerolog.New(fresh).With().Timestamp().Logger()

	l.mutex.Lock()
	old := l.sink
	l.sink, l.logger = fresh, logger
	l.mutex.Unlock()
	if old != nil {
		old.close()
	}
	return nil
}

// close writes what is queued and closes the file.
func (l *accessLog) close() {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.sink != nil {
		l.sink.close()
		l.sink = nil
	}
}

// write queues the line of one flow.
func (l *accessLog) write(r tproxy.Record) {
	l.mutex.RLock()
	defer l.mutex.RUnlock()
	if l.sink == nil {
		return
	}
	line := l.logger.Log().
		Stringer("client", r.Client).
		Stringer("destination", r.Destination).
		Str("way", r.Way).
		Int64("sent", r.Sent).
		Int64("received", r.Received).
		Dur("duration_ms", r.Duration)
	if r.Name != "" {
		line = line.Str("name", r.Name).Str("name_from", r.NameFrom)
	}
	if r.Upstream != "" {
		line = line.Str("upstream", r.Upstream)
	}
	end := "closed"
	if r.Err != nil {
		end = r.Err.Error()
	}
	line.Str("end", end).Msg("flow")
}
