# make quickstart   set everything up and run the main job on the embedded corpus
# make test         set everything up and run the tests
# make docs         set everything up and write docs/reference out of the program
# make lint         set everything up and run ruff, mypy and the import check
#
# PYTHON=python3.12     which Python makes the environment (3.11 or newer)
# EXTRA=cpu|gpu         which packages; by default gpu where nvidia-smi answers
# TEST_PROCESSES=1      how many processes share the tests out; 2 unless given
# TORCH_INDEX=URL       index to take PyTorch from, such as the one of its CPU-only builds

PYTHON ?= python3
TORCH_INDEX ?=
EXTRA := $(or $(EXTRA),$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu))
PYTEST_ARGS ?=
BENCH_ARGS ?=
TEST_PROCESSES ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Written last, so an interrupted set-up starts again; a name per extra, so a change of it is seen.
STAMP := $(VENV)/.set-up-$(EXTRA)
PACKAGES := model memory_server trainer cluster

ifeq ($(filter $(EXTRA),cpu gpu),)
$(error EXTRA=$(EXTRA) is not known: give EXTRA=cpu or EXTRA=gpu)
endif

.PHONY: setup quickstart test coverage docs bench-check lint clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "pluglm needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) -V 2>&1)." >&2; \
	  echo "Install one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	rm -f $(VENV)/.set-up-*
	@# A half-made environment, or one of an old Python, is made anew; a whole one is kept.
	$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel ninja numpy
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@# DeepSpeed's set-up imports torch, so it is built here and not in isolation; no operator is
	@# compiled. Told that the accelerator is a GPU, it would fail without a CUDA compiler.
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) install -c constraints.txt --no-build-isolation deepspeed
	@# The two FAISS packages hold the same files.
	$(PIP) uninstall -q -y $(if $(filter gpu,$(EXTRA)),faiss-cpu,faiss-gpu-cu12)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[$(EXTRA),quickstart,dev]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/pluglm quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

# The lines that the tests run, in all processes that they start; by package, then the whole. Whether
# the tests pass is for `make test` to say: some fill a disk, or time ranks, which coverage disturbs.
coverage: $(STAMP)
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)
	-$(BIN)/coverage combine --quiet
	@for package in $(PACKAGES); do echo "$$package: $$($(BIN)/coverage report \
	  --format=total --precision=1 --include="$$package/*") % of its lines"; done
	$(BIN)/coverage report --skip-covered --sort=cover | tail -n 40

docs: $(STAMP)
	$(BIN)/python -m cluster.reference

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports

bench-check: $(STAMP)
	$(BIN)/python benchmarks/check.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
