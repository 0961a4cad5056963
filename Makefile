# Everything lives in .venv, which each command sets up when needed; that is quick when it is done.
#
#   make demo                    generate data, train a sharded DeepFM on two ranks, evaluate
#   make test                    run the tests; some minutes
#   make check                   style and types (also: make lint)
#   make test-all                the tests, then those that are slow (make test-slow): faults, launchers, every model
#   make install                 set up alone; ACCELERATOR=cuda for GPUs
#   make gpu-check               on a machine with a GPU: its tests, measurements, and the table of docs/gpu.md
#   make compat PYTHON=3.12      install, demo and unit tests under another Python, in an environment of their own
#
# pyproject.toml pins which builds of torch, torchrec and fbgemm belong together. On CPU torchrec goes in without its
# declared needs, which name the CUDA build of fbgemm.

PYTHON ?= python3
ACCELERATOR ?= cpu
EXTRAS ?= dev,ray
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(ACCELERATOR)-$(EXTRAS)
SOURCES := rechub_dist launch tests benchmarks
GPU_OUT := runs/gpu-check
DEMO_DATA := data/synthetic
DEMO_OUT := runs/deepfm_synthetic
DEMO_RUN := configs/runs/deepfm_synthetic.yaml
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# the torchrec of the extra `cuda`
TORCHREC = $(shell $(PYTHON) -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*[need for need in extras["cuda"] if need.startswith("torchrec")])')

.PHONY: install demo test test-slow test-all check lint gpu-check compat clean

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@test "$(ACCELERATOR)" = cpu -o "$(ACCELERATOR)" = cuda || { echo "ACCELERATOR is cpu or cuda, not $(ACCELERATOR)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[$(ACCELERATOR),$(EXTRAS)]"
	$(PIP) --no-deps $(TORCHREC)
	@rm -f $(VENV)/.installed-*; touch $@

$(DEMO_DATA)/dataset.yaml: | $(STAMP)
	$(BIN)/rechub-dist data synthesize --out $(DEMO_DATA) --rows 400000 --dense 4 --sparse 8 --vocabulary 1000

demo: $(STAMP) $(DEMO_DATA)/dataset.yaml
	$(BIN)/rechub-dist train $(DEMO_RUN) --nproc 2 --set data.root=$(DEMO_DATA) --set output_dir=$(DEMO_OUT)

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/slurm/*.sbatch

lint: check

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-all:
	$(MAKE) test
	$(MAKE) test-slow

# Both run, whatever the first finds; what failed makes it fail in the end, when the table is written.
gpu-check:
	@$(MAKE) --no-print-directory ACCELERATOR=cuda EXTRAS=$(EXTRAS) install
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no CUDA device here: see what nvidia-smi says"; exit 2; }
	mkdir -p $(GPU_OUT)
	$(BIN)/python -m pytest -m gpu tests/gpu --junitxml=$(GPU_OUT)/pytest.xml $(PYTEST_ARGS); tests=$$?; \
	$(BIN)/python benchmarks/gpu.py --out $(GPU_OUT); measured=$$?; \
	$(BIN)/python benchmarks/gpu.py --out $(GPU_OUT) --docs docs/gpu.md && exit $$((tests | measured))

# PYTHON is a version here: 3.12. Looked for as python3.12, then where pyenv has it.
COMPAT_PYTHON = $(or $(shell python$(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard $(HOME)/.pyenv/versions/$(PYTHON).*/bin/python)))

compat:
	@test -n "$(COMPAT_PYTHON)" || { echo "python$(PYTHON) is not installed: make compat PYTHON=3.12"; exit 2; }
	$(MAKE) PYTHON=$(COMPAT_PYTHON) VENV=.venv-$(PYTHON) DEMO_DATA=data/compat-$(PYTHON) DEMO_OUT=runs/compat-$(PYTHON) demo
	$(MAKE) PYTHON=$(COMPAT_PYTHON) VENV=.venv-$(PYTHON) PYTEST_ARGS="tests/unit tests/models" test

clean:
	rm -rf $(VENV) .venv-* data/synthetic data/compat-* runs/deepfm_synthetic runs/compat-*
