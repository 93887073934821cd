VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help venv demo test check format docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make the virtual environment, with deadpan and the development tools in it

# PyTorch first and alone: it decides the build, and nothing that follows replaces it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deadpan needs Python 3.11 or newer: make venv PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'pip>=25.1'
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e . --group dev
	@touch $@

demo: venv ## Tell the whole story on the bundled model, on the CPU
	$(BIN)/deadpan demo

test: venv ## Run the tests
	$(BIN)/pytest -q -n 2

check: venv ## Check format, style, types, layers and generated pages
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_docs.py --check

format: venv ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: venv ## Write docs/cli.md and docs/recipe.md
	$(BIN)/python tools/generate_docs.py

clean: ## Remove caches and builds; the virtual environment stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
