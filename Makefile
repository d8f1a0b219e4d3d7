# Everything a person or a pipeline does here. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Debian's bindings of Ceph are built for Python 3.11, so that one is taken where it exists.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := tests/lab/debian-packages.txt

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- setting up ------------------------------------------------------------------------------------------------------

.PHONY: system
system: ## Install the Debian packages that the laboratory needs (as root)
	@missing=$$(sed 's/#.*//' $(PACKAGES) | xargs -n1 | while read -r p; do \
	  dpkg-query -W -f '$${Status}' "$$p" 2>/dev/null | grep -q 'ok installed' || echo "$$p"; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing Debian packages:" $$missing; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -q && apt-get -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends $$missing; \
	fi

$(VENV)/.installed: pyproject.toml constraints.txt | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

.PHONY: setup
setup: $(VENV)/.installed ## Make .venv with the project and everything it is tested with

.PHONY: bindings
bindings: setup
	@$(BIN)/python -m tests.lab bindings

# --- the laboratory --------------------------------------------------------------------------------------------------

.PHONY: lab-up
lab-up: bindings ## Start the laboratory: control plane, hypervisor, storage, guest
	$(BIN)/python -m tests.lab up

.PHONY: lab-down
lab-down: setup ## End everything that the laboratory started
	$(BIN)/python -m tests.lab down

.PHONY: lab-status
lab-status: setup ## Say what of the laboratory runs
	$(BIN)/python -m tests.lab status

.PHONY: demo
demo: bindings ## Take, prove and delete snapshots of a running VM on real parts
	$(BIN)/python -m tests.demo

# --- checking --------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: setup ## Formatting, lint rules, types, layers, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vmsnapshot-operator crds --check crds
	$(BIN)/vmsnapshot-operator crds --check charts/vmsnapshot-operator/crds-src
	$(BIN)/vmsnapshot-operator reasons --check docs/reasons.md

.PHONY: test-unit
test-unit: setup ## Unit tests, on all processors; no laboratory
	$(BIN)/pytest tests/unit -n auto

.PHONY: test-integration
test-integration: bindings ## Integration tests on the laboratory
	$(BIN)/python -m tests.lab up
	$(BIN)/pytest tests/integration --durations=25

.PHONY: test
test: bindings ## Everything: unit tests, then integration tests on the laboratory
	$(BIN)/pytest tests/unit -n auto --cov --cov-report=term:skip-covered
	$(BIN)/python -m tests.lab up
	$(BIN)/pytest tests/integration --durations=25

.PHONY: chaos
chaos: bindings ## Inject faults at every step, judge the world; N, SEED, FIRST, WAY=NAME, FLEET=NUMBER, or CASE=NAME
	$(BIN)/python -m tests.chaos $(if $(N),-n $(N)) $(if $(SEED),--seed $(SEED)) $(if $(FIRST),--first $(FIRST)) $(if $(FLEET),--fleet $(FLEET)) $(if $(FLEET_FIRST),--fleet-first $(FLEET_FIRST)) $(foreach way,$(WAY),--way $(way)) $(if $(CASE),--case $(CASE))

.PHONY: bench
bench: bindings ## Measure; ONLY=NAME for one measurement
	$(BIN)/python -m tests.benchmarks $(if $(ONLY),--only $(ONLY))

# --- generated files -------------------------------------------------------------------------------------------------

.PHONY: generate
generate: setup ## Write everything that is generated
	$(BIN)/vmsnapshot-operator crds --write crds
	$(BIN)/vmsnapshot-operator crds --write charts/vmsnapshot-operator/crds-src
	$(BIN)/vmsnapshot-operator reasons --write docs/reasons.md
	$(BIN)/ruff format .

.PHONY: constraints
constraints: ## Pin the versions that are installed now
	$(BIN)/pip freeze --exclude-editable | grep -v '^vmsnapshot' > constraints.txt
