# `make zero` and `make test` need Python 3.11 or newer and nothing else; another one: `make test PYTHON=python3.12`.
# Each Python gets a virtual environment of its own with the versions of requirements.lock, installed once.

PYTHON ?= python3
WORKDIR ?= runs/zero

# A pyenv shim answers only for the versions that are switched on; the installed one is taken then.
FOUND := $(shell for p in $(PYTHON) $$(ls -d $$(pyenv root 2>/dev/null)/versions/*/bin/$(notdir $(PYTHON)) 2>/dev/null); do \
	$$p -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(1); print(sys.executable, "%d.%d" % v[:2])' 2>/dev/null \
	&& break; done)
VENV := .venv-$(word 2,$(FOUND))
BIN := $(VENV)/bin
# No build isolation: what has to be built is built by the setuptools of the lock file.
INSTALL := $(BIN)/python -m pip install --quiet --constraint requirements.lock --no-build-isolation
# One dependency of reasoning-gym is C source; without a compiler its tests are skipped.
COMMA := ,
GYM := $(if $(shell command -v cc),$(COMMA)gym)
# The compiler for TPUs, which some tests use. In a folder of its own: wherever jax finds it, it looks for a TPU.
TPU := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(VENV)/libtpu)

.PHONY: zero r1 distill test bench report lint clean
.DELETE_ON_ERROR:

zero: $(VENV)/core
	$(BIN)/python -m r1jax.main --config=configs/zero.py --workdir=$(WORKDIR)

r1: $(VENV)/core
	$(BIN)/python -m r1jax.main --config=configs/r1.py --workdir=runs/r1

distill: $(VENV)/core
	$(BIN)/python -m r1jax.main --config=configs/distill.py --workdir=runs/distill

report: $(VENV)/core
	$(BIN)/python -m r1jax.report --workdir=$(WORKDIR)

bench: $(VENV)/core
	$(BIN)/python -m tests.bench.step

test: $(VENV)/test $(TPU)
	PYTHONPATH=$(abspath $(TPU)) $(BIN)/python -m pytest -n auto --maxprocesses=8 -rs tests

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	@test -n '$(FOUND)' || { echo 'r1jax needs Python 3.11 or newer, which "$(PYTHON)" is not; name one: make PYTHON=python3.11'; exit 1; }
	$(firstword $(FOUND)) -m venv $(VENV)

$(VENV)/core: setup.py requirements.lock | $(BIN)/python
	$(INSTALL) setuptools
	$(INSTALL) --editable .
	touch $@

$(VENV)/test: $(VENV)/core
	$(INSTALL) --editable '.[test$(GYM)]'
	touch $@

$(VENV)/libtpu: | $(VENV)/core
	$(INSTALL) --no-deps --target $@.new libtpu
	mv $@.new $@

clean:
	rm -rf .venv-* *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
