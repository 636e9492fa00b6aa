# Everything runs in a virtual environment inside the checkout; it is made once and reused.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOWEST := .venv-lowest

.PHONY: demo demo-customize docs docs-serve test test-kernels test-lowest setup lint types clean

demo: setup
	$(BIN)/comcat demo --out comcat-demo --overwrite

demo-customize: setup
	$(BIN)/comcat demo customize --out comcat-demo-customize --overwrite

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The site, in site/: broken links and what cannot be described fail. Nothing is fetched.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The numerical tests under other kernels: instruction sets and numbers of threads that this processor has.
test-kernels: setup
	$(BIN)/python benchmarks/kernels.py

# The tests with the oldest versions that pyproject.toml allows, which have packages for Python 3.11.
test-lowest:
	test -x $(LOWEST)/bin/python || python3.11 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LOWEST) comcat-demo comcat-demo-customize site
