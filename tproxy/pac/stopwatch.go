package pac

import "time"

// stopwatch calls a function when a time has passed, pauses not counted.
type stopwatch struct {
	timer *time.Timer
	since time.Time
	left  time.Duration
}

func (s *stopwatch) start(limit time.Duration, over func()) {
	s.stop()
	s.left = limit
	s.since = time.Now()
	s.timer = time.AfterFunc(s.left, over)
}

func (s *stopwatch) pause() {
	if s.timer != nil {
		s.timer.Stop()
		s.left -= time.Since(s.since)
	}
}

func (s *stopwatch) resume() {
	if s.timer != nil {
		s.since = time.Now()
		s.timer.Reset(max(s.left, 0))
	}
}

func (s *stopwatch) stop() {
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}
