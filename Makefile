PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help setup demo test test-slow check bench clean

help:            ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Create the virtual environment with what running needs

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), f"Python 3.11-3.13 is needed, this is {sys.version}; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[local]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[local,dev]"
	@touch $@

demo: setup      ## Start the local stack, import sample data, run a release, print where to look
	$(BIN)/khet up --wait-for object-store
	$(BIN)/khet data sample --name leaves
	$(BIN)/khet up
	$(BIN)/khet deploy
	@# A canary needs a champion to share traffic with: the first time, a quick baseline becomes it.
	@$(BIN)/khet show production --json >/dev/null 2>&1 || $(BIN)/khet release --data leaves --config configs/training/baseline.yaml
	$(BIN)/khet release --data leaves

test: $(VENV)/.installed-dev ## Run the tests (under 20 minutes on two cores)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-dev ## Run the long suites: kill matrices, soak
	$(BIN)/python -m pytest -m slow --timeout=1800

check: $(VENV)/.installed-dev ## Lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flows tasks ml configs deployments
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev ## Measure, side by side with a peer or a limit
	$(BIN)/python -m tests.benchmarks

clean:           ## Stop the local stack and remove what was generated
	-test -x $(BIN)/khet && $(BIN)/khet down
	rm -rf .khet .pytest_cache .mypy_cache .ruff_cache outputs exported_models wandb *.egg-info
