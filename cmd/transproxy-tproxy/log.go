package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/term"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/forward"
	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy/udp"
)

const (
	// logQueue is how many lines may wait for a slow reader of a log; more are given
	// up. At 10,000 flows a second it is half a second.
	logQueue = 4096
	// logClose bounds the wait for what is still queued when a log is closed.
	logClose = time.Second
)

// sink is where the lines of a log go. It never makes the program wait: flows are
// carried on event loops, which a reader that has stopped reading must not hold up.
type sink struct {
	out   io.Writer
	file  *os.File
	lost  func() // told of every line that is given up
	lines chan []byte
	quit  chan struct{} // closed by close
	ended chan struct{} // closed when nothing is written any more
}

// newSink makes a sink of a file: for people on a terminal, JSON else.
func newSink(format string, file *os.File, lost func()) *sink {
	s := &sink{
		out: file, file: file, lost: lost,
		lines: make(chan []byte, logQueue), quit: make(chan struct{}), ended: make(chan struct{}),
	}
	terminal := term.IsTerminal(int(file.Fd()))
	if format == "console" || format == "auto" && terminal {
		s.out = zerolog.ConsoleWriter{Out: file, NoColor: !terminal || os.Getenv("NO_COLOR") != "", TimeFormat: time.RFC3339}
	}
	go s.run()
	return s
}

// Write queues a line; zerolog uses the bytes again.
func (s *sink) Write(line []byte) (int, error) {
	select {
	case s.lines <- bytes.Clone(line):
	default:
		s.lost()
	}
	return len(line), nil
}

// run writes what is queued.
func (s *sink) run() {
	defer close(s.ended)
	for {
		select {
		case line := <-s.lines:
			s.put(line)
		case <-s.quit:
			for len(s.lines) > 0 {
				s.put(<-s.lines)
			}
			return
		}
	}
}

// put writes a line. It fails when the reader of a pipe has gone or a disk is full.
func (s *sink) put(line []byte) {
	if _, err := s.out.Write(line); err != nil {
		s.lost()
	}
}

// close writes what is queued, as far as that is possible soon, and closes the
// file unless it is a standard stream. Lines that come later are ignored.
func (s *sink) close() {
	close(s.quit)
	select {
	case <-s.ended:
	case <-time.After(logClose):
	}
	if s.file != os.Stdout && s.file != os.Stderr {
		s.file.Close()
	}
}

// newLogger makes the program's log on standard error. The caller closes the sink.
func newLogger(s *settings) (zerolog.Logger, *sink) {
	out := newSink(s.logFormat, os.Stderr, func() {}) // where would one say so?
	return zerolog.New(out).Level(s.level).With().Timestamp().Logger(), out
}

// accessLog writes one line a tunnel and one an HTTP request. It is safe for concurrent use; whoever opens
// it closes it.
type accessLog struct {
	settings *settings
	log      zerolog.Logger // tells of lines that were lost
	lost     atomic.Int64   // how many those are

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
	fresh := newSink(l.settings.logFormat, file, func() {
		l.log.Warn().Int64("lost", l.lost.Add(1)).Msg("lines of the access log are lost: its reader is too slow or gone, or its disk full")
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

// request queues the line of one HTTP request.
func (l *accessLog) request(r forward.Record) {
	l.mutex.RLock()
	defer l.mutex.RUnlock()
	if l.sink == nil {
		return
	}
	line := l.logger.Log().
		Stringer("client", r.Address).
		Stringer("destination", r.Destination).
		Str("method", r.Method).
		Str("url", r.URL).
		Int("status", r.Status).
		Int64("sent", r.Sent).
		Int64("received", r.Received).
		Dur("first_byte_ms", r.FirstByte).
		Dur("duration_ms", r.Duration).
		Bool("reused", r.Reused)
	switch {
	case r.Direct:
		line = line.Str("way", "direct")
	case r.Proxy != "":
		line = line.Str("way", "upstream").Str("upstream", r.Proxy)
	}
	end := "done"
	if r.Err != nil {
		end = r.Err.Error()
	}
	line.Str("end", end).Msg("request")
}

// datagrams queues the line of one UDP session.
func (l *accessLog) datagrams(r udp.Record) {
	l.mutex.RLock()
	defer l.mutex.RUnlock()
	if l.sink == nil {
		return
	}
	line := l.logger.Log().
		Stringer("client", r.Client).
		Stringer("destination", r.Destination).
		Int("destinations", r.Destinations).
		Stringer("way", r.Way).
		Int64("sent", r.Sent).
		Int64("received", r.Received).
		Int64("sent_datagrams", r.SentDatagrams).
		Int64("received_datagrams", r.ReceivedDatagrams).
		Dur("duration_ms", r.Duration)
	if r.Name != "" {
		line = line.Str("name", r.Name).Str("name_from", r.NameFrom)
	}
	if r.Upstream != "" {
		line = line.Str("upstream", r.Upstream)
	}
	end := "idle"
	if r.Err != nil {
		end = r.Err.Error()
	}
	line.Str("end", end).Msg("udp")
}

// flow queues the line of one tunnel.
func (l *accessLog) flow(r tproxy.Record) {
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
