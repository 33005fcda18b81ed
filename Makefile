# `make demo` and `make test` install what they need into .venv.

PYTHON ?= python3
MINUTES ?= 8
PARTS ?= all
# torchvision pins one exact torch. Any torch from 2.11 on works: make test TORCH=torch==2.11.0 TORCHVISION=torchvision==0.26.0
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
OUT ?= benchmarks/results

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types format gpu bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/demo-installed ## Watch a search, its plan and a training on real data
	@# Waiting threads sleep: on a busy machine, threads that spin take minutes.
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m autobatch.demo

test: $(VENV)/dev-installed ## Run the tests (without a GPU)
	@$(BIN)/python -m pytest -n auto --dist worksteal

check: lint types test ## Lint, types and tests: what CI runs

lint: $(VENV)/dev-installed ## Style, unused code, complexity, formatting
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

types: $(VENV)/dev-installed ## Static types of package, tests and benchmarks
	@$(BIN)/python -m mypy autobatch tests benchmarks

format: $(VENV)/dev-installed ## Format the code
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

gpu: ## Tests and benchmarks on a GPU (MINUTES=, PARTS=, OUT=, PYTHON=)
	$(PYTHON) -m benchmarks gpu $(PARTS) --minutes $(MINUTES) --out $(OUT)

bench: $(VENV)/bench-installed ## Measure this machine (MINUTES=, PARTS=, OUT=)
	@$(BIN)/python -m benchmarks $(PARTS) --minutes $(MINUTES) --out $(OUT)

clean: ## Remove what was installed and cached
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Install exactly this torch first, so that no other package chooses another build.
$(VENV)/torch-installed:
	@echo "installing $(TORCH) and $(TORCHVISION) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) "$(TORCH)" "$(TORCHVISION)"
	@touch $@

$(VENV)/demo-installed: $(VENV)/torch-installed pyproject.toml
	@echo "installing autobatch and what the demo needs"
	@$(PIP) "$(TORCH)" --editable ".[demo]"
	@touch $@

$(VENV)/dev-installed: $(VENV)/demo-installed
	@echo "installing the tools for development"
	@$(PIP) "$(TORCH)" "$(TORCHVISION)" --editable ".[dev]"
	@touch $@

$(VENV)/bench-installed: $(VENV)/dev-installed
	@echo "installing what is measured beside autobatch"
	@$(PIP) "$(TORCH)" "$(TORCHVISION)" --editable ".[bench]"
	@touch $@
