# Everything sets itself up: `make demo` and `make test` work on a fresh clone with python3 alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo

.PHONY: demo test test-slow test-all test-newest test-matrix test-random docs notebooks explorer lint types format lock audit dist clean

demo: $(INSTALLED)
	@DEMO=$(DEMO) BIN=$(BIN) sh scripts/demo.sh

# Each process keeps to neighbouring tests, which share fixtures and compiled programs, till it is idle.
PYTEST := -m pytest -q -n auto --dist worksteal
test: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m slow

test-all: $(INSTALLED)
	$(BIN)/python $(PYTEST)

test-newest:
	@sh scripts/test_newest.sh

test-matrix:
	@sh scripts/test_matrix.sh

# Random programs against their merged selves: hours for all, or PROGRAMS=2000 SEED=1 JOBS=2.
PROGRAMS ?= 20000
SEED ?= 0
JOBS ?= 1
test-random: $(INSTALLED)
	$(BIN)/python -m tests.properties.run --programs $(PROGRAMS) --seed $(SEED) --jobs $(JOBS)

# The documentation site, in site/: open site/index.html. A broken link or anchor is an error.
# The variable silences a notice of Material for MkDocs about its end of life in May 2027.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What is committed with its results in it, made again: half an hour, and a moment.
notebooks: $(INSTALLED)
	$(BIN)/python scripts/run_notebooks.py

explorer: $(INSTALLED)
	$(BIN)/python scripts/build_explorer.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

# The exact versions that continuous integration installs, resolved anew; needs Python 3.11.
lock: $(INSTALLED)
	$(BIN)/python scripts/lock_requirements.py

# Known vulnerabilities of these versions.
audit: $(INSTALLED)
	-@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(LOCK),-c $(LOCK)) pip-audit
	@$(BIN)/python scripts/audit.py

dist: $(INSTALLED)
	@PYTHON=$(BIN)/python sh scripts/build_dist.sh

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-newest .venv-matrix $(DEMO) site .pytest_cache .ruff_cache .hypothesis

# LOCK=requirements/ci.txt installs exact versions, of what builds the package too.
LOCK ?=

# Python compiles the modules that are imported, a small part of all (--no-compile).
# The stamp makes the second call quick; a change of the dependencies installs again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jax_lora needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; \
	  exit 1; }
	@echo "Setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=$(abspath $(LOCK)) \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[cli,test]'
	@touch $@
