# What can be done here? `make help` lists it. Each target does its own set-up, and does nothing twice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(HOME)/.cargo/bin:$(PATH)

# Arguments for the program that a target runs: make serve ARGS="--listen 127.0.0.1:9000"
ARGS ?=

target_dir := $(or $(CARGO_TARGET_DIR),target)
model := models/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What the program is made of: where none of it is newer than the program, not even cargo is asked.
program := $(target_dir)/release/rekindle
sources := Cargo.toml Cargo.lock $(shell find src load-tests config -name '*.rs' -o -name '*.toml' -o -path 'src/dashboard/page/*' -type f)

$(program): $(sources)
	cargo build --release --workspace --locked
	@touch $(program)

.PHONY: serve
serve: ## Build, pull the model if there is none, serve on 127.0.0.1:8080; ARGS are those of `rekindle serve`
	@scripts/setup
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	@exec $(program) serve $(ARGS)

# One profile, `ci`, and always the whole workspace: another choice of packages is another choice of features, and
# compiles the dependencies again.
.PHONY: test
test: lint ## Format, lints and all tests, with all that they need
	cargo test --profile ci --workspace --locked --no-run
	@test -f $(model) || $(target_dir)/ci/rekindle pull
	cargo test --profile ci --workspace --locked

.PHONY: lint
lint: ## Format and lints alone
	@scripts/setup test
	cargo fmt --all --check
	cargo clippy --profile ci --workspace --all-targets --locked -- -D warnings

.PHONY: fmt
fmt: ## Put all code into its format
	cargo fmt --all

.PHONY: picture
picture: ## README's picture of the dashboard anew, of a server after seven minutes of load; look at it
	@scripts/setup test
	REKINDLE_PICTURES=docs cargo test --profile ci --workspace --locked --test system -- every_page_looks_right

.PHONY: bench
bench: ## Measure the server on this machine, some minutes; ARGS are those of the load tests' `bench`
	@scripts/setup
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	$(target_dir)/release/load-tests bench $(ARGS)

.PHONY: compare
compare: ## Measure the model and the server beside llama.cpp, built here; ARGS are those of the load tests' `compare`
	@scripts/setup compare
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	$(target_dir)/release/load-tests compare $(ARGS)

.PHONY: perplexity
perplexity: ## Hold the model's perplexity in ten formats to llama.cpp's, built here; ARGS are those of `perplexity`
	@scripts/setup compare
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	$(target_dir)/release/load-tests perplexity $(ARGS)

.PHONY: kv-dtypes
kv-dtypes: ## Measure what each dtype of the KV costs in accuracy and saves in bytes; ARGS are those of `kv-dtypes`
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	$(target_dir)/release/load-tests kv-dtypes $(ARGS)

.PHONY: dashboard-cost
dashboard-cost: ## Measure what open pages of the dashboard cost the engine; ARGS are those of the load tests' `dashboard`
	@scripts/setup
	@$(MAKE) --no-print-directory $(program)
	@test -f $(model) || $(program) pull
	$(target_dir)/release/load-tests dashboard $(ARGS)

# Traces as CSV, plain or .gz: load-tests/README.md says which.
TRACES ?= traces

.PHONY: eviction
eviction: ## Replay traces through the evictor, some minutes: make eviction TRACES=DIR
	@scripts/setup
	@$(MAKE) --no-print-directory $(program)
	$(target_dir)/release/load-tests eviction --traces $(TRACES) $(ARGS)

.PHONY: soak
soak: ## The system and simulation tests, for much longer
	@scripts/setup test
	cargo test --profile ci --workspace --locked --test system --test simulation --no-run
	@test -f $(model) || $(target_dir)/ci/rekindle pull
	REKINDLE_SOAK=1 cargo test --profile ci --workspace --locked --test system --test simulation -- --nocapture
