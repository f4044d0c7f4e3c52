package fakeip

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// keepInterval is how often uses are appended to the store, and how often one
	// that could not be written is tried again. So much of the order of use is
	// lost when the process is killed. A thousand names in use make about 80 KB
	// each time, which flash memory stands for years.
	keepInterval = 5 * time.Minute

	// The store is replaced when its lines are more than growth times those that
	// it needs, so that a line is written 1.33 times on average; but not before it
	// has slack lines (about 80 KB) more, as it would be all the time in a small pool.
	growth = 4
	slack  = 1024

	// recordLines bounds what is formatted at a time (about 40 KB).
	recordLines = 512
)

// openStore reads the store and writes it anew: what is there then is whole and in
// order, and the directory is known to be writable.
func (p *Pool) openStore(path string) error {
	store, err := openStore(path)
	if err != nil {
		return err
	}
	dropped := 0
	found, err := p.ranges.read(store.file, func(e entry) {
		if p.table.restore(e) {
			dropped++
		}
	})
	if err != nil {
		store.close()
		return cause(err)
	}
	p.notes = found.notes()
	if dropped > 0 {
		p.notes = append(p.notes, fmt.Sprintf("fake-IP store: oldest names dropped, to hold no more than %d", p.table.max))
	}

	p.assigning.Lock()
	defer p.assigning.Unlock()
	p.store = store
	err = p.rewrite()
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		// A full disk must not keep the gateway from starting. The old file may
		// end with part of a line, to which nothing can be appended.
		store.behind = true
		p.failed(err)
		return nil
	}
	if err != nil {
		store.close()
		return cause(err)
	}
	return nil
}

// keep looks after the store until ctx is cancelled.
func (p *Pool) keep(ctx context.Context) {
	defer close(p.ended)
	ticker := time.NewTicker(keepInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		case <-p.grown:
		}
		p.tend()
	}
}

// tend writes the store anew if that is due, else appends the uses. Only keep
// calls it: two must not write anew at once.
func (p *Pool) tend() {
	p.assigning.Lock()
	defer p.assigning.Unlock()
	if err := p.save(p.overgrown()); err != nil {
		p.failed(err)
	}
}

// save appends the uses to the store, or writes it anew: if asked to, and if it
// could not be written before. The caller holds assigning.
func (p *Pool) save(anew bool) error {
	if anew || p.told {
		return p.rewrite()
	}
	return p.record(p.used(false))
}

// overgrown reports whether the store has too many lines for what it holds. The
// caller holds assigning.
func (p *Pool) overgrown() bool {
	return p.store.lines > growth*len(p.table.byName)+slack
}

// record appends entries to the store, the newest last. The caller holds assigning.
func (p *Pool) record(entries []entry) error {
	if p.store == nil || p.store.behind {
		return nil
	}
	var text []byte
	now := time.Now()
	for some := range slices.Chunk(entries, recordLines) {
		text = text[:0]
		for _, e := range some {
			text = p.ranges.appendLine(text, e, now)
		}
		if err := p.store.append(text, len(some)); err != nil {
			return err
		}
	}
	if !p.told && p.overgrown() {
		select {
		case p.grown <- struct{}{}:
		default:
		}
	}
	return nil
}

// failed tells that the store cannot be written, unless it was told since it
// last could. The caller holds assigning.
func (p *Pool) failed(err error) {
	if !p.told && p.storeFailed != nil {
		p.storeFailed(fmt.Errorf("write fake-IP store %s: %w", p.store.path, cause(err)))
	}
	p.told = true
}

// used returns what was used since it was last called, or all, the newest last.
// The caller holds assigning and writes it to the store.
func (p *Pool) used(all bool) []entry {
	p.mutex.Lock()
	places := p.table.takeUsed(all)
	p.mutex.Unlock()
	entries := make([]entry, 0, len(places))
	for _, at := range slices.Backward(places) {
		entries = append(entries, entry{p.table.places[at].name, p.table.places[at].offset})
	}
	return entries
}

// rewrite replaces the store by one that has each name once. The caller holds
// assigning, which is released while the bulk is written. What is assigned
// meanwhile goes to the old file and from there to the new one; an old file that
// takes no lines leaves no choice but to let new names wait.
func (p *Pool) rewrite() error {
	entries := p.used(true)
	store, size, lines := p.store, p.store.size, p.store.lines
	whole := !store.behind
	if whole {
		p.assigning.Unlock()
	}
	next, err := store.prepare(p.text(entries))
	if whole {
		p.assigning.Lock()
	}
	if err != nil {
		return err
	}
	if whole && store.behind {
		store.abandon(next)
		return nil // a line is missing, of which was told; tend comes again
	}
	if err := store.replace(next, size, len(entries)+store.lines-lines); err != nil {
		return err
	}
	p.told = false
	return nil
}

// text returns the lines of a store that holds the entries.
func (p *Pool) text(entries []entry) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		line := append([]byte(p.ranges.header()), '\n')
		now := time.Now()
		for _, e := range entries {
			if !yield(line) {
				return
			}
			line = p.ranges.appendLine(line[:0], e, now)
		}
		yield(line)
	}
}

// Close writes to the store in which order the names were used and closes it. It
// returns when all that Open started has ended. After it the pool works from
// memory; closing it again does nothing.
func (p *Pool) Close() error {
	if p.stop == nil {
		return nil // no store
	}
	p.stop()
	<-p.ended
	p.assigning.Lock()
	defer p.assigning.Unlock()
	if p.store == nil {
		return nil // closed before
	}
	path := p.store.path
	err := p.save(false)
	if closing := p.store.close(); err == nil {
		err = closing
	}
	p.store = nil
	if err != nil {
		return fmt.Errorf("close fake-IP store %s: %w", path, cause(err))
	}
	return nil
}
