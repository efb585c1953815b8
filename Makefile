# make env      builds .venv with everything in it       make test     linters, types, documentation, tests
# make demo     all steps on synthetic data              make parity   numbers of the public release
#                                                        make benchmark   time and memory, an hour on two cores
# make docs     the documentation as a site, in site/    make dist     wheel and sdist, installed and tried
# make kills    40 kills of a training and 20 of preprocessing, each continued
#
# Other versions: make env TORCH=torch==2.12.0; another Python: make env PYTHON=python3.12
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
TORCH ?= torch==2.13.0
NNUNETV2 ?= nnunetv2==2.8.1

# a file of tests runs in one process: its tests share a project
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(VENV)/constraints.txt
STAMP := $(VENV)/installed.stamp
# not --quiet: that hides warnings from --strict, too. The variable silences mkdocs-material's notice of its successor
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
# of pip's many lines, those that show where it is
PROGRESS := { grep --line-buffered -E '^ *(Collecting|Downloading|Installing|Successfully)' || true; }

.PHONY: env demo test docs dist parity kills benchmark clean FORCE

env: $(STAMP)

$(BIN)/python:
	@echo "env 1/4: virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python {sys.version.split()[0]} is too old: hyspark_nnunet needs 3.10 or later; name one with: make env PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# Without the constraint pip would replace this torch: the newest torchvision asks for the newest torch.
# The file changes, and the environment is installed again, only if other versions are requested.
$(PINS): FORCE | $(BIN)/python
	@printf '%s\n' '$(TORCH)' '$(NNUNETV2)' | cmp -s - $@ || printf '%s\n' '$(TORCH)' '$(NNUNETV2)' > $@

$(STAMP): setup.py pyproject.toml $(PINS)
	@echo "env 2/4: $(TORCH), $(NNUNETV2) and what they need (this takes some minutes)"
	@$(PIP) install --progress-bar off --constraint $(PINS) '$(TORCH)' '$(NNUNETV2)' | $(PROGRESS)
	@echo "env 3/4: hyspark_nnunet, editable, with its development tools"
	@$(PIP) install --progress-bar off --constraint $(PINS) --editable '.[dev]' | $(PROGRESS)
	@echo "env 4/4: does torchvision fit this torch?"
	@$(BIN)/hyspark_nnunet doctor --only torchvision --mend
	@touch $@
	@echo "env: ready; activate it with: source $(BIN)/activate"

demo: env
	$(BIN)/python -m hyspark_nnunet.demo

# On a CPU nnU-Net's commands take a thread per core whatever OMP_NUM_THREADS says; where several of them run, threads
# that wait for each other must not keep a core busy: hence OMP_WAIT_POLICY.
test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MKDOCS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

docs: env
	$(MKDOCS)

# Built by the setuptools of .venv, and tried in fresh environments that borrow its packages: nothing is downloaded.
dist: env
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m tests.distributions dist

# make test runs this on tests/fixtures; HYSPARK_REFERENCE_FIXTURES names a folder with larger recordings
parity: export HYSPARK_REFERENCE_FIXTURES ?= $(wildcard ../shared/fixtures)
parity: env
	$(BIN)/python -m pytest tests/test_parity.py -v

benchmark: env
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.report

# make test kills a training four times
kills: env
	KILLS=40 $(BIN)/python -m pytest tests/long_trainings/test_kills.py -v -s
	KILLS=20 $(BIN)/python -m pytest tests/preprocessing/test_interruptions.py -v -s

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
