# `make demo` and `make test` need Python 3.11 or later and a C compiler, and nothing else prepared: they make a virtual
# environment, install into it, and run. A second run finds the environment ready.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?= -q
SOAK_MINUTES ?= 30
BENCH_ARGS ?= mobilenetv1_100 mobilenetv2_100 efficientnet_lite0 --threads 1 2

IN_VENV := $(VENV)/bin/
# One stamp for every set of extras: it is older than pyproject.toml when the requirements have changed.
INSTALLED = $(VENV)/.installed-

.PHONY: help demo test lint bench soak docs images clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo   classify two photographs by PyTorch and by sepc'
	@echo 'make test   lint, and run all tests'
	@echo 'make lint   ruff and mypy'
	@echo 'make bench  compare with other runtimes; BENCH_ARGS="MODEL... [options]"'
	@echo 'make soak   try to break it for SOAK_MINUTES=30, and write the counts to docs/reliability.md'
	@echo 'make docs   build the documentation, into docs/build'
	@echo 'make images make the pictures of the documentation anew; needs Graphviz and Chromium'
	@echo 'make clean  remove what these made, except the environment $(VENV)'
	@echo 'Variables: VENV=$(VENV) PYTHON=$(PYTHON)'

demo: $(INSTALLED)demo
	$(IN_VENV)python examples/classify.py

# Lint first: it is quick, and the last line is then pytest's.
test: lint
	$(IN_VENV)python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)test
	$(IN_VENV)ruff check .
	$(IN_VENV)ruff format --check .
	$(IN_VENV)mypy

bench: $(INSTALLED)bench
	$(IN_VENV)python -m benchmarks.compare $(BENCH_ARGS)

soak: $(INSTALLED)test
	$(IN_VENV)python -m tests.soak --minutes $(SOAK_MINUTES) --report docs/reliability.md
# A warning, such as of a broken link, is an error.
docs: $(INSTALLED)docs
	$(IN_VENV)python -m sphinx --fail-on-warning --keep-going --quiet docs docs/build
	@echo 'Written: docs/build/index.html'

images: $(INSTALLED)test
	$(IN_VENV)python -m docs.images.remake

# Everything is resolved in one go, so that torch and torchvision fit each other.
$(INSTALLED)%: pyproject.toml | $(IN_VENV)pip
	$(IN_VENV)python -m pip install --quiet --editable '.[$*]'
	@touch $@

# pip is the last thing to come into a new environment: where it is, the environment is whole.
$(IN_VENV)pip:
	@command -v $(PYTHON) >/dev/null || { echo 'sepc: there is no $(PYTHON); name a Python 3.11 or later by PYTHON=' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sepc: needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another by PYTHON=" >&2; exit 1; }
	@command -v cc >/dev/null || { echo 'sepc: there is no C compiler `cc`; install one (Debian: apt install gcc)' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV), several minutes and some 6 GB at the first time'

clean:
	rm -rf build dist *.egg-info docs/build examples/output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find sepc tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
