package pac

import (
	"context"
	"time"
)

const (
	// refreshPause is the shortest time between two refreshes: a network that
	// changes reports it many times, and the server of a large network serves
	// everybody's.
	refreshPause = 10 * time.Second

	// refreshInterval is when a script from a URL is fetched again though nothing
	// asks for it. Chromium does so between 8 seconds and 4 hours after the last.
	refreshInterval = time.Hour

	// filePoll is how often a file is looked at, as other files with settings are.
	filePoll = 2 * time.Second

	// firstRetry and lastRetry bound the time until a refresh that failed is tried
	// again; it doubles with each failure.
	firstRetry = refreshPause
	lastRetry  = 5 * time.Minute
)

// Refresh says that the network has changed: what was known of names and ways may
// hold no longer. All answers are forgotten, and Serve gets the script again, soon
// but not too often; until then and if that fails, the old one is used. It does
// not wait.
func (s *Script) Refresh() {
	s.forget()
	select {
	case s.wanted <- struct{}{}:
	default: // it is wanted already
	}
}

// Serve keeps the script fresh until ctx ends and returns nil then: after Refresh,
// when the file has changed, and a URL's once an hour. A new version is taken
// when it could be loaded; each change and each first failure is logged.
func (s *Script) Serve(ctx context.Context) error {
	last := time.Now()
	due := time.NewTimer(refreshInterval)
	defer due.Stop()
	var look <-chan time.Time
	if s.source.file != "" {
		ticker := time.NewTicker(filePoll)
		defer ticker.Stop()
		look = ticker.C
	}
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wanted:
			due.Reset(max(time.Until(last.Add(refreshPause)), 0))
			continue
		case <-look:
			if s.source.changed() {
				due.Reset(0)
			}
			continue
		case <-due.C:
		}
		last = time.Now()
		err := s.renew(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			if failures > 0 {
				s.config.Logger.Info().Str("script", s.source.name).Msg("the PAC script is there again")
			}
			failures = 0
			due.Reset(refreshInterval)
		default:
			if failures == 0 {
				s.config.Logger.Warn().Err(err).Msg("the PAC script could not be refreshed: the old one stays in use")
			}
			due.Reset(min(firstRetry<<min(failures, 10), lastRetry))
			failures++
		}
	}
}

// renew gets the script again and, if it is another one, takes it into use.
func (s *Script) renew(ctx context.Context) error {
	text, err := s.source.load(ctx)
	if err != nil {
		return err
	}
	s.mutex.Lock()
	same := text == s.current.text
	s.mutex.Unlock()
	if same {
		return nil
	}
	next := &version{name: s.source.name, text: text}
	if err := s.try(ctx, next); err != nil {
		return err
	}
	s.mutex.Lock()
	s.current = next
	clear(s.results)
	s.mutex.Unlock()
	s.config.Logger.Info().Str("script", next.name).Msg("the PAC script has changed and is in use")
	return nil
}
