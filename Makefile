# Everything starts with `make demo` or `make test`; both set up .venv first if it is missing or out of date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.PHONY: demo test lint format bench

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.set-up
SCRIPTS := launch/single_node.sh launch/multi_node.sh launch/slurm.sbatch launch/prep.slurm .ci/run

demo: $(SETUP)
	$(BIN)/sft demo

test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck $(SCRIPTS)

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP)
	$(BIN)/python benchmarks/train.py

# The stamp is removed first and written last, and a folder without it is emptied: a set-up that was killed starts over.
# torch goes first, by itself: an index or a folder of wheels may offer this machine's own build (CPU, CUDA) of it.
# pip >= 25.3 takes the constraints of what it builds from the second variable, older ones from the first.
$(SETUP): constraints.txt pyproject.toml
	@if [[ -e $(SETUP) ]]; then rm $(SETUP); else $(PYTHON) -m venv --clear .venv; fi
	source $(BIN)/activate
	export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
	pip install torch==2.13.0
	pip install -e '.[dev,ray]' -c constraints.txt
	touch $(SETUP)
