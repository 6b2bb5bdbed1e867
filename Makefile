PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help setup demo test test-slow check bench images images-lock clean

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

# Tests wait more than they compute, so two run side by side on two cores; in their own order the long groups come first.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder
test: $(VENV)/.installed-dev ## Run the tests (under 20 minutes on two cores)
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev ## Run the long suites: a real Kubernetes, images, kill matrices
	$(PYTEST) -m slow --timeout=1800

check: $(VENV)/.installed-dev ## Lint, types, import contracts, Kubernetes manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flows tasks ml configs deployments
	$(BIN)/lint-imports
	$(BIN)/python -m deployments.kubernetes.checks

bench: $(VENV)/.installed-dev ## Measure, side by side with a peer or a limit
	$(BIN)/python -m tests.benchmarks

# DOCKER=podman (or buildah) as well, which must be told the format that has health checks, and the ignore file.
# A tree with uncommitted changes says so in the image's revision.
DOCKER ?= docker
BUILD = $(DOCKER) build $(if $(findstring docker,$(DOCKER)),,--format docker --ignorefile $(1).dockerignore) -f $(1)
REGISTRY ?= ghcr.io/khet-guard
IMAGE_TAG ?= v0.1.0
REVISION = $(shell git describe --always --abbrev=40 --exclude '*' --dirty)
CREATED = $(shell TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ)
IMAGES ?= serving pipelines
images:          ## Build the container images (deployments/images/README.md)
	for image in $(IMAGES); do $(call BUILD,deployments/images/$$image/Dockerfile) \
	  -t $(REGISTRY)/$$image:$(IMAGE_TAG) --build-arg VERSION=$(IMAGE_TAG:v%=%) --build-arg REVISION=$(REVISION) \
	  --build-arg CREATED=$(CREATED) . || exit 1; done

LOCK_IMAGE = $(BIN)/uv pip compile --quiet --constraint requirements.lock --generate-hashes --python-version 3.11 \
  --python-platform linux --custom-compile-command 'make images-lock'
images-lock: $(VENV)/.installed-dev ## Write the images' requirements from requirements.lock
	$(LOCK_IMAGE) deployments/images/serving/requirements.in -o deployments/images/serving/requirements.txt
	$(LOCK_IMAGE) deployments/images/tools.in -o deployments/images/tools.txt
	$(LOCK_IMAGE) pyproject.toml --no-emit-package torch --excludes deployments/images/pipelines/excludes.txt \
	  -o deployments/images/pipelines/requirements.txt

clean:           ## Stop the local stack and remove what was generated
	-test -x $(BIN)/khet && $(BIN)/khet down
	rm -rf .khet .pytest_cache .mypy_cache .ruff_cache outputs exported_models wandb *.egg-info
