# Every target sets up what it needs: the virtual environment, the packages in
# it, and servers from the system's packages where they are missing.

PYTHON ?= python3
# For pytest: make test ARGS="-x -k ring"
ARGS ?=
# Processes that share the tests. Many of them wait, so one more than processors.
WORKERS ?= $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)
SPREAD := -n $(WORKERS) --dist loadgroup
# Seconds of make soak on each database, and schedules in each class of the simulator.
SOAK ?= 120
SCHEDULES ?= 2000

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
# What mypy is strict about; the tests are run, not proved.
TYPED := flask_resilient_session $(wildcard example_app)

.DEFAULT_GOAL := help
.PHONY: help check test full soak lint format demo clean memcached postgresql mariadb

help:
	@echo "make check   lint, the tests that need no server, some of the simulator: 40 seconds"
	@echo "make test    lint, then the whole test suite (ARGS=\"-x -k ring\" goes to pytest)"
	@echo "make full    the suite on each Python and set of dependencies, then make soak: hours"
	@echo "make soak    real servers under faults, SOAK=120 seconds on each database; the simulator"
	@echo "make lint    ruff and mypy"
	@echo "make format  put the code into ruff's format"
	@echo "make demo    three memcached nodes and the example app; Ctrl-C ends it (PORT=5001 moves it)"
	@echo "make clean   remove the virtual environment and everything generated"

check: lint
	$(BIN)/python -m pytest -q $(SPREAD) -m "not servers and not long" $(ARGS)
	$(BIN)/python -m tests.simulator --seconds 15

test: lint memcached postgresql mariadb
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

full: lint memcached postgresql mariadb
	$(BIN)/python tools/full.py -- $(SPREAD) $(ARGS)
	$(MAKE) soak

soak: $(STAMP) memcached postgresql mariadb
	$(BIN)/python -m tests.soak --seconds $(SOAK)
	$(BIN)/python -m tests.simulator --schedules $(SCHEDULES)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy $(TYPED)

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

demo: $(STAMP) memcached
	@$(BIN)/python -m example_app.demo

clean:
	rm -rf $(VENV) .venv-full .pytest_cache .mypy_cache .ruff_cache .hypothesis .demo \
		build dist docs/_build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

memcached postgresql mariadb:
	@sh tools/need.sh $@

# Installed anew only when the list of packages changed.
$(STAMP): setup.cfg setup.py | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--editable '.[test]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is missing. Install it: apt-get install python3 python3-venv" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed; $(PYTHON) is older." \
			"Name another: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments." \
			"Install what is missing: apt-get install python3-venv" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
