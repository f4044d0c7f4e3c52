# Every target but test-interop, test-hosts, test-docker, test-race, bench-engines, bench-dns, bench-http and profile needs only Go, make and git.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BINARY  := bin/transproxy-tproxy
FUZZTIME ?= 60s

# Build tags of the program: nopac leaves the evaluator of PAC scripts out.
TAGS    ?=

# The tests and benches that need root in the initial user namespace are in a network
# namespace of their own all the same.
END_TO_END := unshare --net env NETNS_SANDBOX=1

# One static binary; the race detector alone needs cgo.
export CGO_ENABLED = 0

.PHONY: build build-nopac demo test test-race test-interop test-hosts test-docker bench bench-engines bench-distant bench-dns bench-http profile check fuzz clean

build:
	$(GO) build -tags '$(TAGS)' -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) ./cmd/transproxy-tproxy

# Without PAC, which makes it about half as large.
build-nopac: TAGS = nopac
build-nopac: build

# The main job in private namespaces: no root, no network.
demo: build
	$(BINARY) demo

# Unit tests and end-to-end tests on the real kernel, in private namespaces: no root.
test:
	$(GO) test -timeout 10m ./...

test-race: export CGO_ENABLED = 1
test-race:
	$(GO) test -race -short -timeout 15m ./...

# Real squid, curl, nft and others; installs them from Debian when missing.
test-interop:
	test/interop/install
	$(GO) test -timeout 25m -tags interop -count=1 ./netfilter ./routing ./test/interop ./test/benchdns ./test/benchhttp

# Every kind of host, and the end-to-end tests on the engine sk_lookup, which needs root in the
# initial user namespace. Writes docs/HOSTS.md.
test-hosts:
	$(GO) test -c -o bin/end-to-end.test ./test
	cd test && $(END_TO_END) HOSTS_WRITE=../docs/HOSTS.md ../bin/end-to-end.test -test.v -test.run 'TestHosts|TestEngine'
	cd test && $(END_TO_END) TRANSPROXY_TEST_ENGINE=sk_lookup ../bin/end-to-end.test -test.short

# Containers and builds without proxy settings, on a Docker engine that the tests run for
# themselves in namespaces; the host's is left alone. Needs root, else what needs an engine
# is skipped by name. Installs from Debian what is missing.
test-docker:
	test/docker/install
	$(GO) test -v -timeout 5m -tags docker -count=1 ./test/docker

# What a flow costs, against a yardstick and against redsocks if that is installed.
bench: build
	$(GO) run ./test/bench -program $(BINARY) -write docs/FIGURES.md

# The two engines of delivery, side by side; needs root in the initial user namespace.
bench-engines: build
	$(GO) build -o bin/bench ./test/bench
	$(END_TO_END) bin/bench -engines -program $(BINARY) -write docs/FIGURES.md

# The time to the first byte through a distant proxy, with and without connections that
# are opened ahead.
bench-distant: build
	$(GO) run ./test/bench -distant -program $(BINARY) -write docs/FIGURES.md

# What a DNS query costs, against dnsmasq and unbound; installs them when missing.
bench-dns: build
	test/interop/install
	$(GO) run ./test/benchdns -program $(BINARY) -write docs/FIGURES.md

# What a plain HTTP request costs, against squid in TPROXY mode and a reverse proxy of
# net/http; installs squid and wrk when missing.
bench-http: build
	test/interop/install
	$(GO) run ./test/benchhttp -program $(BINARY) -write docs/FIGURES.md

# Where the time of the bench's connections goes: a flame graph in bin/, and shares
# by system call. Needs root and perf (Debian's linux-perf).
PROFILED := bin/profiled
PROFILE_LOADS ?= connections
profile:
	$(GO) build -trimpath -o $(PROFILED) ./cmd/transproxy-tproxy
	$(GO) build -o bin/bench ./test/bench
	perf record -q -F 997 -a -g -o bin/perf.data -- bin/bench -program $(PROFILED) -loads $(PROFILE_LOADS) -rounds 1 >/dev/null
	perf script -i bin/perf.data -F comm,pid,ip,sym 2>/dev/null | $(GO) run ./test/flame -program profiled -out bin/flame.svg

check:
	$(GO) vet -tags interop,docker ./...
	cd test/quic && $(GO) vet ./...
	$(GO) vet -tags nopac ./tproxy/... ./cmd/...
	$(GO) tool -modfile=.tools/go.mod staticcheck -tags interop,docker ./...
	$(GO) tool -modfile=.tools/go.mod gofumpt -l . | (! read -r line || { echo "gofumpt would change: $$line"; exit 1; })
	$(GO) mod tidy -diff
	cd test/quic && $(GO) mod tidy -diff
	$(GO) mod verify

# Each fuzz target for FUZZTIME.
fuzz:
	@for package in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | sed -n '/^Fuzz/p'); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$package || exit 1; \
		done; \
	done

clean:
	$(GO) clean ./...
	rm -rf bin
