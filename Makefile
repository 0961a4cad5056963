# Everything lives in .venv, which each command sets up when needed; that is quick when it is done.
#
#   make demo                    generate data, train a sharded DeepFM on two ranks, evaluate
#   make test                    run the tests; within ten minutes on two cores
#   make check                   style and types (also: make lint)
#   make docs                    the documentation as a site, in site/
#   make test-all                the tests, then those that are slow (make test-slow): faults, launchers, every model
#   make fuzz                    feed run files, schemas, Parquet files and checkpoints that nobody would write, FUZZ=20000
#                                of each fuzzer; FUZZ_SEED=1 for others
#   make install                 set up alone; ACCELERATOR=cuda for GPUs; TORCH=2.14 for another release of torch
#   make gpu-check               on a machine with a GPU: its tests, measurements, and the table of docs/gpu.md
#   make compat                  models, parity, resume and resharding under the oldest, usual and latest torch that
#                                are known, each in an environment of its own; TORCH=2.12 for one alone
#   make compat PYTHON=3.12      install, demo and unit tests under another Python, in an environment of their own
#   make bench                   measure everything in docs/performance.md, on an idle machine; BENCH="a e --rounds 3" some
#   make audit                   known holes in what the images hold; needs the network
#   make sbom                    what the images hold, as dist/sbom-*.cdx.json; each image also has its own
#   make release                 wheel, source, lists of packages, documentation and images in dist/; uploads nothing
#
# ACCELERATOR and TORCH go with every command that uses what they have set up: `make demo TORCH=2.14`.
#
# pyproject.toml pins the torch, torchrec and fbgemm that are usual, and rechub_dist/builds.py knows which of other
# releases belong together. torchrec goes in without its declared needs, which name the CUDA build of fbgemm.

PYTHON ?= python3
ACCELERATOR ?= cpu
EXTRAS ?= dev,ray
VENV := .venv
BIN := $(VENV)/bin
# the release of torch that is asked for, or the one that pyproject.toml pins
RELEASE := $(or $(TORCH),$(shell sed -n 's/.*"torch==\([0-9]*\.[0-9]*\)\..*/\1/p' pyproject.toml))
STAMP := $(VENV)/.installed-$(RELEASE)-$(ACCELERATOR)-$(EXTRAS)
NEEDS := $(VENV)/requirements.txt
SOURCES := rechub_dist launch tests benchmarks examples
GPU_OUT := runs/gpu-check
DEMO_DATA := data/synthetic
DEMO_OUT := runs/deepfm_synthetic
DEMO_RUN := configs/runs/deepfm_synthetic.yaml
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install bench pages demo test test-slow test-all fuzz check lint docs audit sbom release gpu-check compat clean

install: $(STAMP)

$(STAMP): pyproject.toml Makefile rechub_dist/builds.py
	@test "$(ACCELERATOR)" = cpu -o "$(ACCELERATOR)" = cuda || { echo "ACCELERATOR is cpu or cuda, not $(ACCELERATOR)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python cannot make environments: on Debian and Ubuntu, apt install python3-venv"; exit 2; }
	@mkdir -p $(VENV)
	@$(PYTHON) -m rechub_dist.builds $(RELEASE) $(ACCELERATOR),$(EXTRAS) >$(NEEDS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	grep -v ^torchrec $(NEEDS) | $(PIP) --no-warn-conflicts -r /dev/stdin
	$(PIP) --no-deps "$$(grep ^torchrec $(NEEDS))" --editable .
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

# A link or an anchor that leads nowhere fails; not with --quiet, which leaves warnings out of the count.
DOCS := .venv-docs
docs: $(DOCS)/bin/mkdocs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --site-dir site

$(DOCS)/bin/mkdocs: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

TOOLS := .venv-tools
$(TOOLS)/bin/pip-audit: docker/requirements-tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	@touch $@

# The databases of holes know versions without the name of a build.
audit: $(TOOLS)/bin/pip-audit
	@failed=0; for target in cpu cuda; do \
	    sed -n 's/^\([^ #]*==[^ +]*\).*/\1/p' docker/requirements-$$target.lock >$(TOOLS)/$$target.txt; \
	    $(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r $(TOOLS)/$$target.txt || failed=1; \
	done; exit $$failed

sbom: $(TOOLS)/bin/pip-audit
	mkdir -p dist
	for target in cpu cuda; do \
	    $(TOOLS)/bin/cyclonedx-py requirements docker/requirements-$$target.lock --output-reproducible \
	        -o dist/sbom-$$target.cdx.json || exit 1; \
	done

# The steps before and after it: CONTRIBUTING.md. The wheel is made from the source archive, and used before anything else.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' rechub_dist/__init__.py)
ENGINE ?= docker
release:
	@test -z "$$(git status --porcelain)" || { echo "release: commit or remove what git status lists"; exit 2; }
	@grep -qE '^## $(VERSION), [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md || \
	    { echo "release: CHANGELOG.md has no heading '## $(VERSION), YYYY-MM-DD'; write it, or another __version__"; exit 2; }
	rm -rf dist
	@$(MAKE) --no-print-directory $(STAMP) $(TOOLS)/bin/pip-audit docs sbom
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(TOOLS)/bin/python -m build --outdir dist
	RECHUB_WHEEL=$$(echo $(CURDIR)/dist/*.whl) $(BIN)/python -m pytest -m slow tests/launch/test_wheel.py
	tar -czf dist/rechub_dist-$(VERSION)-docs.tar.gz --sort=name --owner=0 --group=0 \
	    --mtime="$$(git log -1 --format=%cI)" --transform 's|^site|rechub_dist-$(VERSION)-docs|' site
	@if $(ENGINE) info >/dev/null 2>&1; then RECHUB_ENGINE=$(ENGINE) docker/release.sh rechub-dist; \
	    else echo "release: no images: '$(ENGINE) info' finds no engine; ENGINE=podman for another"; fi
	cd dist && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS . && sha256sum --check --quiet SHA256SUMS
	@ls -l dist

# Two processes: most tests wait more than they compute.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(PYTEST_ARGS)

test-all:
	$(MAKE) test
	$(MAKE) test-slow

# The pages that are made from the code; tests compare them.
pages: $(STAMP)
	$(BIN)/rechub-dist config --markdown >docs/configuration.md
	$(BIN)/python -m rechub_dist.cli.command_page >docs/commands.md
	$(BIN)/python -m rechub_dist.cli.python_page >docs/python.md
	$(BIN)/rechub-dist models --markdown docs/models

# An environment on top of .venv, with what is compared and what draws: .venv itself is not to have it.
BENCH_VENV := .venv-bench
BENCH_OUT := runs/bench
bench: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python benchmarks/suite.py $(BENCH) --out $(BENCH_OUT); measured=$$?; \
	$(BENCH_VENV)/bin/python benchmarks/suite.py --out $(BENCH_OUT) --docs docs/performance.md && exit $$measured

$(BENCH_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(BENCH_VENV)
	site='import site; print(site.getsitepackages()[0])'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" >"$$($(BENCH_VENV)/bin/python -c "$$site")/base.pth"
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch-rechub==0.9.0
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "matplotlib>=3.9" "pandas>=2" "scikit-learn>=1.5"
	@touch $@

fuzz: $(STAMP)
	FUZZ=$(or $(FUZZ),20000) $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

# Both run, whatever the first finds; what failed makes it fail in the end, when the table is written.
gpu-check:
	@$(MAKE) --no-print-directory ACCELERATOR=cuda EXTRAS=$(EXTRAS) install
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no CUDA device here: see what nvidia-smi says"; exit 2; }
	mkdir -p $(GPU_OUT)
	$(BIN)/python -m pytest -m gpu tests/gpu --junitxml=$(GPU_OUT)/pytest.xml $(PYTEST_ARGS); tests=$$?; \
	$(BIN)/python benchmarks/gpu.py --out $(GPU_OUT); measured=$$?; \
	$(BIN)/python benchmarks/gpu.py --out $(GPU_OUT) --docs docs/gpu.md && exit $$((tests | measured))

# PYTHON may be a version here: 3.12. Looked for as python3.12, then where pyenv has it.
COMPAT_PYTHON = $(or $(shell python$(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard $(HOME)/.pyenv/versions/$(PYTHON).*/bin/python)))
# What torch, torchrec and fbgemm can break: the models' mathematics, the sharded run's, and what a checkpoint holds.
CORE := tests/models $(addprefix tests/distributed/test_,parity.py resume.py resharding.py)

ifneq ($(filter 3.%,$(PYTHON)),)
compat:
	@test -n "$(COMPAT_PYTHON)" || { echo "python$(PYTHON) is not installed: make compat PYTHON=3.12"; exit 2; }
	$(MAKE) PYTHON=$(COMPAT_PYTHON) VENV=.venv-$(PYTHON) DEMO_DATA=data/compat-$(PYTHON) DEMO_OUT=runs/compat-$(PYTHON) demo
	$(MAKE) PYTHON=$(COMPAT_PYTHON) VENV=.venv-$(PYTHON) PYTEST_ARGS="tests/unit tests/models" test
else
compat:
	@$(MAKE) --no-print-directory --keep-going $(addprefix compat-torch-,$(or $(TORCH),2.11 2.13 2.14))

compat-torch-%:
	@$(MAKE) --no-print-directory TORCH=$* VENV=.venv-torch-$* EXTRAS=dev install
	.venv-torch-$*/bin/rechub-dist --version
	@$(MAKE) --no-print-directory TORCH=$* VENV=.venv-torch-$* EXTRAS=dev PYTEST_ARGS="-m '' $(CORE)" test
endif

clean:
	rm -rf $(VENV) .venv-* site data/synthetic data/compat-* runs/deepfm_synthetic runs/compat-*
