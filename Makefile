# make quickstart   install, then run the whole life of a small MPT on this machine's own text
# make finetune-demo   after it: finetune its model to write docstrings, in two minutes
# make test         install, then format check, lint, types and tests: what CI runs
#                   (SET=composer-pins: with PyTorch 2.7, in an environment of its own)
# make soak         the tests that take long: runs that are killed again and again
# make docs         write the generated pages of the docs and build the site into build/site
# make gpu          on a machine with a GPU: ceilings, kernels, steps of a 7B, peers, tests, in nine minutes
.DEFAULT_GOAL := help
.PHONY: help install quickstart finetune-demo test soak docs gpu clean

# The first of these that exists; or PYTHON=/path/to/python3.12 make ...
PYTHON ?= $(firstword $(foreach p,python3.12 python3.13 python3.11 python3.14 python3.10 python3,$(shell $(p) -c 'import sys; print("$(p)") if (3, 10) <= sys.version_info[:2] <= (3, 14) else None' 2>/dev/null)))
# Which of the lists in mptfoundry/requirements/ is installed. Today's packages need Python 3.11 or newer.
NATURAL_SET := $(shell $(PYTHON) -c 'import sys; print("current" if sys.version_info >= (3, 11) else "composer-pins")' 2>/dev/null)
SET ?= $(NATURAL_SET)
# The environment of another set than this Python's usual one has a folder of its own.
VENV ?= .venv$(if $(filter $(NATURAL_SET),$(SET)),,-$(SET))
BIN := $(VENV)/bin
LIST := mptfoundry/requirements/$(SET)-dev.txt
TEXT ?=
TEST_PROCESSES ?= 2
SECONDS_ON_GPU ?= 540

help:
	@sed -n 's/^# \(make\|      \)/\1/p' Makefile

$(VENV)/installed: pyproject.toml $(wildcard mptfoundry/requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.14 found. Install one, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@test -f $(LIST) || { echo "SET=$(SET) is not a set of packages. Use SET=current or SET=composer-pins."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.path.insert(0, "."); from mptfoundry.plan.install_sets import why_not; sys.exit(why_not("$(SET)"))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	@echo "Installing the set $(SET): about 7 GB with PyTorch's CUDA build; five to eight minutes on two cores."
	$(BIN)/python -m pip install --quiet --no-deps --requirement $(LIST)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

install: $(VENV)/installed

quickstart: install
	$(BIN)/python scripts/quickstart.py text="$(TEXT)"

finetune-demo: install
	$(BIN)/python scripts/finetune_demo.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not serial"
	$(BIN)/python -m pytest -m serial $$(grep -rl --include='test_*.py' --exclude-dir=soak mark.serial tests)

soak: install
	MPTFOUNDRY_SOAK=1 $(BIN)/python -m pytest tests/soak tests/pretended tests/mpt/test_attention_kernels.py tests/mpt/test_attention_tiles.py tests/checkpoints/test_checksums.py
	MPTFOUNDRY_SOAK=1 $(BIN)/python -m pytest -m soak $$(grep -rlE --include='test_*.py' 'mark[.]soak|some_of' tests)

docs: install
	$(BIN)/python scripts/write_docs.py
	$(BIN)/python -m mkdocs build --site-dir build/site

gpu:
	python3 scripts/gpu.py seconds=$(SECONDS_ON_GPU)

clean:
	rm -rf quickstart runs
