# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUIET := --quiet --disable-pip-version-check

BENCHMARKS := fused_loss train_step on_policy loss_scaling cache_size cache_quality plan_accuracy method_memory vocabularies teacher_certainty \
	white_box cross_tokenizer own_words reasoning reasoning_budget continual ledger server_load verifiers palm_rationales duplicates table

.PHONY: help setup demo test lowest check docs bench clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.done  ## build .venv with limbeck and its test extras

$(VENV)/.done: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing limbeck (a minute or two the first time)"
	@$(BIN)/python -m pip install $(QUIET) -c constraints.txt torch 2>&1 | { grep -v '^WARNING: Location' || true; }
	@$(BIN)/python -m pip install $(QUIET) -c constraints.txt -e '.[test,check,docs]' 2>&1 | { grep -v '^WARNING: Location' || true; }
	@$(BIN)/python -c 'import limbeck'
	@touch $@

demo: setup  ## distil the embedded teacher, three seeds, and print the report
	@$(BIN)/limbeck demo --out runs/demo

test: setup  ## all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lowest:  ## all tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	@$(PYTHON) scripts/lowest.py > .venv-lowest/constraints.txt
	@.venv-lowest/bin/python -m pip install $(QUIET) -c .venv-lowest/constraints.txt -e '.[test]'
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 -W ignore

check: setup  ## lint, format, types, layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyright --warnings
	@$(BIN)/lint-imports --no-cache

docs: setup  ## the documentation as a site in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: setup  ## the measurements behind the README
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove what was made
	@rm -rf $(VENV) .venv-lowest runs site .pytest_cache .ruff_cache
