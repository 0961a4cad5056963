# Everything lives in .venv. `make demo` and `make test` set it up when needed; both are quick when that is done.
#
#   make demo                    generate data, train a sharded DeepFM on two ranks, evaluate
#   make test                    lint, type-check and run the tests
#   make install                 set up alone; ACCELERATOR=cuda for GPUs
#
# This is the one place that knows which builds of torch, torchrec and fbgemm belong together (pyproject.toml pins the
# versions). On CPU torchrec goes in without its declared needs, which name the CUDA build of fbgemm.

PYTHON ?= python3
ACCELERATOR ?= cpu
EXTRAS ?= dev,ray
TORCHREC = $(shell $(PYTHON) -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["tool"]["rechub-dist"]["torchrec"])')
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(ACCELERATOR)-$(EXTRAS)
SOURCES := rechub_dist launch tests benchmarks
DEMO_DATA := data/synthetic
DEMO_RUN := configs/runs/deepfm_synthetic.yaml

.PHONY: install demo test lint clean

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@test "$(ACCELERATOR)" = cpu -o "$(ACCELERATOR)" = cuda || { echo "ACCELERATOR is cpu or cuda, not $(ACCELERATOR)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(ACCELERATOR),$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCHREC)
	@rm -f $(VENV)/.installed-*; touch $@

$(DEMO_DATA)/dataset.yaml: | $(STAMP)
	$(BIN)/rechub-dist data synthesize --out $(DEMO_DATA) --rows 400000 --dense 4 --sparse 8 --vocabulary 1000

demo: $(STAMP) $(DEMO_DATA)/dataset.yaml
	$(BIN)/rechub-dist train $(DEMO_RUN) --nproc 2

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy launch/*.py
	$(BIN)/shellcheck launch/*.sh launch/slurm/*.sbatch

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) data/synthetic runs/deepfm_synthetic
