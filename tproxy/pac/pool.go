package pac

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// maxEvaluators bounds the processes. One is enough for the computing; the
	// others are for those scripts that wait for names. It is Chromium's number of
	// threads for the same purpose.
	maxEvaluators = 4

	// deathsInARow is after how many deaths of evaluators the next one is started
	// only after a pause, which doubles from firstPause to lastPause.
	deathsInARow = 3
	firstPause   = time.Second
	lastPause    = 30 * time.Second
)

// pool holds the evaluators. The kernel, the pipes and the clock bound what each
// can do; the pool bounds how many there are and how often one is replaced.
type pool struct {
	command []string
	places  chan struct{} // one element for each evaluator that works

	mutex  sync.Mutex
	idle   []*evaluatorProcess        // the last used last
	all    map[*evaluatorProcess]bool // idle or not
	deaths int                        // since the last answer
	resume time.Time                  // before this no evaluator is started
	closed bool
}

func newPool(command []string) *pool {
	return &pool{
		command: command,
		places:  make(chan struct{}, maxEvaluators),
		all:     make(map[*evaluatorProcess]bool),
	}
}

// acquire waits for leave to let an evaluator work.
func (p *pool) acquire(ctx context.Context) (release func(), err error) {
	select {
	case p.places <- struct{}{}:
		return func() { <-p.places }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for an evaluator: %w", context.Cause(ctx))
	}
}

// find has an evaluator call the script.
func (p *pool) find(ctx context.Context, script *version, to target, host services) (message, error) {
	release, err := p.acquire(ctx)
	if err != nil {
		return message{}, err
	}
	defer release()
	for {
		process := p.take(script)
		if process == nil {
			if process, err = p.start(ctx, script, host); err != nil {
				return message{}, err
			}
		}
		used := process.answered > 0
		answer, err := process.ask(ctx, message{Kind: kindFind, URL: to.url(), Host: to.host}, host)
		if err == nil {
			process.answered++
			p.put(process)
			if answer.Error != "" {
				return message{}, errors.New(answer.Error)
			}
			return answer, nil
		}
		p.drop(process)
		if !used || !errors.Is(err, errMemory) || ctx.Err() != nil {
			return message{}, err
		}
		// What earlier evaluations left behind may have filled it: once more in a
		// fresh one.
	}
}

// take returns an idle evaluator with the given version of the script, or nil.
// Those with another one are ended.
func (p *pool) take(script *version) *evaluatorProcess {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for len(p.idle) > 0 {
		last := p.idle[len(p.idle)-1]
		p.idle = p.idle[:len(p.idle)-1]
		if last.script == script {
			return last
		}
		last.kill()
		delete(p.all, last)
		last.wait()
	}
	return nil
}

// put takes an evaluator back that has answered.
func (p *pool) put(process *evaluatorProcess) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.deaths = 0
	if p.closed {
		process.wait() // close has killed it
		return
	}
	p.idle = append(p.idle, process)
}

// drop forgets an evaluator that has died.
func (p *pool) drop(process *evaluatorProcess) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	delete(p.all, process)
	p.deaths++
	if over := p.deaths - deathsInARow; over >= 0 {
		p.resume = time.Now().Add(min(firstPause<<min(over, 10), lastPause))
	}
}

// forgive lets a new version of the script not pay for the one before.
func (p *pool) forgive() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.deaths, p.resume = 0, time.Time{}
}

// start starts an evaluator and loads the script.
func (p *pool) start(ctx context.Context, script *version, host services) (*evaluatorProcess, error) {
	process, err := p.spawn(script)
	if err != nil {
		return nil, err
	}
	answer, err := process.ask(ctx, message{Kind: kindLoad, Name: script.name, Text: script.text}, host)
	if err != nil {
		p.drop(process)
		return nil, fmt.Errorf("%s: %w", script.name, err)
	}
	if answer.Error != "" {
		p.mutex.Lock()
		delete(p.all, process)
		p.mutex.Unlock()
		process.kill()
		process.wait()
		return nil, errors.New(answer.Error)
	}
	return process, nil
}

// spawn starts the process alone.
func (p *pool) spawn(script *version) (*evaluatorProcess, error) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.closed {
		return nil, errClosed
	}
	if pause := time.Until(p.resume); pause > 0 {
		return nil, fmt.Errorf("the script is not evaluated for %v: the last %d times it took too much memory or time", pause.Round(time.Second), p.deaths)
	}
	process, err := startEvaluator(p.command, script)
	if err != nil {
		return nil, err
	}
	p.all[process] = true
	return process, nil
}

// close ends all evaluators; those at work make their evaluation fail.
func (p *pool) close() {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.closed = true
	for process := range p.all {
		process.kill()
	}
	for _, process := range p.idle {
		process.wait()
	}
	p.idle = nil
}
