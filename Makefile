# All set-up happens by itself: every goal below needs the stamp, and the stamp is made once.
# Plain pip equivalents stand in docs/howto/install.md.

PYTHON ?= python3
# The build of torch: cpu, cuda, or auto: the CPU build where pip finds the one that is pinned, else the one for CUDA.
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOCKS := $(wildcard requirements/*.txt)
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --no-deps --require-hashes --no-build-isolation

ARGS ?=
NAME ?=

.DEFAULT_GOAL := help
.PHONY: help setup lock release demo check test test-all test-fleet test-gpu test-clients mutants lint prose format bench bench-train bench-serve bench-gpu figures reference pictures reports docs clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## .venv with turret and all it needs

$(STAMP): pyproject.toml Makefile $(LOCKS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "turret needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements/build.txt
	@torch=$(TORCH); if [ $$torch = auto ]; then \
		torch=cuda; $(INSTALL) --dry-run -r requirements/cpu.txt >/dev/null 2>&1 && torch=cpu; \
	fi; \
	echo "$(INSTALL) -r requirements/$$torch.txt"; \
	$(INSTALL) -r requirements/$$torch.txt || \
		{ echo "pip does not get the build of torch that requirements/$$torch.txt pins: see TORCH in docs/howto/install.md"; exit 1; }
	$(INSTALL) -r requirements/common.txt -r requirements/interpreter.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

lock: $(STAMP)  ## pin newer versions of everything in requirements/; needs uv
	$(BIN)/python release/make_lock.py

release: $(STAMP)  ## check the pictures; the wheel with its kernels, the sdist, SHA256SUMS, a bill of materials, in dist/
	$(MAKE) pictures ARGS=--check
	$(BIN)/python release/make_release.py

demo: $(STAMP)  ## the whole tour on a bundled base and real data; ARGS=--quick for the short one
	$(BIN)/turret demo $(ARGS)

lint: $(STAMP) prose  ## ruff, mypy strict, the layers, the prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

prose: $(STAMP)  ## find sentences in the documentation that a reader must decode
	$(BIN)/python release/check_prose.py

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint  ## lint, then what a change touches, in about a minute; ARGS=main: all that differs from a branch
	@tests=$$($(BIN)/python release/touched_tests.py $(ARGS)); if [ -n "$$tests" ]; then \
		$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu" $$tests; \
	fi

test: lint  ## lint, then the fast tests; ARGS go to pytest
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" $(ARGS)

test-all: lint  ## lint, then every test that this machine can run, slow ones too
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-fleet: $(STAMP)  ## several processes on one PostgreSQL and S3, killed again and again: minutes
	$(BIN)/python -m pytest -n 0 -m fleet $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a card, and nothing else: no network and no second machine
	$(BIN)/python -m pytest -n 0 -m gpu $(ARGS)

test-clients: $(STAMP)  ## other people's clients against a real server; each is installed into .venv/clients once
	$(BIN)/python -m pytest -n 0 -m clients $(ARGS)

mutants: $(STAMP)  ## change single operators in the modules that matter most; the tests must notice. ARGS="verdicts --most 10"
	@test -x $(VENV)/mutants/bin/cosmic-ray || { $(PYTHON) -m venv $(VENV)/mutants && \
		$(VENV)/mutants/bin/pip install --quiet cosmic-ray==8.7.0; }
	$(VENV)/mutants/bin/python release/mutants.py $(ARGS)

bench: $(STAMP)  ## every benchmark, or one: make bench NAME=lora_training
	@for file in $(if $(NAME),benchmarks/$(NAME).py,$$(grep -l __main__ benchmarks/*.py | grep -v /gpu)); do \
		echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; \
	done

bench-train: $(STAMP)  ## training beside HF Trainer + PEFT, in turns; ARGS="--jobs short", --quality, --report
	$(BIN)/python benchmarks/train_speed.py $(ARGS)

bench-serve: $(STAMP)  ## mixtures of adapters beside the bare base and PEFT, then 64 clients over HTTP; ARGS="--report"
	$(BIN)/python benchmarks/serve_speed.py $(ARGS)
	$(BIN)/python benchmarks/serve_load.py $(if $(findstring --report,$(ARGS)),--report)

bench-gpu: $(STAMP)  ## on a card: training and decoding beside HF + PEFT, Unsloth and vLLM where installed; ARGS="--base BASE"
	$(BIN)/python benchmarks/gpu.py $(ARGS)

figures: $(STAMP)  ## write every measured figure of README and docs from benchmarks/results
	$(BIN)/python benchmarks/figures.py $(ARGS)

pictures: $(STAMP)  ## take the console's pictures of the docs; ARGS=--check: fail if a page has other words than its picture
	PYTHONPATH=tests $(BIN)/python -m server.console_pictures .turret/pictures docs/images/console $(ARGS)

reports: $(STAMP)  ## the reports of `turret compare` in docs/reports, or one: make reports NAME=bbc
	PATH="$(CURDIR)/.venv/bin:$$PATH" docs/reports/make.sh $(NAME)

reference: $(STAMP)  ## write the generated parts of docs/reference from the code
	$(BIN)/python release/make_reference.py

docs: $(STAMP) reference  ## the documentation as pages, in site/; a dead link or a figure that no result says fails
	$(BIN)/python benchmarks/figures.py --check
	$(BIN)/mkdocs build --strict

clean:  ## forget the set-up and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis site dist
