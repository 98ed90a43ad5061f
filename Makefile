# Everything runs in .venv, with the versions in requirements.txt: the demo installs only what it needs, the rest
# everything. PYTHON=python3.12 make test: another Python.
# make demo SDXL=1: the demo on the tiny SDXL.
PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip --quiet --disable-pip-version-check install
export HF_HUB_OFFLINE = 1

.PHONY: demo test style quality

demo: .venv/demo
	@$(BIN)/python examples/tinyworld/demo.py $(if $(SDXL),--sdxl)

# Tests of a module whose fixtures take long are one group: one process runs them.
test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist loadgroup -rs

style: .venv/ready
	$(BIN)/python utils/copies.py --write
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: .venv/ready
	$(BIN)/python utils/copies.py
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

.venv/demo: requirements.txt setup.cfg pyproject.toml
	@echo "Installing what the demo needs into .venv; this takes a few minutes."
	@$(PYTHON) -m venv .venv
	@$(PIP) --constraint requirements.txt --editable '.[scripts,demo]'
	@touch $@

.venv/ready: .venv/demo
	@echo "Installing what the tests need into .venv; this takes a few minutes."
	@$(PIP) --requirement requirements.txt
	@touch $@
