# make demo         digits that a VAE drew, with its bound in nats (sets up .venv first: about a minute)
# make test         the tests: every subject, in minutes
# make test-all     the tests that `make test` leaves out, because they are slow
# make test-oldest  the core of `make test` on the oldest Python and JAX (sets up .venv-oldest first)
# make lint         ruff
# make soak         the tests that take minutes each; CI does not run them
# make bench        ours beside PyTorch (installs it)

PYTHONS := 3.13 3.12 3.11
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)

# The first Python of the versions in $(1) that works, from the PATH or from pyenv's own folder. Each
# is really run: under pyenv, python3.13 may be a shim that only prints an error.
find = $(shell for v in $(1); do \
  for p in python$$v $$(ls -d $(PYENV)/versions/$$v.*[0-9]/bin/python3 2>/dev/null | sort -rV); do \
    $$p -c 'import ensurepip, ssl, venv' >/dev/null 2>&1 && echo $$p && exit; done; done)

PYTHON := $(call find,$(PYTHONS))
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(VERSION)
# A tree that was moved, or an interpreter that is gone, leaves an environment that does not run.
$(shell $(BIN)/python -m pip --version >/dev/null 2>&1 || rm -f $(VENV)/installed-*)

.PHONY: demo test test-all find-oldest test-oldest lint soak bench
.DEFAULT_GOAL := demo

$(STAMP): setup.cfg pyproject.toml $(wildcard constraints-$(VERSION).txt)
	@test -n "$(PYTHON)" || { echo "None of Python $(PYTHONS) works, on the PATH or in $(PYENV)/versions. Install one with venv and ssl, or: make PYTHON=/path/to/python3.13"; exit 2; }
	@test -n "$(VERSION)" || { echo "$(PYTHON) is no Python that runs. Try: make PYTHON=/path/to/python3.13"; exit 2; }
	@test -f constraints-$(VERSION).txt || { echo "aigc_jax is tested on Python $(PYTHONS); $(PYTHON) is $(VERSION). Install one of these, or: make PYTHON=/path/to/python3.13"; exit 2; }
	@test ! -e $(VENV) || test -n "$$(ls $(VENV)/made-by-make $(VENV)/installed-* 2>/dev/null)" || { echo "make did not set up $(VENV), and will not delete it. Move it away, or: make VENV=.venv-make"; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $(VENV)/made-by-make
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$(VERSION).txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m experiments.vae_digits
	@$(BIN)/python -m aigc_jax sample runs/vae_digits --n 64 --out runs/vae_digits/samples.png

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' $(TESTS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m slow $(TESTS)

OLDEST = $(call find,$(lastword $(PYTHONS)))
find-oldest:
	@test -n "$(OLDEST)" || { echo "No usable Python $(lastword $(PYTHONS)) here: the oldest versions are not tested."; exit 2; }

test-oldest: find-oldest
	$(MAKE) test PYTHON=$(OLDEST) VENV=.venv-oldest TESTS="tests/test_golden.py tests/test_contract.py tests/test_train.py"

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

soak: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m soak -s

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$(VERSION).txt --editable '.[bench]'
	$(BIN)/python benchmarks/vae.py
	$(BIN)/python benchmarks/gan.py
	$(BIN)/python benchmarks/ddpm.py
	$(BIN)/python benchmarks/transformer.py
