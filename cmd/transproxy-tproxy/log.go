package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/term"

	"github.com/transproxy-tproxy/transproxy-tproxy/tproxy"
)

// newLogger makes the program's log: for people on a terminal, JSON else.
func newLogger(s *settings, out *os.File) zerolog.Logger {
	return zerolog.New(logWriter(s, out, out)).Level(s.level).With().Timestamp().Logger()
}

// logWriter wraps out in what the chosen format needs. terminal is the file whose
// nature decides the format "auto"; nil is none.
func logWriter(s *settings, out io.Writer, terminal *os.File) io.Writer {
	onTerminal := terminal != nil && term.IsTerminal(int(terminal.Fd()))
	if s.logFormat == "json" || s.logFormat == "auto" && !onTerminal {
		return out
	}
	return zerolog.ConsoleWriter{Out: out, NoColor: !onTerminal || os.Getenv("NO_COLOR") != "", TimeFormat: time.RFC3339}
}

// accessLog writes one line a flow. It is safe for concurrent use; whoever opens
// it closes it.
type accessLog struct {
	settings *settings

	mutex  sync.Mutex
	file   *os.File // nil for off
	logger zerolog.Logger
}

func openAccessLog(s *settings) (*accessLog, error) {
	log := &accessLog{settings: s}
	return log, log.Reopen()
}

// Reopen opens the file anew, so that a rotated log continues in a fresh file.
// On failure the old one stays in use.
func (l *accessLog) Reopen() error {
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
	logger := zerolog.New(logWriter(l.settings, file, file)).With().Timestamp().Logger()

	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.closeFile()
	l.file, l.logger = file, logger
	return nil
}

// Close closes the file.
func (l *accessLog) Close() {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.closeFile()
	l.file = nil
}

func (l *accessLog) closeFile() {
	if l.file != nil && l.file != os.Stdout {
		l.file.Close()
	}
}

// Write writes the line of one flow.
func (l *accessLog) Write(r tproxy.Record) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.file == nil {
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
