# SPDX-License-Identifier: Apache-2.0
# Each command makes .venv first, if it is not there or older than what it is made from.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The first of these that is 3.11 or later; set PYTHON to choose another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$p"; break; }; done)

VENV := .venv
STAMP := $(VENV)/.installed

# DeepSpeed looks for ninja on the PATH when it compiles its extensions.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help demo test test-long check format bench-distill bench-estimate bench-finetune bench-quality bench-outofcore bench-prepare bench-sweep bench-serve drills clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(STAMP) ## Run the whole loop on this machine, without downloads
	offsite-ray demo $(ARGS)

# Processes that run tests; 0: this one, e.g. for a debugger.
JOBS ?= 2

# One thread a process: the tests are small, and Ray's workers share the same cores.
test: $(STAMP) ## Run the tests, in JOBS processes; ARGS goes to pytest
	@start=$$SECONDS; status=0; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} pytest -n $(JOBS) --dist loadfile $(ARGS) || status=$$?; \
	echo "make test: $$((SECONDS - start)) s"; exit $$status

test-long: ARGS += -m long
test-long: test ## Run the tests that take minutes each

check: $(STAMP) ## Check format, lint, types and import contracts
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: $(STAMP) ## Format, and fix what lint can fix
	ruff format .
	ruff check --fix .

bench-finetune: $(STAMP) ## Measure fine-tuning: full, LoRA, offsite; ARGS goes to the script
	python benchmarks/finetune.py $(ARGS)

bench-estimate: $(STAMP) ## Compare predicted memory with measured; ARGS goes to the script
	python benchmarks/estimate.py $(ARGS)

bench-outofcore: $(STAMP) ## Measure compress, plug-in, verify of 7B models; ARGS goes to the script
	python benchmarks/outofcore.py $(ARGS)

bench-prepare: $(STAMP) ## Measure prepare: speed of two workers, memory; ARGS goes to the script
	python benchmarks/prepare.py $(ARGS)

bench-distill: $(STAMP) ## Measure distillation: plain way, ZeRO, overhead; ARGS goes to the script
	python benchmarks/distill.py $(ARGS)

bench-quality: $(STAMP) ## Measure what distillation does for the plug-in; ARGS goes to the script
	python benchmarks/quality.py $(ARGS)

bench-sweep: $(STAMP) ## Measure sweeps: trials side by side, first trial, memory; ARGS goes to the script
	python benchmarks/sweep.py $(ARGS)

bench-serve: $(STAMP) ## Measure serving: many tenants on one trunk, under load; ARGS goes to the script
	python benchmarks/serve.py $(ARGS)

drills: $(STAMP) ## Break a real cluster in every way we know, and write what was lost; takes root
	python -m cluster.drills $(ARGS)

clean: ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it," \
	  "or name it with make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "g++ is needed: DeepSpeed compiles an extension at its" \
	  "first use (Debian, Ubuntu: apt install build-essential)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import os, sysconfig; h = sysconfig.get_path("include") + "/Python.h"; \
	  os.path.exists(h) or exit(h + " is needed: DeepSpeed compiles an extension at its first use" \
	  " (Debian, Ubuntu: apt install python3-dev)")'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual" \
	  "environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
