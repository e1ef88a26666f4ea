# `make` alone lists the commands. Everything runs from .venv, which `make env` (a prerequisite of the others) builds.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Which set of versions (docs/versions.md): make env STACK=next, make test STACK=next.
STACK ?=
ifeq ($(STACK),next)
VENV ?= .venv-next
CONSTRAINTS := constraints-next.txt
PYTHONS := 3.12
EXTRAS := dev,nemo3
else
VENV ?= .venv
CONSTRAINTS := constraints.txt
PYTHONS := 3.11 3.12
EXTRAS := dev,aligner
endif
STAMP := $(VENV)/.installed
# vLLM's environment: its torch and transformers are others than ours.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
# TRL's, to race against.
PEERS_STAMP := .venv-peers/.installed
BIN := $(VENV)/bin
# Extra pip options for the environment, e.g. an index with CPU-only torch wheels.
PIP_ARGS ?=
# Options passed on to pytest, the demo or the ablation: make test ARGS="-m 'not distributed'".
ARGS ?=
# Whole files go to a worker, in order of collection (tests/conftest.py).
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder
# The first interpreter that starts and is one for which every pinned package has wheels; pyenv's are looked at last.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 $(wildcard $(HOME)/.pyenv/versions/*/bin/python3.1[12]); do \
	$$python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(PYTHONS)".split())' 2>/dev/null && echo $$python && break; done)

# Small models on a few cores: one thread is fastest, and ranks started by the tests must not fight over cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Nothing here needs a model hub; without these a missing local file turns into a slow network time-out.
export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_OFFLINE ?= 1
export WANDB_MODE ?= offline

.PHONY: help env vllm demo test fuzz test-slow mutations check format ablation peers evidence

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## build the Python environment in .venv (about 2 minutes)

vllm: $(VLLM_STAMP) ## build the environment of a vLLM for the CPU in .venv-vllm (about 2 minutes)

demo: $(STAMP) ## corpus, training, evaluation and report of the embedded run (under 20 minutes on 2 cores)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP) ## all tests that this machine can run, on two workers; ARGS="tests/unit -k mask" chooses, on one
	$(BIN)/pytest -q --durations=10 $(if $(ARGS),$(ARGS),-m "not slow" $(WORKERS))

test-slow: $(STAMP) ## the tests that take a minute or more alone (under 15 minutes); `make test` leaves them out
	$(BIN)/pytest -q --durations=10 -m slow $(if $(ARGS),$(ARGS),$(WORKERS))

fuzz: $(STAMP) ## 1,000 mutated configs and 300 mutated manifests, seeded (90 s of processor time; ARGS="--seed 3" draws others)
	$(BIN)/python tests/fuzz.py $(ARGS)

mutations: $(STAMP) ## plant every known fault and demand that a test fails (about 15 minutes; ARGS="shared rollouts" chooses)
	$(BIN)/python tests/mutations.py $(ARGS)

check: $(STAMP) ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMP) ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ablation: $(STAMP) ## GRPO, mask only, attention only and full MAPO, three seeds each; resumable
	$(BIN)/python examples/ablation.py $(ARGS)

peers: $(STAMP) $(PEERS_STAMP) ## race a GRPO step against TRL's GRPOTrainer (about 10 minutes)
	$(BIN)/python benchmarks/peers.py $(ARGS)

evidence: $(STAMP) ## does it help? every variant, both tasks, five paired seeds, into docs/evidence.md; resumable
	$(BIN)/python examples/evidence.py --page docs/evidence.md $(ARGS)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@[ -n "$(PYTHON)" ] || { echo "nemo-mapo needs Python $(PYTHONS) and found none as python3, python3.11 or" \
	    "python3.12. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	    f"nemo-mapo needs Python 3.11 or newer; PYTHON=$(PYTHON) is {v.major}.{v.minor}.")'
	@echo "Installing into $(VENV): about 2 minutes and 3 GB the first time."
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/pip install -qq $(PIP_ARGS) -c $(CONSTRAINTS) torch
	@$(BIN)/pip install -qq $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

$(VLLM_STAMP): requirements-vllm.txt examples/vllm_cpu_site.py
	@[ -n "$(PYTHON)" ] || { echo "make vllm needs Python 3.11 or 3.12; name it: make vllm PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing vLLM into $(VLLM_VENV): about 2 minutes and 4 GB the first time."
	@"$(PYTHON)" -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/pip install -qq $(PIP_ARGS) --no-deps -r requirements-vllm.txt
	@cp examples/vllm_cpu_site.py "$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py"
	@touch $@

$(PEERS_STAMP): requirements-peers.txt
	@echo "Installing TRL into .venv-peers: about 1 minute and 1 GB the first time."
	@"$(PYTHON)" -m venv .venv-peers
	@.venv-peers/bin/pip install -qq $(PIP_ARGS) --no-deps -r requirements-peers.txt
	@touch $@
