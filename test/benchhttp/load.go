package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
	"time"
)

// load takes some of the figures of one contender.
type load struct {
	name         string
	needsGateway bool // says nothing where there is none
	// measure works on the process, on none if pid is 0.
	measure func(b *bencher, name string, pid int) error
}

var loads = []load{
	{"kept", false, func(b *bencher, name string, pid int) error { return b.measureRequests(name, pid, keptFigures) }},
	{"closed", false, func(b *bencher, name string, pid int) error {
		return b.measureRequests(name, pid, closedFigures, "-H", "Connection: close")
	}},
	{"idle", true, (*bencher).measureIdle},
}

func loadNames() (names []string) {
	for _, load := range loads {
		names = append(names, load.name)
	}
	return names
}

// connections are those that wrk has open at once.
const connections = 64

// measureRequests takes what requests cost, as fast as they go.
func (b *bencher) measureRequests(name string, pid int, figures requestFigures, arguments ...string) error {
	var before, after usage
	var err error
	if pid != 0 {
		if before, err = measure(pid); err != nil {
			return err
		}
	}
	origin := originAddress
	if pid == 0 {
		origin = routedAddress
	}
	a, err := b.wrk(origin, arguments...)
	if err != nil {
		return err
	}
	if pid != 0 {
		if after, err = measure(pid); err != nil {
			return err
		}
		b.results.add(name, figures.cpu, (after.cpu-before.cpu).Seconds()*1e6/float64(a.requests))
	}
	b.results.add(name, figures.rate, a.perSecond)
	b.results.add(name, figures.p99, a.p99.Seconds()*1e3)
	return nil
}

// wrk sends requests from the client to an address of the origin.
func (b *bencher) wrk(origin string, arguments ...string) (answered, error) {
	ctx, cancel := context.WithTimeout(context.Background(), b.sizes.length+30*time.Second)
	defer cancel()
	arguments = append(arguments, "-t", "1", "-c", strconv.Itoa(connections), "-d", fmt.Sprintf("%.0fs", b.sizes.length.Seconds()),
		"--latency", "-H", "Host: "+originName, "http://"+origin+"/")
	command := exec.CommandContext(ctx, "wrk", arguments...)
	var output []byte
	err := b.network.client.Do(func() (err error) {
		output, err = command.CombinedOutput()
		return err
	})
	if err != nil {
		return answered{}, fmt.Errorf("wrk: %w: %s", err, output)
	}
	return parse(string(output))
}

// answered is what wrk tells of a run.
type answered struct {
	requests  int
	perSecond float64
	p99       time.Duration
}

var (
	p99Line      = regexp.MustCompile(`(?m)^ +99% +([\d.]+[a-z]+)$`)
	requestsLine = regexp.MustCompile(`(?m)^ +(\d+) requests in `)
	rateLine     = regexp.MustCompile(`(?m)^Requests/sec: +([\d.]+)$`)
	failureLine  = regexp.MustCompile(`(?m)^ +((?:Socket errors|Non-2xx or 3xx responses): .*)$`)
)

// parse reads wrk's output. A run with errors or refusals says nothing about speed,
// and is an error.
func parse(output string) (a answered, err error) {
	if match := failureLine.FindStringSubmatch(output); match != nil {
		return a, errors.New(match[1])
	}
	p99, requests, rate := p99Line.FindStringSubmatch(output), requestsLine.FindStringSubmatch(output), rateLine.FindStringSubmatch(output)
	if p99 == nil || requests == nil || rate == nil || requests[1] == "0" {
		return a, fmt.Errorf("wrk says nothing of its requests: %s", output)
	}
	var err1, err2, err3 error
	a.p99, err1 = time.ParseDuration(p99[1])
	a.requests, err2 = strconv.Atoi(requests[1])
	a.perSecond, err3 = strconv.ParseFloat(rate[1], 64)
	return a, errors.Join(err1, err2, err3)
}

// measureIdle looks at what connections hold that rest after a request.
func (b *bencher) measureIdle(name string, pid int) error {
	before, err := measure(pid)
	if err != nil {
		return err
	}
	conns, err := b.network.idle(b.sizes.idle)
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if err != nil {
		return err
	}
	time.Sleep(b.sizes.rest)
	after, err := measure(pid)
	if err != nil {
		return err
	}
	b.results.add(name, idleMemory, float64(after.memory-before.memory)/float64(len(conns))/1024)
	b.results.add(name, idleDescriptors, float64(after.descriptors-before.descriptors)/float64(len(conns)))
	return nil
}

// idle opens connections that rest after a request each. The caller closes them, also
// those that there are when it fails.
func (n *network) idle(count int) (conns []net.Conn, err error) {
	const workers = 32
	var mutex sync.Mutex
	var working sync.WaitGroup
	for worker := range workers {
		working.Go(func() {
			for i := worker; i < count; i += workers {
				conn, failure := n.dial()
				if failure == nil {
					_, failure = get(conn)
				}
				mutex.Lock()
				if conn != nil {
					conns = append(conns, conn)
				}
				if failure != nil {
					err = errors.Join(err, fmt.Errorf("idle connection %d: %w", i, failure))
				}
				failed := err != nil
				mutex.Unlock()
				if failed {
					return
				}
			}
		})
	}
	working.Wait()
	return conns, err
}
