# Every target makes the virtual environment it needs; python3, make and a package index are enough.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test test-skipped lint bench neighbour sizes faults fuzz train reference mistakes docs

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

run: .venv/installed ## write text with the model that ships in models/shakespeare
	@$(BIN)/python -m picogpt --temperature 0.8 --top_p 0.95 --seed 3 --n_tokens_to_generate 200

test: .venv/installed-dev ## run the tests; what needs torch is skipped by name when it is missing
	$(BIN)/python -m pytest

test-skipped: .venv/installed-dev ## run what the last `make test` skipped; a test skipped again is a failure
	$(BIN)/python -m pytest --skipped

lint: .venv/installed-dev ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/installed-oracle ## measure speed and memory against transformers + torch, interleaved
	$(BIN)/python benchmarks/speed.py

neighbour: .venv/installed ## measure speed alone, and beside a process that holds a core
	$(BIN)/python benchmarks/neighbour.py

sizes: .venv/installed ## run models of all four sizes, random weights, and measure their memory (6 GB of disk)
	$(BIN)/python benchmarks/sizes.py

faults: .venv/installed-dev ## download from a server that behaves badly; print what the user sees
	$(BIN)/python benchmarks/faults.py

fuzz: .venv/installed-dev ## feed bad files and command lines to every reader for five minutes each
	$(BIN)/python tests/fuzz.py --seconds 300

train: .venv/installed-dev ## train models/shakespeare anew, into runs/shakespeare
	$(BIN)/python -m picogpt.train data/tinyshakespeare.txt --output runs/shakespeare

reference: .venv/installed ## rebuild reference/ and fail if a value has moved
	$(BIN)/python reference/build.py

mistakes: .venv/installed-oracle ## plant known faults in torch's forward pass, alone and in pairs; count what is named
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/test_diagnose.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/test_diagnose.py --pairs 300

docs: .venv/installed-docs ## build the book, docs/_build/html/index.html; fail if it does not match the code
	@# Without its cache pytest leaves alone the list of what the last `make test` skipped.
	$(BIN)/python -m pytest --quiet -p no:cacheprovider tests/test_shape_comments.py
	$(BIN)/sphinx-build -q -E -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/python -m picogpt.explain "Friends, Romans," -o docs/_build/html/explain.html

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev,jax]"
	@touch $@ .venv/installed

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@ .venv/installed

# torch first, pinned: a bare `torch` may bring gigabytes of GPU libraries that nothing here uses.
.venv/installed-oracle: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[oracle]"
	@touch $@ .venv/installed
