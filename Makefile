# make quickstart | test | lint | docs | chaos | benchmark | gpu: each makes .venv if there is none and installs the tested versions into it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Bytecode is kept, whatever the environment says: else each process that a test starts compiles its imports again.
export PYTHONDONTWRITEBYTECODE :=
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: quickstart test lint docs chaos benchmark gpu

quickstart: $(INSTALLED)
	$(BIN)/lightning-fdfo fit --config configs/quickstart.yaml --trainer.default_root_dir $(RUN)
	$(BIN)/lightning-fdfo report $(RUN)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

chaos: $(INSTALLED)
	$(BIN)/python -m tests.runs.chaos

benchmark: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks --page docs/performance.md

gpu: $(INSTALLED)
	$(BIN)/python -m tests.gpu

$(INSTALLED): pyproject.toml rewards/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]' --editable rewards
	touch $(INSTALLED)
