# Every verb sets up what it needs: a machine with python3, pip, make and gcc is enough.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test chaos check fix

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# No progress bar, which would drown a log: only downloads a person waits for (10 MB and more).
NEWS := sed -unE \
	-e 's/^ *Downloading ([^ ]+) \(([0-9]{2,}(\.[0-9]+)? [MG]B)\).*/  downloading \1 (\2)/p' \
	-e 's/^Installing collected packages.*/  unpacking/p'

help:  ## list the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 15

demo: $(READY)  ## real videos from an S3 bucket to captions in Parquet, three runs: the last two reuse
	@$(BIN)/python jobs/demo.py

test: $(READY)  ## every test that needs neither a GPU nor minutes
	@$(BIN)/python -m pytest -m "not gpu and not slow" --durations=15

chaos: $(READY)  ## kill drivers and workers, break the store's answers; half an hour on 2 cores, ends with a table
	@$(BIN)/python -m pytest tests/chaos -m slow

check: $(READY)  ## lint, format, types and the direction of imports; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fix: $(READY)  ## let ruff repair and format what it can, and renew the README's table of keys
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@PYTHONPATH=. $(BIN)/python tests/test_readme.py

# The stamp is written last, so an installation that broke off is done again.
# pip runs outside the new environment (--python): Debian's python3 has no ensurepip to put one inside.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv with every dependency, a few minutes the first time"
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit("Python 3.11 or 3.12 is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip .venv
	@$(PYTHON) -m pip --python $(BIN)/python install --disable-pip-version-check --progress-bar off \
		--constraint constraints.txt pip --editable '.[dev]' | $(NEWS)
	@touch $@
	@echo "  ready"
