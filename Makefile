# Every target but test-interop and test-race needs only Go, make and git.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
BINARY  := bin/transproxy-tproxy
FUZZTIME ?= 60s

# One static binary; the race detector alone needs cgo.
export CGO_ENABLED = 0

.PHONY: build demo test test-race test-interop bench check fuzz clean

build:
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $(BINARY) ./cmd/transproxy-tproxy

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
	$(GO) test -timeout 15m -tags interop -count=1 ./netfilter ./routing ./test/interop

# What a flow costs, against a yardstick and against redsocks if that is installed.
bench:
	$(GO) run ./test/bench -write docs/FIGURES.md

check:
	$(GO) vet -tags interop ./...
	$(GO) tool -modfile=.tools/go.mod staticcheck -tags interop ./...
	$(GO) tool -modfile=.tools/go.mod gofumpt -l . | (! read -r line || { echo "gofumpt would change: $$line"; exit 1; })
	$(GO) mod tidy -diff
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
