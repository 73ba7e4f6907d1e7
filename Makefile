# make demo       digits that a VAE drew, with its bound in nats (sets up .venv first: about a minute)
# make test       the tests: every subject, in minutes
# make test-all   the tests that `make test` leaves out, because they are slow
# make lint       ruff
# make soak       the tests that take minutes each; CI does not run them
# make bench      ours beside PyTorch (installs it)

# The first one that runs: under pyenv, python3.12 may be a shim that only prints an error.
PYTHON := $(shell for p in python3.11 python3.12 python3; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := .venv/bin
STAMP := .venv/installed-$(VERSION)
# A tree that was moved, or an interpreter that is gone, leaves a .venv that does not run.
$(shell .venv/bin/python -m pip --version >/dev/null 2>&1 || rm -f .venv/installed-*)

.PHONY: demo test test-all lint soak bench
.DEFAULT_GOAL := demo

$(STAMP): setup.cfg pyproject.toml $(wildcard constraints-$(VERSION).txt)
	@test -f constraints-$(VERSION).txt || { echo "aigc_jax is tested on Python 3.11 and 3.12; $(PYTHON) is $(VERSION). Install one, or: make PYTHON=python3.11"; exit 2; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-$(VERSION).txt --editable '.[test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m experiments.vae_digits
	@$(BIN)/python -m aigc_jax sample runs/vae_digits --n 64 --out runs/vae_digits/samples.png

test: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(STAMP)
	$(BIN)/python -m pytest -m slow

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
