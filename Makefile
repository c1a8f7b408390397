# `make` names the targets. PYTHON=python3.12 chooses the interpreter of the virtual environment.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
DEMO := demo
VENV := .venv
BIN := $(VENV)/bin
# The slowest files are early in the order of their names: run in that order, both processes end at the same time.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
RUN := $(BIN)/mambatrain
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check gpu clean

help:
	@echo 'make demo    text -> tokens -> a small Mamba -> bits per byte, a sample, weights that transformers opens'
	@echo 'make test    the whole test suite; no network, no GPU needed'
	@echo 'make check   format, lint, types, import layers'
	@echo 'make gpu     on a machine with a GPU: parity, checks, benchmarks; installs nothing, PYTHON needs torch and pytest'
	@echo 'make clean   removes $(VENV)/, $(DEMO)/ and caches; runs/ and data/ stay'

# Every verb recognises what it has done: a second `make demo` reuses it.
demo: $(VENV)/.installed
	$(BIN)/python data_scripts/python_stdlib.py --out $(DEMO)/corpus.jsonl
	$(RUN) tokenizer train $(DEMO)/corpus.jsonl --vocab-size 4096 --out $(DEMO)/tokenizer.json
	$(RUN) tokenize $(DEMO)/corpus.jsonl --tokenizer $(DEMO)/tokenizer.json --out $(DEMO)/shards --held-out 0.02
	$(RUN) pretrain demo --run $(DEMO)/run --set data.shards=$(DEMO)/shards
	$(RUN) evaluate $(DEMO)/run --json $(DEMO)/evaluation.json
	@printf 'def ' > $(DEMO)/sample.py
	$(RUN) generate $(DEMO)/run --prompt 'def ' --seed 1 >> $(DEMO)/sample.py
	@cat $(DEMO)/sample.py
	$(RUN) export $(DEMO)/run $(DEMO)/export --format transformers
	@echo
	@echo 'The demo is done. What lies where:'
	@echo '  $(DEMO)/corpus.jsonl      the text: the standard library of $(PYTHON), one file a line'
	@echo '  $(DEMO)/tokenizer.json    the tokenizer trained on it'
	@echo '  $(DEMO)/shards/           its tokens, a part held out'
	@echo '  $(DEMO)/run/              the run: recipe, log.jsonl, loss.png, checkpoints'
	@echo '  $(DEMO)/evaluation.json   its held-out loss, in bits per byte too'
	@echo '  $(DEMO)/sample.py         code that the model wrote'
	@echo '  $(DEMO)/export/           the weights, as AutoModelForCausalLM opens them'
	@echo 'docs/first_run.md explains each step, and how to train on text of your own.'

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu:
	$(PYTHON) kernels/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing mambatrain into $(VENV) (once; a few minutes where packages must be downloaded)'
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing mambatrain and what its tests need into $(VENV) (once)'
	$(PIP) -e '.[dev,eval]'
	@touch $@ $(VENV)/.installed

# pip is the last thing that venv writes: a half-made environment is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
