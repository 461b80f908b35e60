# `make run` and `make test` do everything on a fresh machine; no other target installs anything.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Another source for PyTorch, such as the CPU builds that PyTorch's own install page names.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUF := protos/node_modules/.bin/buf
PICTURE := out/red-circle.png

# Two files of tests at a time. Most of their seconds Python loads libraries, on one core; threads of
# theirs that wait for each other spinning would take the other's core away.
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Runs a layer of checks and prints its seconds.
layer = @start=$$(date +%s); echo "== $(1)"; $(2) && echo "== $(1): $$(( $$(date +%s) - start )) s"

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(READY) ## virtual environment with everything, exact versions

$(READY): pyproject.toml constraints.txt protos/package.json
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), sys.version'
	@if [ "$$(uname)" = Linux ] && [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "No NVIDIA driver here. If pip turns to the large CUDA build, stop it and give the CPU"; \
	  echo "build's index from PyTorch's install page: make setup TORCH_INDEX=..."; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@if command -v npm >/dev/null; then npm install --prefix protos --no-package-lock --ignore-scripts --no-audit --no-fund --silent --fetch-retries=1 \
	  || echo "npm could not get buf: its checks of the protos will be skipped" >&2; fi
	touch $@

run: $(READY) ## a picture from a prompt, through the embedded services
	@mkdir -p $(dir $(PICTURE))
	$(BIN)/zimage-client generate "a large red circle in the middle on a blue background" --seed 1 -o $(PICTURE) --overwrite

test: $(READY) ## all checks, as CI runs them
	@$(MAKE) --no-print-directory check

check: ## all checks, without set-up
	$(call layer,format,$(BIN)/ruff format --check .)
	$(call layer,lint,$(BIN)/ruff check .)
	$(call layer,types,$(BIN)/mypy)
	$(call layer,contracts,$(BIN)/lint-imports)
	$(call layer,protos,$(MAKE) --no-print-directory proto-check)
	$(call layer,unit and contract,$(SIDE_BY_SIDE) tests/unit tests/contract)
	$(call layer,parity,$(MAKE) --no-print-directory parity)
	$(call layer,device,$(SIDE_BY_SIDE) tests/device)
	$(call layer,e2e,$(SIDE_BY_SIDE) tests/e2e)
	$(call layer,fault,$(SIDE_BY_SIDE) tests/fault)
	$(call layer,soak,$(BIN)/pytest tests/soak)

test-fast: ## the checks of every minute
	$(call layer,lint,$(BIN)/ruff check .)
	$(call layer,unit and contract,$(BIN)/pytest tests/unit tests/contract -m "not slow")

fuzz: ## 10,000 requests to every method that no client would send
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests/e2e/test_fuzz.py --fuzz-requests 10000

fault: ## everything that can die does, 20 times each; writes docs/reliability.md. ONLY="worker and decoding" does some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests/fault --times 20 --write-table $(if $(ONLY),rows -k "$(ONLY)",anew)

soak: ## everything at once for MINUTES=10: nothing grows
	$(BIN)/pytest tests/soak -s --minutes $(or $(MINUTES),10)

parity: ## the same numbers as diffusers, transformers and itself (E1, E2, E4, E5)
	$(SIDE_BY_SIDE) tests/parity $(PARITY)

bench-encoder: ## C1 to C4: a prompt against diffusers and llama.cpp, beginnings, forms of weights, first and thousandth
	$(BIN)/python -m bench.encoder
	$(BIN)/python -m bench.encoder_forms
	$(BIN)/python -m bench.encoder_start

bench-dit: ## C5, C6, C7, C9: a forward against diffusers and the bare matmuls; adapters, loading, VAE, services
	$(BIN)/python -m bench.dit
	$(BIN)/python -m bench.adapters
	$(BIN)/python -m bench.compiled
	$(BIN)/python -m bench.loading
	$(BIN)/python -m bench.vae
	$(BIN)/python -m bench.overhead

bench-train: ## a training step against diffusers with peft in a plain loop; C10, C11
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench.training --ways
	$(BIN)/python -m bench.training_memory
	$(BIN)/python -m bench.training_claims

bench-engine: ## C8: eight clients against a plain gRPC server around diffusers' pipeline; how long steps may become
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.sharing

bench-gpu: ## G1 to G8 on the GPU that is here, in parts of less than eight minutes; SMALL=1 runs them on anything
	for part in forward weights picture prompt throughput training; do \
	  $(BIN)/python -m bench.gpu $$part $(if $(SMALL),--small,--write) || exit 1; done

gpu-status: ## what changed of a GPU's code since its figures were taken
	@$(BIN)/python -m bench.gpu_status

# Where a step allocates what the last one freed, glibc would fetch every page anew.
demo-model: export MALLOC_MMAP_MAX_ = 0
demo-model: export MALLOC_TRIM_THRESHOLD_ = 9000000000
demo-model: export MALLOC_TOP_PAD_ = 268435456
demo-model: ## trains the demo model from nothing; goes on where it was stopped
	$(BIN)/python -m demo_model.recipe

demo-train: ## teaches the demo model a new word through all services, and looks whether it learnt it
	$(BIN)/python -m demo_model.learning --write docs/demo-model

demo-eval: ## asks the demo model for 1,000 pictures, and more, through the services
	$(BIN)/python -m demo_model.evaluation --write docs/demo-model
	$(BIN)/python docs/tables.py

proto: ## generated code and wire snapshot from the protos
	$(BIN)/python protos/generate.py

proto-check: ## proves them fresh; buf's lint and format
	$(BIN)/python protos/generate.py --check
	@if [ -x $(BUF) ]; then $(BUF) lint && $(BUF) format -d --exit-code; \
	elif [ -n "$$CI" ]; then echo "buf is missing: npm is needed" >&2; exit 1; \
	else echo "SKIPPED: buf lint and format, because npm has not installed it" >&2; fi

docs: ## the generated tables in docs/
	$(BIN)/python docs/tables.py

clean: ## everything that can be made again
	rm -rf $(VENV) out dist build protos/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help setup run test check test-fast fuzz fault soak parity bench-encoder bench-dit bench-engine bench-train bench-gpu gpu-status demo-model demo-eval demo-train proto proto-check docs clean
